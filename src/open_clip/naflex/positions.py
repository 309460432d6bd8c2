"""Position tables of the grids of a batch, for towers that take images of any shape."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..packed_patches import Grid
from .resize import Interpolation, has_dispatch_mode, resize_axis, resize_grid

_KEPT = 64  # tables that are kept; with 1024 positions of width 768, 3 MB each


class PositionTables:
    """The learned and the rotary positions of a NaFlexVit of timm, for all places of several grids.

    A table is computed once for each distinct grid of a batch. Rotary positions are kept for later batches. Learned
    ones are not: `parameter.data.copy_(...)` changes weights without a trace, and the tables cost little.
    """

    def __init__(self) -> None:
        self.num_computed = 0  # tables of single grids, for tests and counters
        self._kept: dict[Hashable, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> PositionTables:
        return PositionTables()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PositionTables, ()

    def learned(self, embeds: Any, grids: tuple[Grid, ...]) -> Tensor | None:
        """Return the learned positions of these grids, one after another, float32 [places, width].

        None: the model has none.
        """
        if embeds.pos_embed_type == "none":
            return None
        self.num_computed += len(grids)
        return _join([_learned_table(embeds, grid) for grid in grids])

    def rotary(self, rope: Any, grids: tuple[Grid, ...]) -> Tensor:
        """Return the rotary positions (sine, cosine) of these grids, one after another, [places, 2 * head_dim]."""
        if has_dispatch_mode() or (rope.training and getattr(rope, "aug_active", False)):
            self.num_computed += len(grids)
            return _join([rope.get_embed(shape=list(grid)) for grid in grids])
        key = tuple((buffer.device, buffer.dtype) for buffer in rope.buffers())  # their values are constants
        return _join([self._look_up((key, grid), rope, grid) for grid in grids])

    def _look_up(self, key: Hashable, rope: Any, grid: Grid) -> Tensor:
        table = self._kept.pop(key, None)
        if table is None:
            self.num_computed += 1
            # Not an inference tensor: later calls may need to save it for the backward pass.
            with torch.inference_mode(False), torch.no_grad():
                table = rope.get_embed(shape=list(grid))
            if len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
        self._kept[key] = table  # the last one used is at the end
        return table


def interpolation_of(embeds: Any) -> Interpolation:
    """Return how a NaFlexEmbeds of timm resizes its table of positions."""
    return Interpolation(embeds.pos_embed_interp_mode, embeds.pos_embed_antialias, embeds.pos_embed_align_corners)


def _join(tables: list[Tensor]) -> Tensor:
    return tables[0] if len(tables) == 1 else torch.cat(tables)


def _learned_table(embeds: Any, grid: Grid) -> Tensor:
    keeps_aspect = embeds.pos_embed_ar_preserving
    if embeds.pos_embed_type == "factorized":
        rows, columns = (max(grid), max(grid)) if keeps_aspect else grid
        by_row = resize_axis(embeds.pos_embed_y[0], grid[0], rows)
        by_column = resize_axis(embeds.pos_embed_x[0], grid[1], columns)
        return (by_row[:, None] + by_column[None]).flatten(0, 1)
    table = embeds.pos_embed[0]
    if tuple(table.shape[:2]) == grid:
        return table.flatten(0, 1).float()
    return resize_grid(table, grid, interpolation_of(embeds), keeps_aspect).flatten(0, 1)
