"""Files of big_vision's SigLIP and SigLIP 2 for a NaFlex image tower give the features that big_vision computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flax_like
import open_clip
import tiny_clip

WIDTH, HEADS, PATCH, SIDE = 32, 2, 4, 5
CONFIG = {
    "embed_dim": WIDTH,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": PATCH * SIDE,
        "timm_model_name": "naflexvit_base_patch16_siglip",
        "timm_pool": "map",
        "timm_proj": "none",
        "timm_model_kwargs": {
            "embed_dim": WIDTH,
            "depth": 2,
            "num_heads": HEADS,
            "patch_size": PATCH,
            "pos_embed_grid_size": [SIDE, SIDE],
        },
    },
    "text_cfg": {
        "context_length": 6,
        "vocab_size": 64,
        "layers": 2,
        "width": WIDTH,
        "heads": HEADS,
        "pool_type": "last",
        "no_causal_mask": True,
        "proj_bias": True,
        "act_kwargs": {"approximate": "tanh"},
        "norm_kwargs": {"eps": 1e-6},
    },
}


def unit(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x / np.linalg.norm(x, axis=-1, keepdims=True)).float()


@pytest.mark.parametrize("kind", ["NaFlex", "fixed resolution"])
@torch.no_grad()
def test_features(tmp_path, kind):
    """A NaFlex file has a linear patch embedding and a grid of positions; the other one a convolution and a list."""
    arrays = flax_like.siglip(np.random.default_rng(0), WIDTH, HEADS, PATCH, positions=SIDE * SIDE)
    written = dict(arrays)
    if kind == "NaFlex":
        written["img/embedding/kernel"] = written["img/embedding/kernel"].reshape(-1, WIDTH)
        written["img/pos_embedding"] = written["img/pos_embedding"].reshape(SIDE, SIDE, WIDTH)
    np.savez(tmp_path / "x.npz", **{f"params/{name}": value for name, value in written.items()})
    name = tiny_clip.write_folder(tmp_path / "model", CONFIG)
    model = open_clip.create_model(name, pretrained=str(tmp_path / "x.npz")).eval()
    rng = np.random.default_rng(7)
    images = rng.normal(size=(2, PATCH * SIDE, PATCH * SIDE, 3)).astype(np.float32)
    ids = rng.integers(1, 64, (3, 6))
    found = model(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(ids))
    torch.testing.assert_close(found[0], unit(flax_like.siglip_image(images, arrays, 2)), rtol=0, atol=5e-6)
    torch.testing.assert_close(found[1], unit(flax_like.siglip_text(ids, arrays, 2)), rtol=0, atol=5e-6)
    assert model.logit_bias.item() == arrays["b"].item()


def test_a_naflex_file_for_another_tower_raises(tmp_path):
    arrays = flax_like.siglip(np.random.default_rng(0), WIDTH, HEADS, PATCH, positions=SIDE * SIDE)
    arrays["img/embedding/kernel"] = arrays["img/embedding/kernel"].reshape(-1, WIDTH)
    np.savez(tmp_path / "x.npz", **arrays)
    vision = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "none", "image_size": 160}
    name = tiny_clip.write_folder(tmp_path / "model", {**CONFIG, "embed_dim": 64, "vision_cfg": vision})
    with pytest.raises(RuntimeError, match=r"missing: .*patch_embed\.proj\.weight"):
        open_clip.create_model(name, pretrained=str(tmp_path / "x.npz"))
