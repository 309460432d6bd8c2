"""Files of big_vision give the features that big_vision computes, as reimplemented in helpers/flax_like.py."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

import flax_like
import open_clip
import tiny_clip
from open_clip.convert import load_big_vision_weights

# numerics of JAX: tanh GELU, and the epsilon of flax
NUMERICS = {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}
CLIPA = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 24,
        "patch_size": 8,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "no_ln_pre": True,
        "pool_type": "avg",
        "final_ln_after_pool": True,
        **NUMERICS,
    },
    "text_cfg": {
        "context_length": 6,
        "vocab_size": 64,
        "layers": 2,
        "width": 32,
        "heads": 2,
        "pool_type": "last",
        "no_causal_mask": True,
        **NUMERICS,
    },
}

SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 96,
        "timm_model_name": "vit_base_patch32_siglip_256",
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {**CLIPA["text_cfg"], "width": 64, "heads": 4, "proj_bias": True},
}


def write(path, arrays, root="params/", stacked=False, compressed=False):
    """Save arrays as published files have them. `stacked`: one array for all blocks, as after training in a scan."""
    if stacked:
        first = [name for name in arrays if "encoderblock_0/" in name]
        for name in first:
            blocks = [arrays.pop(name.replace("block_0/", f"block_{number}/")) for number in range(2)]
            arrays[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(blocks)
    arrays = {f"{root}{name}": value for name, value in arrays.items()}
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return str(path)


def inputs(size=24, batch=2):
    rng = np.random.default_rng(7)
    return rng.normal(size=(batch, size, size, 3)).astype(np.float32), rng.integers(1, 64, (3, 6))


def unit(x):
    return torch.from_numpy(x / np.linalg.norm(x, axis=-1, keepdims=True)).float()


@torch.no_grad()
def check(model, images, ids, image_features, text_features, arrays):
    found = model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(ids))
    torch.testing.assert_close(found[0], unit(image_features), rtol=0, atol=2e-6)
    torch.testing.assert_close(found[1], unit(text_features), rtol=0, atol=2e-6)
    torch.testing.assert_close(found[2].reshape(1), torch.from_numpy(np.exp(arrays["t"])))


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("root", ["params/", ""])
@pytest.mark.parametrize("positions", ["fixed", "learned"])
def test_clipa(tmp_path, positions, root, custom_text):
    arrays = flax_like.clipa(np.random.default_rng(0), 32, 2, 8, learned_positions=10 if positions == "learned" else 0)
    path = write(tmp_path / "x.npz", dict(arrays), root, stacked=custom_text, compressed=root == "")
    name = tiny_clip.write_folder(tmp_path / "model", CLIPA)
    model = open_clip.create_model(name, pretrained=path, force_custom_text=custom_text)
    images, ids = inputs()
    expected = flax_like.clipa_image(images, arrays, 2), flax_like.clipa_text(ids, arrays, 2)
    check(model, images, ids, *expected, arrays)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    filled = open_clip.create_model(name, load_weights=False, force_custom_text=custom_text)
    assert load_big_vision_weights(filled, path) == ([], [])
    for key, value in model.state_dict().items():
        assert torch.equal(value, filled.state_dict()[key]), key


def test_a_convolution_with_a_bias_and_positions_without_the_class_token(tmp_path):
    """As in big_vision's towers with a class token. The native tower adds both to its position embedding."""
    arrays = flax_like.clipa(np.random.default_rng(0), 32, 2, 8, learned_positions=9)
    arrays["img/embedding/bias"] = np.linspace(-1, 1, 32, dtype=np.float32)
    path = write(tmp_path / "x.npz", dict(arrays))
    model = open_clip.create_model(tiny_clip.write_folder(tmp_path / "model", CLIPA), pretrained=path)
    table = np.concatenate([np.zeros((1, 32)), arrays["img/pos_embedding"][0] + arrays.pop("img/embedding/bias")])
    images, ids = inputs()
    arrays["img/pos_embedding"] = table[None]
    expected = flax_like.clipa_image(images, arrays, 2), flax_like.clipa_text(ids, arrays, 2)
    check(model, images, ids, *expected, arrays)


