"""Joining the samples of a batch to one tensor, in a worker directly in shared memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

_LEAST_BYTES = 1 << 18  # smaller batches are faster with default_collate


def stack(values: Any) -> Any:
    """Join a list or tuple of tensors, arrays or numbers to one tensor, as `default_collate` does.

    In a worker, large tensors are written to a shared file in memory, one system call per sample. `default_collate`
    writes them through a memory map instead, where the first access to each page interrupts the program. The file does
    not count towards the size limit of /dev/shm.
    """
    return _write_shared(values) if _is_shareable(values) else default_collate(values)


def _is_shareable(values: Sequence[Any]) -> bool:
    first = values[0]
    return (
        isinstance(first, Tensor)
        and first.nbytes * len(values) >= _LEAST_BYTES
        and get_worker_info() is not None
        and hasattr(os, "memfd_create")
        and torch.multiprocessing.get_sharing_strategy() == "file_descriptor"
        and all(_is_like(value, first) for value in values)
    )


def _is_like(value: Any, first: Tensor) -> bool:
    return (
        type(value) is Tensor
        and value.shape == first.shape
        and value.dtype == first.dtype
        and value.is_cpu
        and value.is_contiguous()
        and not value.requires_grad
    )


def _write_shared(values: Sequence[Tensor]) -> Tensor:
    first = values[0]
    storages: Any = torch.UntypedStorage
    file = os.memfd_create("batch")
    try:
        with open(file, "wb", closefd=False) as stream:
            for value in values:
                stream.write(value.view(-1).view(torch.uint8).numpy().data)
        storage = storages._new_shared_fd_cpu(file, first.nbytes * len(values))
    finally:
        os.close(file)
    return torch.empty(0, dtype=first.dtype).set_(storage).view(len(values), *first.shape)
