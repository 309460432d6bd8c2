"""Checkpoints of open_clip_torch 3.3.0 give the same features here, and it loads ours; see record/loading.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import open_clip
import tiny_clip
from training.checkpoint.state import TrainState

FIXTURES = Path(__file__).parent / "fixtures"
FEATURES = json.loads((FIXTURES / "loading_features.json").read_text(encoding="utf-8"))
DEFAULTS = json.loads((FIXTURES / "loading_defaults.json").read_text(encoding="utf-8"))
VARIANTS = {
    "plain": {},
    "custom text": {"force_custom_text": True},
    "larger image": {"force_image_size": 48},
    "shorter text": {"force_context_length": 8},
    "with a bias": {"init_logit_bias": -10.0},
    "quick gelu": {"force_quick_gelu": True},
}


def features(model: torch.nn.Module, **kwargs: int) -> dict[str, torch.Tensor]:
    images, texts = tiny_clip.inputs(kwargs.get("force_image_size", 32), kwargs.get("force_context_length", 12))
    model.eval().output_dict = True
    with torch.no_grad():
        return model(images, texts)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("writer", ["theirs", "ours"])
def test_features_of_a_training_checkpoint(tmp_path, writer, variant):
    """Both for a model on the meta device and for an existing model."""
    name, path, kwargs = tiny_clip.folder(tmp_path), FIXTURES / f"loading_{writer}.pt", VARIANTS[variant]
    filled = open_clip.create_model(name, load_weights=False, **kwargs)
    assert open_clip.load_checkpoint(filled, path) == ([], [])
    recorded = {key: torch.tensor(value) for key, value in FEATURES[writer][variant].items()}
    for model in (filled, open_clip.create_model(name, pretrained=str(path), **kwargs)):
        found = features(model, **kwargs)
        assert found.keys() == recorded.keys()
        for key in recorded:
            torch.testing.assert_close(found[key], recorded[key], rtol=2e-5, atol=2e-6)


def test_the_variants_differ():
    """Otherwise the comparison above would prove little."""
    plain = FEATURES["theirs"]["plain"]["image_features"]
    keys = {"larger image": "image_features", "shorter text": "text_features", "quick gelu": "image_features"}
    for variant, key in keys.items():
        other = torch.tensor(FEATURES["theirs"][variant][key])
        assert (other - torch.tensor(FEATURES["theirs"]["plain"][key])).abs().max() > 1e-4, variant
    assert plain != FEATURES["ours"]["plain"]["image_features"]
    assert FEATURES["theirs"]["with a bias"]["logit_bias"] == 0


@pytest.mark.parametrize("writer", ["theirs", "ours"])
def test_training_resumes_from_it(tmp_path, writer):
    """The moments of the optimizer equal those of the file for each parameter."""
    checkpoint = torch.load(FIXTURES / f"loading_{writer}.pt", weights_only=True)
    model = open_clip.create_model(tiny_clip.folder(tmp_path))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = TrainState(model=model, device=torch.device("cpu"), parts={"optimizer": optimizer}, steps_per_epoch=2)
    state.load_state_dict(checkpoint)
    assert state.epoch == 1
    moments = [checkpoint["optimizer"]["state"][i]["exp_avg"] for i in range(len(list(model.parameters())))]
    for parameter, moment in zip(model.parameters(), moments, strict=True):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)


def test_registry_of_weights():
    added = {"ViT-B-16-SigLIP2-naflex:webli", "ViT-SO400M-16-SigLIP2-naflex:webli"}  # of the main branch
    assert [pair for pair in open_clip.list_pretrained(as_str=True) if pair not in added] == DEFAULTS["list_pretrained"]
    assert open_clip.list_openai_models() == DEFAULTS["openai_models"]
    for tag, cfg in DEFAULTS["tags"].items():
        assert json.loads(json.dumps(open_clip.get_pretrained_cfg("ViT-B-32", tag))) == cfg, tag
        assert open_clip.is_pretrained_cfg("ViT-B-32", tag) == bool(cfg)
    for tag, models in DEFAULTS["models_by_tag"].items():
        found = [model for model in open_clip.list_pretrained_models_by_tag(tag) if not model.endswith("-naflex")]
        assert found == models, tag


def test_preprocessing_of_a_folder(tmp_path):
    """Values of the folder replace the defaults. The size is always that of the model."""
    cfg = {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear", "size": 99}
    model = open_clip.create_model(tiny_clip.folder(tmp_path, preprocess_cfg=cfg))
    assert json.loads(json.dumps(open_clip.get_model_preprocess_cfg(model))) == DEFAULTS["preprocess_cfg"]


@pytest.mark.parametrize("changes", DEFAULTS["losses"])
def test_the_loss_for_training_options(changes):
    args = {
        "distill": False,
        "siglip": False,
        "model": "ViT-B-32",
        "local_loss": False,
        "gather_with_grad": False,
        "rank": 0,
        "world_size": 1,
        "horovod": False,
        "loss_dist_impl": None,
        "coca_caption_loss_weight": 2.0,
        "coca_contrastive_loss_weight": 1.0,
        **json.loads(changes),
    }
    loss = open_clip.create_loss(SimpleNamespace(**args))
    recorded = DEFAULTS["losses"][changes]
    assert type(loss).__name__ == recorded["class"]
    attributes = {key: value for key, value in recorded["attributes"].items() if hasattr(loss, key)}
    assert {key: getattr(loss, key) for key in attributes} == attributes
    assert {"rank", "world_size"} <= attributes.keys()
