"""Files saved for the hub equal those of open_clip_torch 3.3.0 byte for byte; see record/publishing.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import open_clip
import tiny_clip
from open_clip import push_pretrained_to_hf_hub
from open_clip.push_to_hf_hub import generate_readme, save_config_for_hf

RECORDED = json.loads((Path(__file__).parent / "fixtures/publishing_3.3.0.json").read_text(encoding="utf-8"))
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.mark.parametrize(("key", "preprocess_cfg"), [("config", PREPROCESS), ("config_by_default", {})])
def test_configuration(tmp_path, key, preprocess_cfg):
    model = open_clip.create_model(tiny_clip.folder(tmp_path, preprocess_cfg=preprocess_cfg))
    save_config_for_hf(model, tmp_path / "saved.json", tiny_clip.config())
    assert (tmp_path / "saved.json").read_text(encoding="utf-8") == RECORDED[key]


@pytest.mark.parametrize("i", range(len(RECORDED["readmes"])))
def test_readme(i):
    card, readme = RECORDED["readmes"][i]
    assert generate_readme(card, "NAME") == readme


@pytest.mark.parametrize(("key", "kwargs"), [("pushed", {}), ("pushed_tokenizer_self", {"hf_tokenizer_self": True})])
def test_configuration_of_a_tag(monkeypatch, key, kwargs):
    """OpenAI's weights use QuickGELU, which the name ViT-B-32 does not show."""
    pushed = {}
    push = push_pretrained_to_hf_hub.__globals__
    monkeypatch.setitem(push, "create_model_from_pretrained", lambda *_, **__: None)
    monkeypatch.setitem(push, "push_to_hf_hub", lambda model, tokenizer, config, *_, **__: pushed.update(config))
    push_pretrained_to_hf_hub("ViT-B-32", "openai", "org/name", token="a token", **kwargs)
    assert pushed == RECORDED[key]
