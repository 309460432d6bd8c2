"""Graphs of NaFlex image towers. A graph has one grid of patches, whose position embeddings are constants."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..naflex import NaFlexTower, image_grid
from ..utils import to_2tuple


def grid_of_image(visual: NaFlexTower) -> tuple[int, int]:
    """Return the rows and columns of patches of an image of the tower's size. The tower crops it to whole patches.

    Raises:
        ValueError: the image is smaller than a patch.
    """
    size, patch = to_2tuple(visual.image_size), visual.patch_size
    if size[0] < patch[0] or size[1] < patch[1]:
        raise ValueError(
            f"Images of {size[0]} x {size[1]} pixels are smaller than patches of {patch[0]} x {patch[1]}. Choose "
            "another --image-size."
        )
    return image_grid(size, patch, visual.trunk.embeds.dynamic_img_pad)


def with_fixed_grid(visual: nn.Module, grid: tuple[int, int]) -> nn.Module:
    """Return a shallow copy of the tower whose position embeddings are already interpolated to this grid."""
    trunk: Any = visual.trunk
    embeds = trunk.embeds
    if embeds.pos_embed is None or embeds.pos_embed.shape[1:3] == grid:
        return visual
    with torch.no_grad():
        table = embeds.pos_embed.new_zeros(1, grid[0] * grid[1], embeds.pos_embed.shape[-1])
        embeds._apply_learned_pos_embed(table, list(grid))  # adds the interpolated embeddings
    fixed = nn.Parameter(table.reshape(1, *grid, -1), requires_grad=False)
    embeds = _copy(embeds, parameters={"pos_embed": fixed})
    return _copy(visual, modules={"trunk": _copy(trunk, modules={"embeds": embeds})})


def _copy(
    module: nn.Module, modules: dict[str, nn.Module] | None = None, parameters: dict[str, nn.Parameter] | None = None
) -> nn.Module:
    """Return a shallow copy of a module with some children and parameters replaced."""
    part = copy.copy(module)
    part._modules = {**module._modules, **(modules or {})}
    part._parameters = {**module._parameters, **(parameters or {})}
    return part


class PatchesToImage(nn.Module):
    """Arrange patches [batch, rows * columns, height * width * 3] of one grid as images [batch, 3, height, width].

    The tower divides the images into the same patches again. This costs two copies and needs no coordinates or masks.
    """

    def __init__(self, grid: tuple[int, int], patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.patch_size = patch_size

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        (rows, columns), (height, width) = self.grid, self.patch_size
        tiles = patches.reshape(-1, rows, columns, height, width, 3)
        return tiles.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, rows * height, columns * width)
