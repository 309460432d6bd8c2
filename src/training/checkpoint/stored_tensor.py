"""Tensors of a checkpoint that are read piece by piece, into this rank's part of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from open_clip.checkpoint.files import read_records, read_tree
from open_clip.formats.tensor_records import TensorRecord
from training.sharding.tensors import join_like, part_and_offsets

_LARGE = ("state_dict", "state_dict_ema", "optimizer")  # what a checkpoint file has of the size of the model

Reader = Callable[[Sequence[int], Sequence[int]], Tensor]


class StoredTensor(Tensor):
    """A tensor on the meta device that knows where its values are stored. It has a shape and a dtype, and no memory.

    Attributes:
        read_part: reads the part with the given offsets and sizes.
    """

    read_part: Reader

    @staticmethod
    def create(shape: Sequence[int], dtype: torch.dtype, read_part: Reader) -> StoredTensor:
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        stored = torch.Tensor._make_subclass(StoredTensor, tensor)
        stored.read_part = read_part
        return stored

    def read(self) -> Tensor:
        """Read the whole tensor into host memory."""
        return self.read_part((0,) * self.ndim, tuple(self.shape))


def read_file_lazily(path: Any) -> Any:
    """Read a file of `torch.save`. Its weights and the optimizer's states are `StoredTensor`s.

    Raises:
        ValueError: the file is damaged.
    """

    def store(record: TensorRecord) -> StoredTensor:
        def read_part(offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
            (whole,) = read_records(path, [record])
            return _cut(whole, offsets, sizes)

        return StoredTensor.create(record.shape, record.dtype, read_part)

    def read(record: TensorRecord) -> Tensor:
        return read_records(path, [record])[0]

    tree = read_tree(path)
    if not isinstance(tree, dict):
        return tree
    large = {key: value for key, value in tree.items() if key in _LARGE}
    small = {key: value for key, value in tree.items() if key not in _LARGE}
    return {**map_leaves(small, TensorRecord, read), **map_leaves(large, TensorRecord, store)}


def map_leaves(nested: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Copy nested containers, with `function` applied to the values of the type `kind`."""
    if isinstance(nested, dict):
        return {key: map_leaves(value, kind, function) for key, value in nested.items()}
    if isinstance(nested, (list, tuple)):
        return type(nested)(map_leaves(value, kind, function) for value in nested)
    return function(nested) if isinstance(nested, kind) else nested


def read_all(nested: Any) -> Any:
    """Copy nested containers, with the values of stored tensors read into host memory."""
    return map_leaves(nested, StoredTensor, lambda stored: stored.read())


def element(tensor: Tensor) -> Tensor:
    """Return the scalar that is stored as a tensor with one element."""
    if not isinstance(tensor, StoredTensor):
        return tensor.reshape(())
    return StoredTensor.create((), tensor.dtype, lambda _, __: tensor.read().reshape(()))


def is_written_here(tensor: Any) -> bool:
    """Return whether this rank has the first of several equal copies of its part (replicas of shards)."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    return coordinate is not None and all(
        position == 0
        for position, placement in zip(coordinate, tensor.placements, strict=True)
        if placement.is_replicate()
    )


@torch.no_grad()
def fill(target: Any, source: Tensor) -> None:
    """Copy into a tensor, or into this rank's part of a DTensor. `source` is the whole tensor, which may be stored.

    A scalar may be stored as one element, and the reverse: torch cannot shard scalars.
    """
    local, offsets = part_and_offsets(target)
    if local.numel():
        local.copy_(_part(source, target, offsets, local.shape).reshape(local.shape))


def part_like(source: Tensor, like: Any) -> Tensor:
    """Return `source`, or if `like` is a DTensor, a DTensor of this rank's part, on the device of `like`."""
    local, offsets = part_and_offsets(like)
    part = _part(source, like, offsets, local.shape).reshape(local.shape).to(local.device)
    return join_like(part, like)


def _part(source: Tensor, target: Any, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    if source.shape != target.shape:  # a scalar
        offsets, sizes = (0,) * source.ndim, tuple(source.shape)
    if isinstance(source, StoredTensor):
        return source.read_part(offsets, sizes)
    return _cut(source, offsets, sizes)


def _cut(whole: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Return a part of a tensor in memory of its own, so that it does not keep the whole."""
    if tuple(sizes) == tuple(whole.shape):
        return whole
    return whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))].clone()
