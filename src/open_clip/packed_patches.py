"""Patches of images of different sizes, one image after another, without padding.

A batch of images of any shape is padded to the one with the most patches, {"patches": [B, N, ...], "patch_coord":
int [B, N, 2], "patch_valid": bool [B, N]}, or packed: the valid patches of all images in one list of T patches (NaViT,
https://arxiv.org/abs/2307.06304).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .packing import Segments, pack, unpack

Grid = tuple[int, int]  # rows and columns of patches
PADDED = ("patches", "patch_coord", "patch_valid")  # the entries of padded images
_MAX_PLACES = 2**20  # of a grid: 1024 x 1024 patches


@dataclasses.dataclass(frozen=True, eq=False)
class PackedPatches:
    """The patches of a batch of images, one image after another.

    Attributes:
        patches: [T, P * P * 3] or [T, P, P, 3], values in the order (row, column, channel).
        coord: int64 [T, 2], the row and column of each patch in the grid of its image.
        segments: which patches belong to which image.
        patch_size: (height, width) in pixels. None: that of the model, or as `patches` says.
        grids: the distinct grids (rows, columns) of the batch, in the order of their first image.
        place: int64 [T], the index of each patch in a table of the positions of all `grids`, one after another.

    `grids` and `place` are computed from `coord` if they are not given. This waits for the device if `coord` is there.
    """

    patches: Tensor
    coord: Tensor
    segments: Segments
    patch_size: tuple[int, int] | None = None
    grids: tuple[Grid, ...] = ()
    place: Tensor | None = None
    _layouts: dict[int, PrefixLayout] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.patches.shape[0] != self.segments.total or self.coord.shape != (self.segments.total, 2):
            raise ValueError(
                f"Packed patches of shape {list(self.patches.shape)} with coordinates {list(self.coord.shape)} do not "
                f"fit segments of {self.segments.total} patches. Make them with pack_patches."
            )
        if self.place is None:
            grids, place = _places(self.coord.cpu(), self.segments)
            object.__setattr__(self, "grids", grids)
            object.__setattr__(self, "place", place.to(self.coord.device))

    def __len__(self) -> int:
        return len(self.segments)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedPatches:
        """Copy the tensors to a device."""
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return dataclasses.replace(self, **moved, segments=self.segments.to(device, non_blocking), _layouts={})

    def pin_memory(self) -> PackedPatches:
        """Copy the tensors to pinned memory, from which copies to a device are asynchronous."""
        pinned = {name: getattr(self, name).pin_memory() for name in _TENSORS}
        return dataclasses.replace(self, **pinned, segments=self.segments.pin_memory(), _layouts={})

    def padded(self) -> dict[str, Tensor]:
        """Return the padded form, in which each image has as many patches as the largest one."""
        valid = torch.ones(self.segments.total, dtype=torch.bool, device=self.patches.device)
        patches = self.patches
        if patches.dim() == 2 and self.patch_size is not None:
            patches = patches.unflatten(1, (*self.patch_size, -1))
        return {
            "patches": unpack(patches, self.segments),
            "patch_coord": unpack(self.coord, self.segments),
            "patch_valid": unpack(valid, self.segments, value=False),
        }

    def dropped(self, fraction: float) -> tuple[PackedPatches, Tensor]:
        """Drop a fraction of the patches of each image at random.

        Returns:
            (the packing of the other patches, int64 with the indices of these among all patches).
        """
        lengths = [max(1, int(length * (1 - fraction))) for length in self.segments.lengths]
        kept_segments = Segments.of(lengths)
        # The first patches of each image in a random order of its patches.
        first = kept_segments.position + self.segments.host_offsets[:-1][kept_segments.sequence]
        shuffled = torch.rand(self.segments.total, device=self.patches.device).argsort()
        order = shuffled[self.segments.sequence[shuffled].argsort(stable=True)]
        kept = order[first.to(order.device, non_blocking=True)]
        return self._select(kept, kept_segments.to(order.device, non_blocking=True)), kept

    def _select(self, index: Tensor, segments: Segments) -> PackedPatches:
        selected = {name: getattr(self, name)[index] for name in _TENSORS}
        return dataclasses.replace(self, **selected, segments=segments, _layouts={})

    def with_prefix(self, num_prefix: int) -> PrefixLayout:
        """Return where the tokens of the images are if each image gets `num_prefix` tokens before its patches."""
        if num_prefix not in self._layouts:
            # Not inference tensors: a later call may need to save them for the backward pass.
            with torch.inference_mode(False):
                self._layouts[num_prefix] = PrefixLayout.of(self.segments, num_prefix, self.coord.device)
        return self._layouts[num_prefix]


_TENSORS = ("patches", "coord", "place")


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixLayout:
    """Tokens of packed images that have class or register tokens before their patches.

    Attributes:
        segments: of all tokens.
        order: int64 [tokens], the index of each token in [prefix tokens of all images, patches of all images].
        patches: int64 [T], the index of each patch among all tokens.
    """

    segments: Segments
    order: Tensor
    patches: Tensor

    @classmethod
    def of(cls, segments: Segments, num_prefix: int, device: torch.device) -> PrefixLayout:
        tokens = Segments.of([length + num_prefix for length in segments.lengths])
        before = (tokens.sequence + 1) * num_prefix  # prefix tokens up to the patches of an image
        patch = torch.arange(tokens.total) - before + len(tokens) * num_prefix
        prefix = tokens.sequence * num_prefix + tokens.position
        is_patch = tokens.position >= num_prefix
        order = torch.where(is_patch, patch, prefix)
        index = is_patch.nonzero().squeeze(1)
        return cls(
            tokens.to(device, non_blocking=True),
            order.to(device, non_blocking=True),
            index.to(device, non_blocking=True),
        )


def check_padded(images: Mapping[str, Any]) -> None:
    """Raise ValueError unless the entries of padded images and their shapes are those that `pack_patches` describes."""
    missing = [name for name in PADDED if name not in images]
    if missing:
        raise ValueError(
            f"The images have the entries {str(list(images))[:100]} and lack {', '.join(missing)}. Padded patches have "
            f"{', '.join(PADDED)}: join the samples of a NaFlex transform with open_clip.transform.collate_patches."
        )
    shape = images["patch_valid"].shape
    if len(shape) == 1:
        raise ValueError(
            f"patch_valid has the shape {list(shape)}, without the dimension of the batch. Add it to all entries: "
            "{name: value[None] for name, value in images.items()}."
        )
    if not shape.numel() or images["patches"].shape[:2] != shape or images["patch_coord"].shape != (*shape, 2):
        shapes = ", ".join(f"{name} {list(images[name].shape)}" for name in PADDED)
        raise ValueError(
            f"The images have {shapes}. They must be [batch, patches, ...], [batch, patches, 2] and [batch, patches], "
            "with at least one image and one patch."
        )


def pack_patches(images: Mapping[str, Any]) -> PackedPatches:
    """Pack padded images, which must be on the CPU.

    Args:
        images: {"patches": [B, N, P * P * 3] or [B, N, P, P, 3], "patch_coord": int [B, N, 2],
            "patch_valid": bool [B, N]}.

    Raises:
        ValueError: an entry is missing or has another shape, an image has no valid patch, or a coordinate is negative
            or too large.
    """
    check_padded(images)
    patches, segments = pack(images["patches"], images["patch_valid"])
    coord, _ = pack(images["patch_coord"], images["patch_valid"])
    patch_size = (patches.shape[1], patches.shape[2]) if patches.dim() == 4 else None
    return PackedPatches(patches, coord.long(), segments, patch_size)


def _places(coord: Tensor, segments: Segments) -> tuple[tuple[Grid, ...], Tensor]:
    """Return the distinct grids of packed patches, and the index of each patch in a table of all of them."""
    sequence = segments.sequence.cpu()
    last = torch.zeros(len(segments), 2, dtype=torch.int64)
    last.scatter_reduce_(0, sequence[:, None].expand(-1, 2), coord.long(), "amax")
    grids, start, columns = index_grids(last.tolist(), lowest=int(coord.min()))
    place = start[sequence] + coord[:, 0] * columns[sequence] + coord[:, 1]
    return grids, place


def index_grids(last: list[list[int]], lowest: int) -> tuple[tuple[Grid, ...], Tensor, Tensor]:
    """Find the distinct grids of a batch.

    Args:
        last: the last row and the last column of each image.
        lowest: the smallest row or column of all images.

    Returns:
        (distinct grids in order of appearance, int64 [images] with the start of each image's grid in a table of the
        positions of all distinct grids, int64 [images] with its number of columns).

    Raises:
        ValueError: a coordinate is negative, or so large that a table of positions would not fit into memory.
    """
    per_image = [(row + 1, column + 1) for row, column in last]
    rows, columns_of_largest = max(per_image, key=math.prod)
    if lowest < 0 or rows * columns_of_largest > _MAX_PLACES:
        raise ValueError(
            f"patch_coord goes from {lowest} to row {rows - 1} and column {columns_of_largest - 1} of an image. These "
            f"are places in the grid of its patches: at least 0, and less than {_MAX_PLACES} in all."
        )
    starts: dict[Grid, int] = {}
    size = 0
    for grid in per_image:
        if grid not in starts:
            starts[grid] = size
            size += grid[0] * grid[1]
    start = torch.tensor([starts[grid] for grid in per_image])
    columns = torch.tensor([grid[1] for grid in per_image])
    return tuple(starts), start, columns
