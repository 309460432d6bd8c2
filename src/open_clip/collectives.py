"""Differentiable collectives for any backend (gloo, nccl, hccl, xccl).

The backward of torch's differentiable all_gather is a reduce_scatter only with NCCL; with other backends it is an
all_to_all, a stack and a sum. Here every backward is the adjoint collective: reduce_scatter for a gather, the reverse
shift for a shift.

Unless stated otherwise, every rank of the group calls the function, with tensors of the same shape and dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = Any  # dist.ProcessGroup | None; torch builds without distributed do not have the class

# torch 2.14 renamed the flat collectives and warns about the old names.
_all_gather_flat: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter_flat: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def all_gather(tensor: Tensor, group: Group = None) -> Tensor:
    """Concatenate the tensors [n, ...] of all ranks in rank order: [world_size * n, ...], without gradient."""
    tensor = tensor.detach().contiguous()
    gathered = tensor.new_empty(dist.get_world_size(group) * tensor.shape[0], *tensor.shape[1:])
    _all_gather_flat(gathered, tensor, group=group)
    return gathered


def reduce_scatter(tensor: Tensor, group: Group = None) -> Tensor:
    """Sum tensors [world_size * n, ...] over the ranks and return this rank's rows [n, ...], without gradient.

    Raises:
        ValueError: the number of rows is not a multiple of the number of ranks.
    """
    tensor = tensor.detach().contiguous()
    world_size = dist.get_world_size(group)
    if tensor.shape[0] % world_size:
        raise ValueError(f"reduce_scatter cannot divide {tensor.shape[0]} rows evenly among {world_size} ranks.")
    reduced = tensor.new_empty(tensor.shape[0] // world_size, *tensor.shape[1:])
    _reduce_scatter_flat(reduced, tensor, group=group)
    return reduced


def all_reduce(tensor: Tensor, op: str = "sum", group: Group = None) -> Tensor:
    """Return the sum of the tensors of all ranks (with op "max", their maximum) as a new tensor, without gradient."""
    reduced = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=group)
    return reduced


def broadcast(tensor: Tensor, source: int, group: Group = None) -> Tensor:
    """Return the tensor of rank `source` of the group, without gradient.

    The other ranks pass a tensor of the same shape and dtype.
    """
    tensor = tensor.detach().contiguous()
    received = tensor if dist.get_rank(group) == source else torch.empty_like(tensor)
    dist.broadcast(received, _global_rank(source, group), group=group)
    return received


def reduce(tensor: Tensor, destination: int, group: Group = None) -> Tensor:
    """Return the sum of the tensors of all ranks on rank `destination` of the group, without gradient.

    The result is undefined on the other ranks.
    """
    reduced = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.reduce(reduced, _global_rank(destination, group), group=group)
    return reduced


def _global_rank(rank: int, group: Group) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return reduce_scatter(grad, ctx.group), None


def all_gather_with_grad(tensor: Tensor, group: Group = None) -> Tensor:
    """Gather like `all_gather`. The gradient of a rank's rows is the sum of their gradients on all ranks."""
    return _AllGather.apply(tensor, group)


def gather_rows(tensor: Tensor, group: Group = None) -> Tensor:
    """Concatenate the rows [n_rank, ...] of all ranks, whose numbers may differ or be 0, without gradient.

    The dtype and the other dimensions must be the same on all ranks.

    Returns:
        [sum of n_rank, ...] on every rank.
    """
    rows = torch.tensor([tensor.shape[0]], device=tensor.device)
    counts = all_gather(rows, group).tolist()
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor.detach()
    parts = all_gather(padded, group).split(max(counts)) if max(counts) else []
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]) if parts else padded


def neighbour_exchange(from_rank: int, to_rank: int, tensor: Tensor, group: Group = None) -> Tensor:
    """Send `tensor` to `to_rank` and return the tensor that `from_rank` sends, without gradient."""
    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    _exchange([(tensor, to_rank)], [(received, from_rank)], group)
    return received


def neighbour_exchange_bidir(
    left_rank: int, right_rank: int, tensor_to_left: Tensor, tensor_to_right: Tensor, group: Group = None
) -> tuple[Tensor, Tensor]:
    """Send a tensor to each neighbour, without gradient.

    Returns:
        (tensor from the right neighbour, tensor from the left neighbour).
    """
    from_right = torch.empty_like(tensor_to_left, memory_format=torch.contiguous_format)
    from_left = torch.empty_like(tensor_to_right, memory_format=torch.contiguous_format)
    # With two ranks, both neighbours are the same peer. Its first message goes to its left: it is our from_right.
    _exchange(
        [(tensor_to_left, left_rank), (tensor_to_right, right_rank)],
        [(from_right, right_rank), (from_left, left_rank)],
        group,
    )
    return from_right, from_left


def _exchange(sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], group: Group) -> None:
    """Run all sends and receives as one batch, so that no order of calls can deadlock."""
    operations = [dist.P2POp(dist.isend, tensor.detach().contiguous(), peer, group) for tensor, peer in sends]
    operations += [dist.P2POp(dist.irecv, tensor, peer, group) for tensor, peer in receives]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


class NeighbourExchange(torch.autograd.Function):
    """`neighbour_exchange` with gradient, which is sent in the opposite direction."""

    @staticmethod
    def forward(ctx, from_rank: int, to_rank: int, group: Group, tensor: Tensor) -> Tensor:
        ctx.peers, ctx.group = (from_rank, to_rank), group
        return neighbour_exchange(from_rank, to_rank, tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        from_rank, to_rank = ctx.peers
        return None, None, None, neighbour_exchange(to_rank, from_rank, grad, ctx.group)


def neighbour_exchange_with_grad(from_rank: int, to_rank: int, tensor: Tensor, group: Group = None) -> Tensor:
    """Exchange like `neighbour_exchange`, with gradient."""
    return NeighbourExchange.apply(from_rank, to_rank, group, tensor)


class NeighbourExchangeBidir(torch.autograd.Function):
    """`neighbour_exchange_bidir` with gradients, which are sent in the opposite direction."""

    @staticmethod
    def forward(ctx, left_rank: int, right_rank: int, group: Group, tensor_to_left: Tensor, tensor_to_right: Tensor):
        ctx.peers, ctx.group = (left_rank, right_rank), group
        return neighbour_exchange_bidir(left_rank, right_rank, tensor_to_left, tensor_to_right, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_from_right: Tensor, grad_from_left: Tensor):
        # Gradients of received tensors return to their sender; those of sent tensors come back from their receiver.
        left_rank, right_rank = ctx.peers
        grad_to_right, grad_to_left = neighbour_exchange_bidir(
            left_rank, right_rank, grad_from_left, grad_from_right, ctx.group
        )
        return None, None, None, grad_to_left, grad_to_right


def neighbour_exchange_bidir_with_grad(
    left_rank: int, right_rank: int, tensor_to_left: Tensor, tensor_to_right: Tensor, group: Group = None
) -> tuple[Tensor, Tensor]:
    """Exchange like `neighbour_exchange_bidir`, with gradient."""
    return NeighbourExchangeBidir.apply(left_rank, right_rank, group, tensor_to_left, tensor_to_right)
