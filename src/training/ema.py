"""Exponential moving average of the weights, kept on the device in float32. It often generalizes better.

After every update of the weights: average <- average + (1 - d) (weights - average). With the number n of updates, d
rises as (1 + n) / (10 + n) up to --ema-decay, so that the random initial weights are forgotten. TensorFlow's
ExponentialMovingAverage does the same with num_updates. Averaging is due to Polyak and Juditsky (1992).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = 64  # parameters per operation, which limits the memory for their differences


class NoAverage:
    """An average that is switched off. It has the interface of WeightAverage."""

    is_enabled = False

    def update(self, number: int, skipped: Tensor | bool = False) -> None:
        pass

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        yield

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class WeightAverage(NoAverage):
    """The average of a model's trainable parameters. Frozen parameters and buffers are not averaged."""

    is_enabled = True

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the current weights.

        Args:
            model: the bare module, already on its device.
            decay: at least 0 and below 1.
        """
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, number: int, skipped: Tensor | bool = False) -> None:
        """Update the average after update `number` (from 0) of the weights.

        The host does not wait: to skip, the difference is multiplied by 0 on the device.

        Args:
            skipped: whether the update of the weights was skipped; may be a bool scalar on the device.
        """
        weight: Any = 1 - min(self.decay, (1 + number) / (10 + number))
        if isinstance(skipped, Tensor):
            weight = torch.where(skipped, 0.0, weight).float()
        elif skipped:
            return
        self._blend(weight)

    def _blend(self, weight: Any) -> None:
        blend(list(self._parameters.values()), list(self._averages.values()), weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model use the averages, cast to its dtypes, until the end of the context.

        The tensors are swapped, not copied, so the memory that the optimizer and DDP refer to does not change.
        """
        own = {name: p.data for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            p.data = self._averages[name].to(p.dtype)
        try:
            yield
        finally:
            for name, p in self._parameters.items():
                p.data = own[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by the names of their parameters."""
        return dict(self._averages)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the averages from weights by name, which may have more entries.

        Raises:
            ValueError: a parameter is missing, so the averages are of another model.
        """
        missing = [name for name in self._averages if name not in state_dict]
        if missing:
            raise ValueError(
                f"The averaged weights of the checkpoint are of another model: they lack {', '.join(missing[:3])}."
            )
        for name, average in self._averages.items():
            average.copy_(state_dict[name])


def blend(weights: list[Tensor], averages: list[Tensor], weight: Any) -> None:
    """Add `weight` times the differences between weights and averages to the averages.

    Args:
        weight: a number, or a float32 scalar on the device of the tensors.
    """
    for start in range(0, len(weights), _CHUNK):
        part = averages[start : start + _CHUNK]
        differences = torch._foreach_sub([p.detach().float() for p in weights[start : start + _CHUNK]], part)
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(part, differences)
