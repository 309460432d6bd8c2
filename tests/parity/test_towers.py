"""ResNet and timm image towers against open_clip_torch 3.3.0's recorded answers, and against timm's own CLIP ResNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tower_cases as cases
from open_clip import factory
from open_clip.checkpoint import fit as checkpoint
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel

FIXTURES = Path(__file__).parent / "fixtures"
ANSWERS = json.loads((FIXTURES / "towers.json").read_text(encoding="utf-8"))
TOLERANCE = 2e-4  # relative to the largest value


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    return torch.load(FIXTURES / "towers.pt", weights_only=True)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, where: str) -> None:
    assert ours.shape == theirs.shape, where
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < TOLERANCE, f"{where}: {error:.1e} relative"


def assert_like(ours: Any, sampled: Any, where: str) -> None:
    """`ours` is what `sampled` was made of (cases.sample)."""
    if isinstance(sampled, list):
        assert len(ours) == len(sampled), where
        for index, pair in enumerate(zip(ours, sampled, strict=True)):
            assert_like(*pair, f"{where} [{index}]")
    elif "values" not in sampled:
        assert list(ours) == list(sampled), where
        for key in sampled:
            assert_like(ours[key], sampled[key], f"{where} {key}")
    else:
        found = cases.sample(ours)
        assert found["shape"] == sampled["shape"], where
        assert_close(torch.tensor(found["values"]), torch.tensor(sampled["values"]), where)


# ---- two models of each family ----


def create(name: str, size: Any) -> torch.nn.Module:
    """On the meta device, and then given weights, as from a file."""
    model = factory.create_model(name, device="meta", force_image_size=size, text_cfg=dict(cases.TEXT))
    checkpoint.put_weights(model, cases.weights(model.state_dict()))
    return model.eval()


@pytest.mark.parametrize("name", cases.MODELS)
def test_features_are_open_clips(name: str, answers: dict[str, Any]) -> None:
    size, expected = cases.MODELS[name], answers["features"][name]
    model, image = create(name, size), cases.images(size)
    with torch.no_grad():
        assert_close(model.encode_image(image), expected["image"], name)
        assert_like(model(image, cases.texts()), expected["forward"], name)
    assert (expected["image"][0] - expected["image"][1]).abs().max() > 0.01, "the images make a difference"


@pytest.mark.parametrize(
    ("name", "size"), [("PE-Core-T-16-384", (64, 48)), ("swin_base_patch4_window7_224", 256), ("ViTamin-S", 64)]
)
def test_weights_for_another_image_size_are_resized_as_in_open_clip(
    name: str, size: Any, answers: dict[str, Any]
) -> None:
    tiny = {"text_cfg": dict(cases.TEXT)}
    state_dict = cases.weights(factory.create_model(name, device="meta", **tiny).state_dict())
    model = factory.create_model(name, device="meta", force_image_size=size, **tiny)
    checkpoint.put_weights(model, state_dict)
    expected = {key: value for key, value in answers["resized"].items() if key.startswith(name)}
    assert expected
    for key, value in expected.items():
        assert_close(model.visual.state_dict()[key.split(" ")[1]], value, key)


# ---- heads ----


@pytest.mark.parametrize("trunk", cases.TRUNKS)
def test_every_pooling_and_projection_is_open_clips(trunk: str) -> None:
    for name in (name for name in cases.HEADS if name.startswith(f"{trunk} ")):
        kwargs, expected = cases.HEADS[name], ANSWERS["heads"][name]
        if expected is None:  # no such pooling, or no forward pass with it
            with pytest.raises((ValueError, RuntimeError)):
                TimmModel(**kwargs)(cases.images(kwargs["image_size"]))
            continue
        tower = TimmModel(**kwargs).eval()
        assert cases.digest(cases.layout(tower)) == expected["digest"], name
        tower.load_state_dict(cases.weights(tower.state_dict()))
        with torch.no_grad():
            assert_like(tower(cases.images(kwargs["image_size"])), expected["features"], name)


# ---- intermediates and locks ----


@pytest.mark.parametrize("name", ["resnet", "test_vit", "test_resnet"])
def test_intermediate_features_are_open_clips(name: str) -> None:
    tower = ModifiedResNet(**cases.RESNET) if name == "resnet" else TimmModel(name, 24, 160)
    tower.load_state_dict(cases.weights(tower.state_dict()))
    tower.eval()
    image = cases.images(64 if name == "resnet" else 160)
    for case, kwargs in cases.INTERMEDIATES.items():
        expected = ANSWERS["intermediates"][f"{name}: {case}"]
        if kwargs.get("output_fmt") == "NLC" and name != "test_vit":
            with pytest.raises(ValueError, match=r"NCHW"):
                tower.forward_intermediates(image, **kwargs)
            continue
        with torch.no_grad():
            found = tower.forward_intermediates(image, **kwargs)
        if expected is not None:
            assert_like(found, expected, case)


@pytest.mark.parametrize("case", ANSWERS["locks"])
def test_locking_leaves_trainable_what_open_clip_does(case: str) -> None:
    name, unlocked = case.split()
    model = factory.create_model(name, text_cfg=dict(cases.TEXT))
    model.lock_image_tower(int(unlocked), freeze_bn_stats=True)
    trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    frozen = [key for key, module in model.named_modules() if "FrozenBatchNorm" in type(module).__name__]
    assert {
        "trainable": len(trainable),
        "digest": cases.digest(trainable),
        "frozen": len(frozen),
        "frozen_digest": cases.digest(frozen),
    } == ANSWERS["locks"][case]
