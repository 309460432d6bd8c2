"""A step whose optimizer is part of a compiled graph (--torchcompile-strategy step)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


class CapturedStep:
    """Calls a compiled update of the weights with learning rates that are tensors on the device.

    A number would be a constant of the graph, so each new learning rate would compile it again. Outside of the call the
    learning rates of the optimizer are numbers, as the schedule, the log and checkpoints expect.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, update: Callable[[Any], Any]) -> None:
        """Create it. `update` takes the batches of a step, computes the gradients and calls the optimizer."""
        self._optimizer = optimizer
        self._update = update
        self._tensors = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._first_with_rate: list[int] = []  # for each group, the first group that has the same learning rate

    def __call__(self, batches: Any) -> Any:
        with self._rates_on_device():
            return self._update(batches)

    @contextlib.contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        if [rates[first] for first in self._first_with_rate] != rates:
            # Groups with equal rates share a tensor, so that FlatAdamW updates them together.
            self._first_with_rate = [rates.index(rate) for rate in rates]
        try:
            for group, first in zip(groups, self._first_with_rate, strict=True):
                group["lr"] = self._tensors[first].fill_(rates[first])
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
