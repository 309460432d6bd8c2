"""ViT-*-SigLIP2-naflex: tokenizer, preprocessing and weights from the hub, for a small model of this name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import hf_cases
import main_models
import open_clip
import tiny_naflex
from hub_server import use_hub
from open_clip import config
from open_clip.recipe import check_untrusted

NAMES = ["ViT-B-16-SigLIP2-naflex", "ViT-SO400M-16-SigLIP2-naflex"]
TOKENIZERS = {NAMES[0]: "timm/ViT-B-16-SigLIP2-256", NAMES[1]: "timm/ViT-SO400M-16-SigLIP2-256"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = use_hub(monkeypatch, tmp_path / "cache")
    yield hub
    hub.close()


@pytest.fixture
def small(monkeypatch):
    """Replace the towers of the first model by small ones. The rest of its configuration stays."""
    cfg = config.get_model_config(NAMES[0])
    kwargs = copy.deepcopy(tiny_naflex.config()["vision_cfg"]["timm_model_kwargs"])
    cfg["embed_dim"] = kwargs["embed_dim"] = 32
    cfg["vision_cfg"] |= {"image_size": 24, "image_seq_len": 36, "timm_model_kwargs": kwargs}
    cfg["text_cfg"] |= {"width": 32, "heads": 2, "layers": 1, "vocab_size": 64}
    monkeypatch.setitem(config._models(), NAMES[0], cfg)
    return NAMES[0]


@pytest.mark.parametrize(
    ("section", "options"),
    [
        ("timm_model_kwargs", {"checkpoint_path": "weights.pt"}),
        ("timm_model_kwargs", {"pretrained": True}),
        ("timm_model_kwargs", {"pretrained_cfg_overlay": {"file": "weights"}}),
        ("timm_model_kwargs", {"cache_dir": "x"}),
        ("timm_model_kwargs", {"block_fn": "https://example.org/x"}),
        ("timm_model_kwargs", {"depths": [1, {"a": "../x"}]}),
        ("timm_model_kwargs", "x"),
        ("hf_model_config", {"_attn_implementation": "eager"}),
        ("hf_model_config", {"attn_implementation": "org/kernel"}),
    ],
)
def test_a_configuration_from_the_hub_may_not_name_files(section, options):
    cfg = tiny_naflex.config()
    cfg["vision_cfg" if section.startswith("timm") else "text_cfg"][section] = options
    with pytest.raises(ValueError, match=rf"hub:x has {section}"):
        check_untrusted(cfg, "hub:x")


def test_the_options_of_bundled_models_are_accepted():
    for name in main_models.BUILT:
        check_untrusted(config.get_model_config(name), name)
    check_untrusted(tiny_naflex.config(), "hub:x")


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer(hub, tmp_path, name):
    folder = Path(hf_cases.write_tokenizer(tmp_path, "words"))
    hub.put(TOKENIZERS[name], {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    tokenizer = open_clip.get_tokenizer(name)
    ids = tokenizer(["A DOG!", "a dog"])
    assert ids.shape == (2, 64)
    assert torch.equal(ids[0], ids[1])  # capitals and punctuation are removed


def test_random_weights_start_with_the_logit_bias_of_siglip(small):
    model = open_clip.create_model(small)
    assert model.logit_bias.item() == -10
    assert model.visual.trunk.embeds.pos_embed_interp_mode == "bilinear"
    assert model.visual.trunk.attn_pool is not None


def test_weights_and_preprocessing_of_the_tag(hub, small):
    weights = tiny_naflex.randomise(open_clip.create_model(small)).state_dict()
    hub.put(f"timm/{small}", {"open_clip_model.safetensors": save(weights)})
    model, _, preprocess = open_clip.create_model_and_transforms(small, pretrained="webli")
    for key, value in weights.items():
        assert torch.equal(model.state_dict()[key], value), key
    cfg = open_clip.get_model_preprocess_cfg(model)
    assert tuple(cfg["mean"]) == tuple(cfg["std"]) == (0.5, 0.5, 0.5)
    assert (cfg["interpolation"], cfg["resize_mode"]) == ("bicubic", "squash")  # as in the main branch's registry
    assert preprocess is not None
    batch = tiny_naflex.to_patches(torch.randn(1, 3, 12, 32), places=36)
    assert model.eval().encode_image(batch).shape == (1, 32)
