"""Tiles of the matrix of logits, and definitions that the losses over pairs share.

A batch of N pairs has N x N logits. They are never stored as a whole, neither in the forward nor in the backward: each
tile is computed, reduced (to sums of exponentials, or to gradients) and discarded.

Shapes: n is the number of pairs on this rank, N = n * world_size, D is the width of the embedding. Row i of the logits
belongs to image i, column j to text j, both counted over all ranks. Matrix products are computed in `Batch.dtype`,
everything else in float32 at least.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import device as devices
from ..utils import exact_dtype

MIN_HEIGHT = 1024  # of tiles that are narrower than the matrix; shorter ones make the products inefficient
ALIGNMENT = 128  # of the height, in rows


class Batch(NamedTuple):
    """Position of the local pairs in the global batch, and the variant of the loss."""

    rank: int
    world_size: int
    dtype: torch.dtype  # dtype of the matrix products
    local_loss: bool = False  # softmax: see loss.ClipLoss
    gather_with_grad: bool = False
    exchange: str = "bidir"  # sigmoid: see loss.SigLipLoss

    @property
    def distributed(self) -> bool:
        return self.world_size > 1


def own_rows(rank: int, count: int) -> slice:
    return slice(rank * count, (rank + 1) * count)


def exact_scalar(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of one element as [1] in the exact dtype of `dtype`.

    With this shape, a product with half precision is computed and stored in float32, in one operator. A tensor without
    dimensions would not take part in type promotion.
    """
    return value.detach().to(exact_dtype(dtype)).reshape(1)


def elements(device: torch.device) -> int:
    """Return the number of logits of a tile on this device."""
    return _elements(device)


# As torch.compiler.assume_constant_result does, but without importing torch._dynamo.
elements._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache
def _elements(device: torch.device) -> int:
    known = devices.DEVICES.get(device.type, devices.DEVICES["cpu"])
    return known.tile_elements(device.index)


def shape(rows: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Return (height, width) of the tiles of a matrix: as wide as the matrix, unless they would be too flat."""
    count = elements(device)
    if rows * columns <= count:
        return rows, columns
    height = min(rows, max(count // columns // ALIGNMENT * ALIGNMENT, MIN_HEIGHT))
    return height, min(columns, max(count // height, 1))


def spans(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def to_logits(cosines: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return cosines * scale (+ bias) in the dtype of `scale`: in place if the cosines have it already."""
    out = cosines if cosines.dtype == scale.dtype else None
    return torch.mul(cosines, scale, out=out) if bias is None else torch.addcmul(bias, cosines, scale, out=out)


def pairs_of_tile(tile: Tensor, rows: slice, columns: slice, first_column: int = 0) -> Tensor:
    """Return a view, possibly empty, of the elements of a tile for pairs: row i and column first_column + i."""
    return tile.diagonal(first_column + rows.start - columns.start)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`. The product is computed in the dtype of `right`, the sum in that of `total`."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left.to(right.dtype) @ right


def inner_product(features: Tensor, gradient: Tensor) -> Tensor:
    """Return the sum of features * gradient, both [n, D], without storing the product."""
    return torch.einsum("nd,nd->n", features.to(gradient.dtype), gradient).sum()
