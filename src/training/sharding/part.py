"""What a run calls to train a sharded model. Without --fsdp it is an object that does nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.ema import NoAverage, WeightAverage, blend
from training.optim import create_optimizer
from training.params import OptimConfig
from training.sharding.shards import Shards
from training.sharding.tensors import join_like, split_like


class NoSharding:
    """The sharding of a model that is not sharded. It has the interface of Sharding."""

    is_enabled = False

    def create_optimizer(
        self, model: nn.Module, cfg: OptimConfig, device: torch.device, is_captured: bool = False
    ) -> torch.optim.Optimizer:
        """Create the optimizer, see training.optim."""
        return create_optimizer(model, cfg, device, is_captured=is_captured)

    def create_average(self, model: nn.Module, decay: float | None) -> NoAverage:
        """Create the moving average of the weights. None: it is switched off."""
        return NoAverage() if decay is None else WeightAverage(model, decay)

    def agree(self, scaler: Any) -> Any:
        """Return a gradient scaler that takes the same decisions on all ranks."""
        return scaler

    def set_last_backward(self, is_last: bool) -> None:
        """Say whether the next backward pass is the last one of the step."""

    def collect_gradients(self) -> None:
        """Finish the gradients after the last backward pass of a step."""


class Sharding(NoSharding):
    """The sharding of a model that `units.shard_model` has sharded."""

    is_enabled = True

    def __init__(self, model: nn.Module, device: torch.device, keeps_gathered: bool) -> None:
        """Create it.

        Args:
            keeps_gathered: whether parameters stay gathered, and gradients whole, between the passes of one step. Then
                gradient accumulation communicates as often as a step with one batch.
        """
        self._model: Any = model
        self._keeps_gathered = keeps_gathered
        self._shards = Shards(model, device)

    def create_optimizer(
        self, model: nn.Module, cfg: OptimConfig, device: torch.device, is_captured: bool = False
    ) -> torch.optim.Optimizer:
        """Create the optimizer of the local parts, see `Shards`.

        `device` and `is_captured` have no effect: the shards know the device, and a captured step cannot be sharded.
        """
        return self._shards.create_optimizer(cfg)

    def create_average(self, model: nn.Module, decay: float | None) -> NoAverage:
        return NoAverage() if decay is None else ShardedAverage(self._shards, decay)

    def agree(self, scaler: Any) -> Any:
        if scaler.is_enabled():
            overrides = {"collective_device": self._shards.device}
            scaler.__class__ = type(type(scaler).__name__, (_AgreedOverflow, type(scaler)), overrides)
        return scaler

    def set_last_backward(self, is_last: bool) -> None:
        if self._keeps_gathered:
            model = self._model
            model.set_is_last_backward(is_last)
            model.set_requires_gradient_sync(is_last)
            model.set_reshard_after_backward(is_last)

    def collect_gradients(self) -> None:
        self._shards.collect_gradients()


class _AgreedOverflow:
    """Override of torch's GradScaler: an overflow on one rank is an overflow on all."""

    collective_device: torch.device

    def _unscale_grads_(self, *args: Any) -> dict[torch.device, Tensor]:
        scaler: Any = super()
        found = scaler._unscale_grads_(*args)  # per device; with CPU offload there are two, or only the CPU
        total = torch.zeros((), device=self.collective_device)
        for overflows in found.values():
            total += overflows.to(total)
        dist.all_reduce(total, dist.ReduceOp.MAX)
        for overflows in found.values():
            overflows.copy_(total)
        return found


class ShardedAverage(WeightAverage):
    """The moving average of the parts of the weights that this rank holds."""

    def __init__(self, shards: Shards, decay: float) -> None:
        """Start from the current weights."""
        self.decay = decay
        self._shards = shards
        self._wholes = {name: p for name, p in shards.wholes.items() if p.requires_grad}
        self._parameters = {name: shards.parameters[name] for name in self._wholes}
        self._averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model use the averages until the end of the context. Values are copied: FSDP owns the memory."""
        self._shards.bind()
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._copy(self._averages)
        try:
            yield
        finally:
            self._copy(own)

    def _blend(self, weight: Any) -> None:
        for device, names in self._names_by_device().items():
            weights, averages = ([of[name] for name in names] for of in (self._parameters, self._averages))
            blend(weights, averages, weight.to(device) if isinstance(weight, Tensor) else weight)

    def _names_by_device(self) -> dict[torch.device, list[str]]:
        found: dict[torch.device, list[str]] = {}  # with CPU offload there are two devices
        for name, average in self._averages.items():
            found.setdefault(average.device, []).append(name)
        return found

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        self._shards.reshard()
        self._shards.bind()
        for name, p in self._parameters.items():
            p.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        return {name: join_like(average, self._wholes[name]) for name, average in self._averages.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        parts = {name: split_like(state_dict[name], p) for name, p in self._wholes.items() if name in state_dict}
        super().load_state_dict(parts)
