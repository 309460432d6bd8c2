"""Tensors that are sharded over the ranks (DTensors): their local part, and how to split and gather them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor. Does not import DTensor, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded_model(model: nn.Module) -> bool:
    """Return whether fully_shard was applied to the model, whose parameters may be gathered at the moment."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and isinstance(model, getattr(module, "FSDPModule", ()))


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, which may be empty. It shares the memory of the tensor."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.no_grad():  # without it, to_local records an operation of DTensor
        return sharded.to_local().detach()


def part_and_offsets(tensor: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Return (part of this rank, its offsets in the whole). An ordinary tensor is the whole."""
    if not is_sharded(tensor):
        return tensor, (0,) * tensor.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return local_part(tensor), tuple(offsets)


def split_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, as a view.

    Args:
        whole: the same on all ranks, or a DTensor with the layout of `like`.
        like: a tensor with the same shape. If it is a DTensor, the part is the one that it has on this rank.
    """
    if is_sharded(whole):
        return local_part(whole)
    if not is_sharded(like):
        return whole
    part, offsets = part_and_offsets(like)
    for dim, (start, size) in enumerate(zip(offsets, part.shape, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole


def join_like(part: Tensor, like: Tensor) -> Tensor:
    """Return the DTensor with the layout of `like` whose part on this rank is `part`. Nothing is copied."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    layout: Any = like
    meta = TensorMeta(layout.shape, layout.stride(), part.dtype)
    # DTensor.from_local would move a part in host memory (CPU offload) to the device of the mesh.
    return DTensor(part, DTensorSpec(layout.device_mesh, layout.placements, meta), requires_grad=False)


@torch.no_grad()
def gather(tensor: Any) -> Tensor:
    """Return the whole of a DTensor on every rank. Collective."""
    mesh_type = tensor.device_mesh.device_type  # the collective's; with CPU offload the parts are elsewhere
    return (tensor if tensor.device.type == mesh_type else tensor.to(mesh_type)).full_tensor()
