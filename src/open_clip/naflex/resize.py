"""Resizing of position tables and patch embeddings, as products with small matrices.

torch's interpolation of a grid is a product with one matrix per axis. The matrices depend on the sizes alone, so they
are computed once and kept, and the gradient is a product too: it needs no atomic additions, so it is reproducible on
every device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """How a position table is resized; the arguments of `torch.nn.functional.interpolate`."""

    mode: str = "bicubic"
    antialias: bool = True
    align_corners: bool = False


def resize_grid(
    table: Tensor, grid: tuple[int, int], interpolation: Interpolation, keeps_aspect: bool = False
) -> Tensor:
    """Resize a table of position embeddings.

    Args:
        table: float [rows, columns, width].
        grid: the new numbers of rows and columns.
        keeps_aspect: resize to a square with the longer side of `grid`, and cut that.

    Returns:
        float32 [new rows, new columns, width].
    """
    rows, columns = (max(grid), max(grid)) if keeps_aspect else grid
    with _no_autocast(table):
        by_row = _look_up(axis_matrix, table.shape[0], rows, interpolation, table.device)[: grid[0]]
        by_column = _look_up(axis_matrix, table.shape[1], columns, interpolation, table.device)[: grid[1]]
        resized = torch.einsum("rR,RCd->rCd", by_row, table.float())
        return torch.einsum("cC,rCd->rcd", by_column, resized)


def resize_axis(table: Tensor, length: int, axis_length: int) -> Tensor:
    """Resize a table of position embeddings along one axis, linearly.

    Args:
        table: float [positions, width].
        length: how many of the new positions are returned.
        axis_length: the new number of positions.
    """
    matrix = _look_up(axis_matrix, table.shape[0], axis_length, Interpolation("linear", antialias=False), table.device)
    with _no_autocast(table):
        return matrix[:length] @ table.float()


def resize_patch_weight(weight: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str) -> Tensor:
    """Resize the weight of a linear patch embedding for patches of another size (https://arxiv.org/abs/2212.08013).

    A patch that is resized to the old size has the same embedding, as well as that is possible: the weight is
    multiplied by the pseudo-inverse of the resizing.

    Args:
        weight: [width, old height * old width * channels].
        old, new: (height, width) in pixels.
        mode: interpolation, "bicubic" or "bilinear".

    Returns:
        [width, new height * new width * channels].
    """
    if old == new:
        return weight
    matrix = _look_up(patch_matrix, old, new, mode, weight.device)
    with _no_autocast(weight):
        by_pixel = weight.float().unflatten(1, (old[0] * old[1], -1))
        return torch.einsum("dpc,pq->dqc", by_pixel, matrix).flatten(1).to(weight.dtype)


def resize_patches(patches: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str) -> Tensor:
    """Convert patches so that a linear layer gives them the embedding that its weight from `resize_patch_weight` gives.

    Args:
        patches: [..., new height * new width * channels].
        old, new, mode: as in `resize_patch_weight`.

    Returns:
        [..., old height * old width * channels].
    """
    matrix = _look_up(patch_matrix, old, new, mode, patches.device)
    with _no_autocast(patches):
        by_pixel = patches.float().unflatten(-1, (new[0] * new[1], -1))
        return torch.einsum("pq,...qc->...pc", matrix, by_pixel).flatten(-2).to(patches.dtype)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    if x.is_meta:  # the meta device has no autocast
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


@contextlib.contextmanager
def _constant() -> Iterator[None]:
    """Context for tensors on the CPU that are kept and used in any other context."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def has_dispatch_mode() -> bool:
    """Whether operators may return tensors without values, as in a FakeTensorMode. Such tensors must not be kept."""
    return not torch.compiler.is_compiling() and bool(_get_current_dispatch_mode_stack())


def _look_up(compute: functools._lru_cache_wrapper[Tensor], *args: Any) -> Tensor:
    return (compute.__wrapped__ if has_dispatch_mode() else compute)(*args)


@functools.lru_cache(maxsize=4096)
def axis_matrix(old: int, new: int, interpolation: Interpolation, device: torch.device) -> Tensor:
    """Return the matrix that interpolates `old` values to `new` ones, float32 [new, old]."""
    with _constant():
        basis = torch.eye(old, device="cpu")
        if interpolation.mode == "linear":
            matrix = F.interpolate(basis[None], size=new, mode="linear", align_corners=interpolation.align_corners)[0].T
        else:
            matrix = F.interpolate(
                basis[None, None],
                size=(new, old),
                mode=interpolation.mode,
                antialias=interpolation.antialias,
                align_corners=interpolation.align_corners,
            )[0, 0]
        return matrix.contiguous().to(device)


@functools.lru_cache(maxsize=256)
def patch_matrix(old: tuple[int, int], new: tuple[int, int], mode: str, device: torch.device) -> Tensor:
    """Return the pseudo-inverse of the resizing of patches, float32 [old pixels, new pixels]."""
    with _constant():
        basis = torch.eye(old[0] * old[1], device="cpu").reshape(-1, 1, *old)
        resized = F.interpolate(basis, size=new, mode=mode, antialias=True, align_corners=False)
        return torch.linalg.pinv(resized.flatten(1).T).to(device)
