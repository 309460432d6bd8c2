"""The same number of forward passes on all ranks during evaluation, where their numbers of batches may differ.

Every forward pass of a sharded model is collective, because the ranks gather the weights from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training import ranks
from training.sharding.tensors import is_sharded_model


def batches_in_step(batches: Iterable[Any], model: nn.Module, idle: Callable[[], Any]) -> Iterator[Any]:
    """Yield the batches. If the model is sharded and only other ranks have further batches, call `idle` for each.

    Args:
        idle: does one forward pass, as the caller does for each batch.
    """
    if not is_sharded_model(model):
        yield from batches
        return
    iterator = iter(batches)
    missing = object()
    while True:
        batch = next(iterator, missing)
        if not _any_rank(batch is not missing):
            return
        if batch is missing:
            idle()
        else:
            yield batch


def equal_shares(items: Sequence[Any]) -> list[Any]:
    """Return this rank's share of the items. All shares have the same length, so the last ones may repeat an item.

    The shares of all ranks in order, cut to the number of items, are the items.
    """
    here = ranks.world()
    size = -(-len(items) // here.world_size)
    padded = [*items, *[items[-1]] * (size * here.world_size - len(items))]
    return padded[here.rank * size : (here.rank + 1) * size]


def _any_rank(has_one: bool) -> bool:
    flag = torch.tensor([int(has_one)], device=ranks.collective_device())
    ranks.wait(dist.all_reduce(flag, dist.ReduceOp.MAX, group=ranks.host_group(), async_op=True))
    return bool(flag)
