"""Checkpoints of a converted NaFlex tower, and models that are not built for them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import open_clip
import tiny_clip
from open_clip.checkpoint.mismatch import explain_mismatch

FORCE = "build the model with force_naflex_vision=True"
VISION = {
    "native": {},
    "timm": {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "token",
        "timm_model_kwargs": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    },
}


@pytest.fixture(params=VISION)
def model(request, tmp_path: Path) -> tuple[str, Path]:
    """Return the name of a model, and a checkpoint of the same model with a NaFlex tower."""
    cfg = tiny_clip.config(custom_text=True)
    cfg["vision_cfg"] = {**cfg["vision_cfg"], **VISION[request.param]}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}), encoding="utf-8")
    name, path = f"local-dir:{folder}", tmp_path / "epoch_1.pt"
    converted = open_clip.create_model(name, force_naflex_vision=True)
    torch.save({"epoch": 1, "state_dict": converted.state_dict()}, path)
    return name, path


def test_the_error_says_how_to_build_the_model(model) -> None:
    name, path = model
    with pytest.raises(RuntimeError, match=rf"image tower a NaFlex tower \(the model's: .*{FORCE}") as raised:
        open_clip.create_model(name, pretrained=path)
    assert "Build the model with the configuration" not in str(raised.value)  # which is what it was built with
    open_clip.create_model(name, pretrained=path, force_naflex_vision=True)


def test_the_file_of_a_tower(model, request, caplog) -> None:
    name, path = model
    if "native" in request.node.name:
        with pytest.raises(RuntimeError, match=f"has no weights of this visual tower: .*{FORCE}"):
            open_clip.create_model(name, pretrained_image_path=path)
    else:  # some names are those of timm's tower
        open_clip.create_model(name, pretrained_image_path=path)
        assert re.search(f"only in part: .*{FORCE}", caplog.text)
    caplog.clear()
    open_clip.create_model(name, pretrained_image_path=path, force_naflex_vision=True)
    assert "only in part" not in caplog.text


def test_warnings_without_an_explanation_end_with_the_differences(tmp_path: Path, caplog) -> None:
    tower = open_clip.CLIP(**tiny_clip.config()).visual
    weights = tower.state_dict()
    del weights["ln_post.bias"]
    torch.save(weights, tmp_path / "tower.pt")
    name = tiny_clip.folder(tmp_path / "model")
    open_clip.create_model(name, pretrained_image_path=tmp_path / "tower.pt")
    assert "only in part: 1 missing: visual.ln_post.bias.\n" in caplog.text


def test_an_architecture_with_a_naflex_tower_is_suggested() -> None:
    with torch.device("meta"):
        theirs, ours = (open_clip.create_model(name, device="meta") for name in ("naflex_ViT-B-32", "ViT-B-32"))
    explanation = explain_mismatch(theirs.state_dict(), ours.state_dict())
    assert FORCE in explanation
    assert "these have such towers: naflex_ViT-B-16, naflex_ViT-B-32." in explanation
    assert FORCE not in explain_mismatch(ours.state_dict(), theirs.state_dict())
