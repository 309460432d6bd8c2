"""Position embeddings: fixed sine-cosine tables, and resizing of learned tables to another grid or context length."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .utils import to_2tuple

logger = logging.getLogger(__name__)


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False) -> np.ndarray:
    """Compute the sine-cosine embedding of a grid.

    The first half of the channels encodes the column, the second half the row.

    Args:
        embed_dim: number of channels, a multiple of 4.
        grid_size: height and width of the grid, in patches.
        cls_token: whether to prepend a row of zeros.

    Returns:
        float64 array [grid height * width (+ 1), embed_dim].
    """
    height, width = to_2tuple(grid_size)
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
    table = get_2d_sincos_pos_embed_from_grid(embed_dim, np.stack([columns, rows]))
    if cls_token:
        table = np.concatenate([np.zeros((1, embed_dim)), table])
    return table


def get_2d_sincos_pos_embed_from_grid(embed_dim: int, grid: np.ndarray) -> np.ndarray:
    """Embed two coordinate arrays, with half of the channels each: [2, ...] -> float64 [positions, embed_dim].

    Raises:
        ValueError: `embed_dim` is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"A 2-D sine-cosine embedding needs a width that is a multiple of 4, got {embed_dim}.")
    halves = [get_1d_sincos_pos_embed_from_grid(embed_dim // 2, coordinates) for coordinates in grid]
    return np.concatenate(halves, axis=1)


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: np.ndarray) -> np.ndarray:
    """Compute sines, then cosines, of positions at wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al. 2017, 3.5).

    Args:
        embed_dim: number of channels, even.
        pos: positions, of any shape.

    Returns:
        float64 array [pos.size, embed_dim].

    Raises:
        ValueError: `embed_dim` is odd.
    """
    if embed_dim % 2:
        raise ValueError(f"A sine-cosine embedding needs an even width, got {embed_dim}.")
    frequencies = 10000.0 ** (-np.arange(embed_dim // 2, dtype=np.float64) / (embed_dim / 2.0))
    angles = np.asarray(pos, dtype=np.float64).reshape(-1, 1) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _resize_grid(
    grid: torch.Tensor, old: tuple[int, int], new: tuple[int, int], interpolation: str, antialias: bool
) -> torch.Tensor:
    """Resize a grid of embeddings: [old height * width, channels] -> [new height * width, channels]."""
    # The antialiased CPU kernel does not support half precision.
    image = grid.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size=new, mode=interpolation, antialias=antialias, align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(grid.dtype)


def interpolate_pos_embed(model: Any, checkpoint_model: dict[str, torch.Tensor]) -> None:
    """Resize `checkpoint_model["pos_embed"]` in place to the square grid of `model`, for ViTs like those of MAE.

    Args:
        model: has `patch_embed.num_patches` and `pos_embed` [1, tokens, channels].
        checkpoint_model: state dict. It is unchanged if it has no "pos_embed" or the sizes agree.
    """
    table = checkpoint_model.get("pos_embed")
    if table is None:
        return
    num_patches = model.patch_embed.num_patches
    num_extra = model.pos_embed.shape[-2] - num_patches
    old, new = math.isqrt(table.shape[-2] - num_extra), math.isqrt(num_patches)
    if old == new:
        return
    logger.info("Position embedding resized from %dx%d to %dx%d.", old, old, new, new)
    extra, grid = table[0, :num_extra], table[0, num_extra:]
    grid = _resize_grid(grid, (old, old), (new, new), "bicubic", antialias=False)
    checkpoint_model["pos_embed"] = torch.cat([extra, grid])[None]


def resize_pos_embed(
    state_dict: dict[str, torch.Tensor],
    model: nn.Module,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> None:
    """Resize the image tower's position embedding in `state_dict`, in place, to the grid of `model.visual`.

    The state dict is unchanged if it has no such embedding, the tower has no grid, or the sizes agree. A tower with
    other position parameters (ResNet, timm) has a method `resize_pos_embed(state_dict, prefix)` that resizes them.
    """
    method: Any = getattr(model.visual, "resize_pos_embed", None)
    if method is not None:
        method(state_dict, prefix="visual.")
        return
    grid_size = getattr(model.visual, "grid_size", None)
    if grid_size is not None:
        resize_table(state_dict, "visual.positional_embedding", to_2tuple(grid_size), interpolation, antialias)


def resize_table(
    state_dict: dict[str, torch.Tensor],
    key: str,
    new: tuple[int, int],
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> None:
    """Resize the table `state_dict[key]` [1 + positions, channels] in place to the grid `new` (height, width).

    The first row belongs to the class token or to the mean of the patches, and is not resized.

    Raises:
        ValueError: the grid of the table is not square.
    """
    table = state_dict.get(key)
    num_extra = 1
    if table is None or table.shape[0] == new[0] * new[1] + num_extra:
        return
    extra, grid = table[:num_extra], table[num_extra:]
    side = math.isqrt(len(grid))
    if side * side != len(grid):
        raise ValueError(
            f"{key} has {len(grid)} positions, which is not a square grid, and the model has {new[0]}x{new[1]}. "
            "Only square grids can be resized."
        )
    logger.info("Image position embedding resized from %dx%d to %dx%d.", side, side, *new)
    state_dict[key] = torch.cat([extra, _resize_grid(grid, (side, side), new, interpolation, antialias)])


def resize_text_pos_embed(
    state_dict: dict[str, torch.Tensor],
    model: nn.Module,
    interpolation: str = "linear",
    antialias: bool = False,
) -> None:
    """Resize the text tower's position embedding in `state_dict`, in place, to the context length of `model`.

    Raises:
        ValueError: the widths differ, so the checkpoint belongs to another model.
    """
    key = next((k for k in ("positional_embedding", "text.positional_embedding") if k in state_dict), None)
    target = getattr(model, "positional_embedding", None)
    if target is None:
        target = getattr(getattr(model, "text", None), "positional_embedding", None)
    if key is None or target is None:
        return
    table = state_dict[key]
    if table.shape[1] != target.shape[1]:
        raise ValueError(
            f"{key} has the width {table.shape[1]}, and the model has {target.shape[1]}: these weights belong to "
            "another model. Choose the architecture that they were trained with."
        )
    if table.shape[0] == target.shape[0]:
        return
    logger.info("Text position embedding resized from %d to %d.", table.shape[0], target.shape[0])
    rows = table.float().T[None]  # [1, channels, positions]
    rows = F.interpolate(rows, size=target.shape[0], mode=interpolation, antialias=antialias, align_corners=False)
    state_dict[key] = rows[0].T.contiguous().to(table.dtype)
