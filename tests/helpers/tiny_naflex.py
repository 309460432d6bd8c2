"""A small CLIP with a NaFlex image tower of timm, and images of several shapes as patches."""

from __future__ import annotations

from typing import Any

import torch

import tiny_clip

PATCH = 4
GRID = (5, 5)  # of the stored position embeddings


def config(vision: dict | None = None, **top: Any) -> dict[str, Any]:
    """Return a configuration with SigLIP 2's kind of image tower, for images of 20 x 20 pixels or 25 patches."""
    kwargs = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": PATCH, "pos_embed_grid_size": list(GRID)}
    tower = {
        "image_size": 20,
        "image_seq_len": 25,
        "timm_model_name": "naflexvit_base_patch16_siglip",
        "timm_pool": "map",
        "timm_proj": "none",
        "timm_model_kwargs": kwargs,
    }
    cfg = tiny_clip.config(custom_text=True, **top)
    return {**cfg, "vision_cfg": {**tower, **(vision or {})}}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Set weights that all affect the features. Initial weights are often zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if ("norm" in name or "ln_" in name) and name.endswith("weight"):
                parameter.add_(1)
            if name == "logit_scale":
                parameter.fill_(1.3)
    return model.eval()


def to_patches(images: torch.Tensor, places: int | None = None, patch: int = PATCH) -> dict[str, torch.Tensor]:
    """Divide images [batch, 3, height, width] into patches, with `places` places per image (default: no padding)."""
    batch, _, height, width = images.shape
    rows, columns = height // patch, width // patch
    count = rows * columns
    tiles = images.reshape(batch, 3, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    patches = torch.zeros(batch, places or count, patch * patch * 3)
    patches[:, :count] = tiles.reshape(batch, count, -1)
    coord = torch.zeros(batch, places or count, 2, dtype=torch.int64)
    coord[:, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    valid = torch.zeros(batch, places or count, dtype=torch.bool)
    valid[:, :count] = True
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}
