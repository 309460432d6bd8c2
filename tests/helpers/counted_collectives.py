"""Count the bytes that collectives of torch.distributed are called with: those of this project, DDP and FSDP."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators of c10d, and which argument is the tensor that counts: the whole result of a gather, the whole input of a
# reduce-scatter.
OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "send": ("send", 0),
}
RECEIVES = ("recv_",)


class CountedCollectives(TorchDispatchMode):
    """Counts the collectives in its context.

    Attributes:
        payload: bytes by (operation, size of the group).
        calls: number of calls by operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[tuple[str, int]] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented  # the operators on its local tensors come here again
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in RECEIVES:
            return
        operation, index = OPERATIONS[name]  # a KeyError names a collective that is not counted yet
        tensors = args[index] if isinstance(args[index], (list, tuple)) else [args[index]]
        group = next(torch.distributed.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        self.payload[operation, group.size()] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.calls[operation] += 1
