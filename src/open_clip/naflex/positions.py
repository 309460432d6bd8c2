"""Position tables of the grids of a batch, for towers that take images of any shape."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..packed_patches import Grid
from .resize import Interpolation, resize_axis, resize_grid

_KEPT = 64  # tables that are kept; with 1024 positions of width 768, 3 MB each


class PositionTables:
    """The learned and the rotary positions of a NaFlexVit of timm, for all places of several grids.

    A table is computed once for each distinct grid of a batch. In evaluation it is kept for later batches, if no gradient
    goes through it and the weights are unchanged.
    """

    def __init__(self) -> None:
        self.num_computed = 0  # tables of single grids, for tests and counters
        self._kept: dict[Hashable, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> PositionTables:
        return PositionTables()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PositionTables, ()

    def clear(self) -> None:
        """Forget the tables that are kept."""
        self._kept.clear()

    def learned(self, embeds: Any, grids: tuple[Grid, ...]) -> Tensor | None:
        """Return the learned positions of these grids, one after another, float32 [places, width].

        None: the model has none.
        """
        if embeds.pos_embed_type == "none":
            return None
        weights = [embeds.pos_embed] if embeds.pos_embed_type == "learned" else [embeds.pos_embed_y, embeds.pos_embed_x]
        needs_grad = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        # Fused optimizers change weights without a new version, and inference tensors have none.
        if embeds.training or needs_grad or any(weight.is_inference() for weight in weights):
            return self._join(None, grids, lambda grid: _learned_table(embeds, grid))
        state = tuple((weight.data_ptr(), weight._version, weight.device) for weight in weights)
        return self._join(("learned", state), grids, lambda grid: _learned_table(embeds, grid))

    def rotary(self, rope: Any, grids: tuple[Grid, ...]) -> Tensor:
        """Return the rotary positions (sine, cosine) of these grids, one after another, [places, 2 * head_dim]."""
        is_constant = not (rope.training and getattr(rope, "aug_active", False))
        key = ("rotary", tuple(buffer.device for buffer in rope.buffers())) if is_constant else None
        return self._join(key, grids, lambda grid: rope.get_embed(shape=list(grid)))

    def _join(self, key: Hashable, grids: tuple[Grid, ...], compute: Callable[[Grid], Tensor]) -> Tensor:
        """Join the tables of several grids. They are kept under `key`, unless it is None."""
        if key is None:
            self.num_computed += len(grids)
            tables = [compute(grid) for grid in grids]
        else:
            tables = [self._look_up((key, grid), grid, compute) for grid in grids]
        return tables[0] if len(tables) == 1 else torch.cat(tables)

    def _look_up(self, key: Hashable, grid: Grid, compute: Callable[[Grid], Tensor]) -> Tensor:
        table = self._kept.pop(key, None)
        if table is None:
            self.num_computed += 1
            # Not an inference tensor: later calls may need to save it for the backward pass.
            with torch.inference_mode(False), torch.no_grad():
                table = compute(grid)
            if len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
        self._kept[key] = table  # the last one used is at the end
        return table


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
    interpolation = Interpolation(
        embeds.pos_embed_interp_mode, embeds.pos_embed_antialias, embeds.pos_embed_align_corners
    )
    return resize_grid(table, grid, interpolation, keeps_aspect).flatten(0, 1)
