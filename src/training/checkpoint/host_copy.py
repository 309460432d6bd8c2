"""Copies of a run's state in host memory, which a thread writes while training continues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from open_clip import device as devices
from training.sharding.tensors import gather, is_sharded


class HostCopy:
    """Copies nested containers with their tensors to host memory, which is reused for the next copy.

    DTensors are gathered from all ranks one at a time, so that the device needs the memory of one.
    """

    def __init__(self, device: torch.device, keeps: bool = True) -> None:
        """Create it. With `keeps=False`, `take` only helps other ranks to gather tensors and returns no values."""
        self._kind = devices.get(device)
        self._keeps = keeps
        self._buffers: dict[tuple, Tensor] = {}

    def take(self, nested: Any) -> tuple[Any, Callable[[], None]]:
        """Copy the tensors in a container. Does not wait for the device.

        Returns:
            The copy, and a function that waits until its tensors are complete.
        """
        made: dict[tuple, Tensor | None] = {}

        def copy(value: Any, path: tuple) -> Any:
            if isinstance(value, dict):
                return {key: copy(item, (*path, key)) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(copy(item, (*path, i)) for i, item in enumerate(value))
            if not isinstance(value, Tensor):
                return value
            # A tensor with two names stays one tensor in the file. All ranks must gather the same ones.
            same: tuple = (id(value),)
            if not is_sharded(value):
                same = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if same not in made or value.numel() == 0:
                made[same] = self._copy(path, gather(value) if is_sharded(value) else value)
            return made[same]

        copied = copy(nested, ())
        return copied, self._kind.mark()

    def _copy(self, path: tuple, value: Tensor) -> Tensor | None:
        return self._fill(path, value.detach()) if self._keeps else None

    def _fill(self, path: tuple, value: Tensor) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            # Pinned memory lets the copy from a device run in the background.
            pinned = self._kind.pin_memory and value.device.type == self._kind.type
            buffer = self._buffers[path] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        return buffer.copy_(value, non_blocking=True)
