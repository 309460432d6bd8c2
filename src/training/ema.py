"""An exponential moving average of the weights, kept on the device, that evaluates and often generalises better.

average <- average + (1 - d) (weights - average) after every update of the weights, in float32. d rises to --ema-decay
as (1 + n) / (10 + n) with the number n of updates, so that the random start is forgotten (as TensorFlow's
ExponentialMovingAverage does with num_updates; Polyak and Juditsky, 1992, is why one averages).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = 64  # parameters whose differences are in memory at once


class WeightAverage:
    """The average of a model's trainable parameters. What is frozen, and buffers, are the model's own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """model: bare, with its weights where they are trained. decay: at least 0 and below 1."""
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, number: int, skipped: Tensor | None = None) -> None:
        """After update `number` (from 0) of the weights. skipped: bool scalar on the device, True: it was none.

        Waits for nothing: whether to skip is decided by a factor of 0 or 1 on the device.
        """
        weight: Any = 1 - min(self.decay, (1 + number) / (10 + number))
        if skipped is not None:
            weight = torch.where(skipped, 0.0, weight).float()
        weights, averages = list(self._parameters.values()), list(self._averages.values())
        for start in range(0, len(weights), _CHUNK):
            part = averages[start : start + _CHUNK]
            differences = torch._foreach_sub([p.detach().float() for p in weights[start : start + _CHUNK]], part)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(part, differences)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model computes with the averages, in its own types; afterwards with its weights again.

        The tensors are exchanged and not copied: the optimizer and DDP find theirs where they were.
        """
        own = {name: p.data for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            p.data = self._averages[name].to(p.dtype)
        try:
            yield
        finally:
            for name, p in self._parameters.items():
                p.data = own[name]

    def restart(self) -> None:
        """From the model's present weights."""
        for name, p in self._parameters.items():
            self._averages[name].copy_(p.detach())

    def state_dict(self, model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All weights of the averaged model: `model_state` (of the bare model) with the averages in their places."""
        return {**model_state, **self._averages}

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Raises ValueError where the averages of other parameters were saved."""
        missing = [name for name in self._averages if name not in weights]
        if missing:
            raise ValueError(f"The checkpoint's averaged weights are of another model: no {', '.join(missing[:3])}.")
        for name, average in self._averages.items():
            average.copy_(weights[name])