def test_fixed_positions_are_computed_for_the_grid_of_the_model(tmp_path):
    """CLIPA is fine-tuned at a higher resolution, for which the table is computed again, not resized."""
    arrays = flax_like.clipa(np.random.default_rng(0), 32, 2, 8)
    path = write(tmp_path / "x.npz", dict(arrays))
    name = tiny_clip.write_folder(tmp_path / "model", CLIPA)
    model = open_clip.create_model(name, pretrained=path, force_image_size=40)
    images, ids = inputs(40)
    expected = flax_like.clipa_image(images, arrays, 2), flax_like.clipa_text(ids, arrays, 2)
    check(model, images, ids, *expected, arrays)


@pytest.fixture
def small_timm_tower(monkeypatch):
    """Replace timm's SigLIP tower by one with narrow blocks, with the same name."""
    create = timm.create_model
    narrow = {"embed_dim": 64, "depth": 2, "num_heads": 4}
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **narrow, **kwargs))


@pytest.mark.parametrize("stacked", [False, True])
def test_siglip(tmp_path, small_timm_tower, stacked):
    arrays = flax_like.siglip(np.random.default_rng(0), 64, 4, 32, positions=9)
    path = write(tmp_path / "x.npz", dict(arrays), stacked=stacked)
    name = tiny_clip.write_folder(tmp_path / "model", SIGLIP)
    model = open_clip.create_model(name, pretrained=path)
    images, ids = inputs(96)
    check(model, images, ids, flax_like.siglip_image(images, arrays, 2), flax_like.siglip_text(ids, arrays, 2), arrays)
    assert model.logit_bias.item() == arrays["b"].item()
    filled = open_clip.create_model(name, load_weights=False)
    assert load_big_vision_weights(filled, path) == ([], [])
    for key, value in model.state_dict().items():
        assert torch.equal(value, filled.state_dict()[key]), key


@pytest.mark.parametrize(("tower", "side"), [("visual", "image"), ("text", "text")])
def test_one_tower(tmp_path, small_timm_tower, tower, side):
    arrays = flax_like.siglip(np.random.default_rng(0), 64, 4, 32, positions=9)
    path = write(tmp_path / "x.npz", arrays)
    name = tiny_clip.write_folder(tmp_path / "model", SIGLIP)
    whole = open_clip.create_model(name, pretrained=path).state_dict()
    part = open_clip.create_model(name, **{f"pretrained_{side}_path": path}).state_dict()
    for key, value in whole.items():
        assert torch.equal(part[key], value) == key.startswith(f"{tower}.") or not value.any(), key


def test_half_precision_of_jax(tmp_path):
    """NumPy has no bfloat16: a file contains two bytes without a type instead."""
    arrays = flax_like.clipa(np.random.default_rng(0), 32, 2, 8)
    halves = {key: torch.from_numpy(value).bfloat16() for key, value in arrays.items()}
    raw = {key: value.view(torch.int16).numpy().view("V2") for key, value in halves.items()}
    path = write(tmp_path / "x.npz", raw)
    model = open_clip.create_model(tiny_clip.write_folder(tmp_path / "model", CLIPA), pretrained=path)
    assert torch.equal(model.token_embedding.weight, halves["txt/Embed_0/embedding"].float())


def test_mismatches_are_named(tmp_path):
    arrays = flax_like.clipa(np.random.default_rng(0), 32, 2, 8)
    name = tiny_clip.write_folder(tmp_path / "model", CLIPA)
    arrays["img/head/bias"] = np.ones(16, np.float32)
    with pytest.raises(RuntimeError, match=r"1 unexpected: img/head/bias\."):
        open_clip.create_model(name, pretrained=write(tmp_path / "x.npz", dict(arrays)))
    del arrays["img/head/bias"], arrays["txt/Transformer/encoderblock_1/MultiHeadDotProductAttention_0/key/bias"]
    with pytest.raises(RuntimeError, match=r"1 missing: transformer.resblocks.1.attn.in_proj_bias\. 2 unexpected: tx"):
        open_clip.create_model(name, pretrained=write(tmp_path / "y.npz", dict(arrays)))
    other = write(tmp_path / "z.npz", {"weight": np.ones(2)}, root="")
    with pytest.raises(ValueError, match=r"not a big_vision model with two towers. It has weight"):
        load_big_vision_weights(open_clip.create_model(name), other)
