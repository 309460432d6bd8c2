"""NaFlex image towers give the answers that open_clip 4 (main at 4.2.0.dev0) gave.

fixtures/open_clip_4/oracle_models.npz was recorded by running it. Its license is MIT. Weights and inputs are made by
the formulas of helpers/fill_rule.py.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fill_rule
import open_clip
from open_clip import ClipLoss
from open_clip.model import CLIP
from open_clip.packed_patches import pack_patches

FOLDER = Path(__file__).parent / "fixtures" / "open_clip_4"
CASES = json.loads((FOLDER / "oracle_models.json").read_text(encoding="utf-8"))
ANSWERS = np.load(FOLDER / "oracle_models.npz")
TOWERS = ["naflex_gap", "naflex_rope_registers"]
CONVERTED = "native_vit_for_conversion"
TEXT = fill_rule.texts("text", (16, 7, 3), 16, 1, 500, 0, 509)


def inputs() -> dict[str, Any]:
    ragged = fill_rule.patches("patches", [(4, 4), (2, 7), (1, 3)], 18, 192)
    return {
        "ragged": ragged,
        "ragged_without_padding": {name: value[1:2, :14] for name, value in ragged.items()},
        "square": fill_rule.patches("square", [(4, 4)] * 2, 16, 192),
        "dense": fill_rule.uniform("image", (2, 3, 32, 32)),
        "dense_wide": fill_rule.uniform("wide", (2, 3, 24, 48)),
    }


def build(case: str) -> Any:
    config = copy.deepcopy(CASES[case]["config"])
    model = fill_rule.fill(CLIP(**config).eval())
    shapes = {name: [list(x.shape), str(x.dtype).removeprefix("torch.")] for name, x in model.state_dict().items()}
    assert shapes == CASES[case]["state_dict"]
    return model


@pytest.mark.parametrize("case", TOWERS)
@pytest.mark.parametrize("name", list(inputs()))
def test_features(case, name):
    model = build(case)
    images = inputs()[name]
    with torch.no_grad():
        assert_close(model.visual(images), case, name)
        if isinstance(images, dict):
            assert model.visual.takes_packed_patches
            assert_close(model.visual(pack_patches(images)), case, name)


@pytest.mark.parametrize("case", TOWERS)
@pytest.mark.parametrize("is_packed", [False, True])
def test_logits_loss_and_gradients(case, is_packed):
    images = inputs()["ragged"]
    check_training(build(case), case, pack_patches(images) if is_packed else images)


def check_training(model: Any, case: str, images: Any) -> None:
    model.train()
    model.output_dict = True
    output = model(images, TEXT)
    logits = output["logit_scale"] * output["image_features"] @ output["text_features"].T
    assert_close(logits, case, "logits", 1e-4)
    loss = ClipLoss()(output["image_features"], output["text_features"], output["logit_scale"])
    assert_close(loss, case, "clip_loss")
    loss.backward()
    names = [key.split("grad.")[1] for key in ANSWERS.files if key.startswith(f"{case}/grad.")]
    assert names
    for name in names:
        assert_close(sampled(model.get_parameter(name).grad, 32), case, f"grad.{name}", 1e-4)


def sampled(x: torch.Tensor, number: int) -> torch.Tensor:
    return x.flatten()[:: max(1, x.numel() // number)][:number]


def assert_close(actual: torch.Tensor, case: str, name: str, tolerance: float = 2e-5) -> None:
    expected = torch.from_numpy(ANSWERS[f"{case}/{name}"])
    torch.testing.assert_close(actual.detach(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def native(tmp_path, monkeypatch):
    """The native model, a file with its weights, and the name of its configuration."""
    config = CASES[CONVERTED]["config"]
    (tmp_path / "small-vit.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(open_clip.config, "_registry", dict(open_clip.config._models()))
    monkeypatch.setattr(open_clip.config, "MODEL_CONFIG_PATHS", list(open_clip.config.MODEL_CONFIG_PATHS))
    open_clip.add_model_config(tmp_path / "small-vit.json")
    model = fill_rule.fill(CLIP(**copy.deepcopy(config)).eval())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return model, tmp_path / "weights.pt"


def test_conversion_of_a_native_model(native):
    model, weights = native
    converted = open_clip.create_model("small-vit", str(weights), force_naflex_vision=True).eval()
    shapes = {name: list(x.shape) for name, x in converted.state_dict().items() if name.startswith("visual.")}
    assert shapes == CASES[CONVERTED]["naflex_state_dict"]
    state_dict = converted.state_dict()
    for key in (key for key in ANSWERS.files if key.startswith(f"{CONVERTED}/sd.")):
        name = key.split("sd.")[1]
        assert_close(sampled(state_dict[name], 64), CONVERTED, f"sd.{name}", 1e-7)
    with torch.no_grad():
        assert_close(model.visual(inputs()["dense"]), CONVERTED, "native_dense")
        for name in ("dense", "dense_wide", "ragged"):
            assert_close(converted.visual(inputs()[name]), CONVERTED, f"naflex_{name}")
        packed = converted.visual(pack_patches(inputs()["ragged"]))
        assert_close(packed, CONVERTED, "naflex_ragged")
        torch.testing.assert_close(
            converted.visual(inputs()["dense"]), model.visual(inputs()["dense"]), rtol=1e-5, atol=1e-5
        )
