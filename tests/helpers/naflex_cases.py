"""Small NaFlex towers of many kinds, and padded images of several sizes."""

from __future__ import annotations

from typing import Any

import torch

from open_clip.naflex import NaFlexTower

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "pos_embed_grid_size": [4, 4]}
GAP, MAP, SIGLIP = "naflexvit_base_patch16_gap", "naflexvit_base_patch16_map", "naflexvit_base_patch16_siglip"
ROPE = {"pos_embed": "none", "rope_type": "axial", "pre_norm": True}
# name of the model of timm, pooling, options
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gap": (GAP, "avg", {}),
    "map": (MAP, "map", {}),
    "siglip": (SIGLIP, "map", {}),
    "token": (GAP, "token", {"class_token": True, "reg_tokens": 2, "fc_norm": False}),
    "prefix_in_mean": (GAP, "avg", {"class_token": True, "pool_include_prefix": True}),
    "prefix_in_map": (MAP, "map", {"class_token": True, "pool_include_prefix": True}),
    "rope": (GAP, "avg", {**ROPE, "init_values": 0.1}),
    "rope_half": (GAP, "avg", {**ROPE, "rope_rotate_half": True, "qk_norm": True}),
    "rope_and_learned": (MAP, "map", {**ROPE, "pos_embed": "learned", "attn_gated": True}),
    "rope_reference": (GAP, "avg", {**ROPE, "rope_ref_feat_shape": [4, 4]}),
    "dinov3": (GAP, "avg", {**ROPE, "rope_type": "dinov3", "rope_rotate_half": True}),
    "grouped_heads": (GAP, "avg", {**ROPE, "num_kv_heads": 1, "qkv_fused": False}),
    "eva": (GAP, "avg", {"attn_type": "eva", "swiglu_mlp": True, "scale_attn_inner_norm": True}),
    "swiglu": (MAP, "map", {"swiglu_mlp": True, "attn_pool_mlp_ratio": 2.0, "mlp_ratio": 2.5}),
    "qk_norm": (GAP, "avg", {"qk_norm": True, "scale_mlp_norm": True, "scale_attn_inner_norm": True}),
    "keeps_aspect": (GAP, "avg", {"pos_embed_ar_preserving": True}),
    "factorized": (GAP, "avg", {"pos_embed": "factorized"}),
    "factorized_keeps_aspect": (GAP, "avg", {"pos_embed": "factorized", "pos_embed_ar_preserving": True}),
    "corners": (GAP, "avg", {"pos_embed_align_corners": True, "pos_embed_antialias": False}),
    "key_mask": (GAP, "avg", {"use_key_only_attn_mask": True}),
}
GRIDS = [(4, 4), (2, 7), (1, 3), (4, 4), (5, 3)]


def make_tower(variant: str = "gap", **options: Any) -> NaFlexTower:
    torch.manual_seed(0)
    name, pool, more = VARIANTS[variant]
    tower = NaFlexTower(name, 16, 16, pool=pool, model_kwargs={**SIZES, **more, **options})
    for parameter in tower.parameters():  # so that nothing is zero
        parameter.data += 0.2 * torch.randn_like(parameter)
    return tower.eval()


def make_images(grids: list[tuple[int, int]], patch_size: int = 4, extra: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    total = max(rows * columns for rows, columns in grids) + extra
    images = {
        "patches": torch.zeros(len(grids), total, patch_size * patch_size * 3),
        "patch_coord": torch.zeros(len(grids), total, 2, dtype=torch.int64),
        "patch_valid": torch.zeros(len(grids), total, dtype=torch.bool),
    }
    for number, (rows, columns) in enumerate(grids):
        count = rows * columns
        images["patches"][number, :count] = torch.randn(count, patch_size * patch_size * 3)
        images["patch_coord"][number, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        images["patch_valid"][number, :count] = True
    return images


def features_and_gradients(tower: Any, images: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tower.zero_grad()
    features = tower(images)
    features.backward(torch.linspace(-1, 1, features.numel()).view_as(features).to(features))
    return features.detach(), {name: p.grad.clone() for name, p in tower.named_parameters()}


def assert_equal(actual: tuple, expected: tuple) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().clamp(min=1)
        torch.testing.assert_close(actual[1][name] / scale, gradient / scale, rtol=1e-5, atol=1e-5, msg=name)
