"""One optimizer step: forward, loss, backward, clip, step. The batches are on the device, and so are the losses.

The host does not wait for the device inside a step, except where an optimizer cannot skip a step on the device.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from open_clip import device as devices
from training.batches import LOSS_SCALE, keep_padding
from training.captured_step import CapturedStep
from training.checkpoint import rng
from training.compilation import NoCompilation
from training.ema import NoAverage
from training.gradients import clip_gradients
from training.objective import SHARED, Objective, Outputs, concatenate
from training.precision import DisabledScaler, Precision
from training.sharding.part import NoSharding
from training.step_guard import NoGuard

MAX_LOGIT_SCALE = math.log(100)  # CLIP's bound, arXiv:2103.00020, section 2.5
Batch = Mapping[str, Any]  # tensors on the device, and under "key" the list of the samples' names


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside the wrapper of DDP, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _keep_lr(number: int) -> None:
    pass


@dataclass
class Trainer:
    """Updates the weights of a model, step by step. A part that a run does not need is an object that does nothing.

    Attributes:
        model: the model to call: wrapped by DDP if there are several processes.
        objective: computes named losses.
        precision: gives the device, the context of forward passes and the dtype of images.
        scaler: gradient scaler. A disabled one does not scale.
        scheduler: called with the number of each step, sets its learning rate.
        half_weights: creates the context in which weights are converted once per step, see `training.half_weights`.
        unpad: applied to a batch before it is moved to the device, see `training.unpadding`.
        accum_freq: batches per step, see `_accumulate`.
        steps_vary: the data decide which batches form a step, so their number and sizes differ between steps. The ranks
            of a sharded model need the same number.
        grad_clip_norm: upper bound of the global 2-norm of the gradient; inf: no bound.
        guard: decides whether to skip a step, see `training.step_guard`.
        average: moving average of the weights, updated after each step.
        rehearses: call `rehearse` before the first step.
        compilation: counts the graphs of a compiled model.
        sharding: finishes the gradients of a sharded model, see `training.sharding`.
    """

    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    precision: Precision
    scaler: Any = field(default_factory=DisabledScaler)
    scheduler: Callable[[int], Any] = _keep_lr
    half_weights: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    unpad: Callable[[dict[str, Any]], dict[str, Any]] = keep_padding
    accum_freq: int = 1
    steps_vary: bool = False
    grad_clip_norm: float = math.inf
    guard: NoGuard = field(default_factory=NoGuard)
    average: NoAverage = field(default_factory=NoAverage)
    rehearses: bool = False
    compilation: NoCompilation = field(default_factory=NoCompilation)
    sharding: NoSharding = field(default_factory=NoSharding)

    def __post_init__(self) -> None:
        if (self.accum_freq > 1 or self.steps_vary) and getattr(self.model, "static_graph", False):
            raise ValueError(
                "DDP with static_graph counts every backward pass from its second step on, so with gradient "
                "accumulation it would use the gradients of some of the batches only. Create it without static_graph."
            )
        if self.compilation.captures_step and not self._can_be_captured():
            raise ValueError(
                "A compiled step needs accum_freq=1, batches of one shape (steps_vary=False), a disabled gradient "
                "scaler, a model without DDP, and a guard and an optimizer that skip steps on the device (StepGuard "
                "with FlatAdamW)."
            )
        self._losses_of_batch = self.compilation.compile_task(self._compute_losses)
        self._compute_features = self.compilation.compile_task(self.objective.features)  # for accumulation
        self._losses_of_features = self.compilation.compile_task(self.objective.losses)
        self._update_with: Callable[[list[Batch]], Outputs] = self._backward_and_update
        if self.compilation.captures_step:
            captured = self.compilation.compile_step(self._backward_and_update)
            self._update_with = CapturedStep(self.optimizer, self.device, captured)

    def _can_be_captured(self) -> bool:
        is_one_pass = self.accum_freq == 1 and not self.steps_vary
        is_one_pass &= not isinstance(self.model, DistributedDataParallel)
        return is_one_pass and not self.scaler.is_enabled() and self.guard.decides_on_device

    @property
    def device(self) -> torch.device:
        return self.precision.device

    def step(self, batches: list[Batch], number: int) -> Outputs:
        """Make step `number` (from 0) with one or several batches on the device, whose sizes and shapes may differ.

        Returns:
            The losses, on the device.
        """
        self.scheduler(number)
        self.guard.begin(number, batches)
        self.optimizer.zero_grad()  # sets None or zero, as the optimizer prefers
        losses = self._update_with(batches)
        _clamp_logit_scale(unwrap_model(self.model))
        self.average.update(number, self.guard.skipped)
        return losses

    def rehearse(self, batches: list[Batch]) -> float:
        """Run forward and backward passes that change only DDP's buckets and compiled graphs. Return the seconds.

        The next step then has the speed of all later ones, because whatever is compiled is compiled here.

        After its first backward pass DDP arranges the gradients in other buckets. The buckets determine the order in
        which the gradients of the ranks are added. In an uninterrupted run this happened in the first step of all, so
        without the rehearsal the first step after a resume would round differently.
        """
        self.rehearses = False
        start = time.perf_counter()
        state, buffers = rng.torch_state(self.device), [buffer.clone() for buffer in self.model.buffers()]
        if self.compilation.captures_step:
            self._rehearse_update(batches)
        else:
            self.backward(batches)
        rng.set_torch_state(state, self.device)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        devices.get(self.device).synchronize()
        seconds = time.perf_counter() - start
        self.compilation.log_warm_up(seconds)
        return seconds

    def _rehearse_update(self, batches: list[Batch]) -> None:
        """Make steps that are skipped, because their floats are NaN: one uncompiled, then one that is compiled.

        The first one creates the state of the optimizer, which would otherwise compile the step once more.
        """
        counts = self.guard.state_dict()
        without_numbers: list[Batch] = [_without_numbers(batch) for batch in batches]
        for update in (self._backward_and_update, self._update_with):
            self.guard.begin(0, [])
            self.optimizer.zero_grad()
            update(without_numbers)
        self.guard.load_state_dict(counts)

    def _backward_and_update(self, batches: list[Batch]) -> Outputs:
        losses = self.backward(batches)
        self._update()
        return losses

    def backward(self, batches: list[Batch]) -> Outputs:
        """Add the gradient of the loss over the samples of all batches, times the loss scale. Return the losses."""
        with self.half_weights():
            losses = self._backward_one(batches[0]) if len(batches) == 1 else self._accumulate(batches)
        self.sharding.collect_gradients()
        return {name: loss.detach() for name, loss in losses.items()}

    def _backward_one(self, batch: Batch) -> Outputs:
        with self.precision.autocast():
            losses = self._losses_of_batch(batch)
        factor = batch.get(LOSS_SCALE)
        self._scaled(losses["loss"] if factor is None else losses["loss"] * factor).backward()
        return losses

    def _compute_losses(self, batch: Batch) -> Outputs:
        outputs = self.objective.features(self.model, batch)
        return self.objective.losses({**outputs, **self.objective.targets(batch)})

    def _accumulate(self, batches: list[Batch]) -> Outputs:
        """Compute one loss over the samples of k batches in the memory of one batch (arXiv:2101.06983).

        All samples are negatives of each other. All batches but the last are first run forward without keeping
        activations. Then the loss is computed on the features of all batches, which gives the gradients of the
        features. Finally each batch is run forward again, and backward from its part of these gradients. This costs
        k - 1 more forward passes than one large batch. Random states are restored, so that dropout is the same the
        second time. A layer that updates statistics in the forward pass (BatchNorm) does so twice.

        The gradients of scalars (logit_scale) come from the one loss, and are added in the last backward pass. Only
        this pass goes through DDP's wrapper, which then averages the sums of all passes over the ranks and waits for
        every parameter. The other passes bypass the wrapper. The last batch's graph, kept from the first phase, is one
        of them, because DDP would have to know at its forward pass that its backward pass comes last.
        """
        bare = unwrap_model(self.model)
        states, parts = [], []
        for batch in batches[:-1]:
            states.append(rng.torch_state(self.device))
            with torch.no_grad():
                parts.append(self._features(bare, batch))
        kept = self._features(bare, batches[-1])
        after = rng.torch_state(self.device)
        parts.append({name: value.detach() for name, value in kept.items()})

        leaves = concatenate(parts)
        for name, value in kept.items():
            leaves[name].requires_grad_(value.requires_grad)
        losses = self._losses_of_all(leaves, batches)
        shared, gradients = _gradients(leaves, parts)

        self.sharding.set_last_backward(False)
        _backward(kept, gradients.pop())
        del kept, parts, leaves
        for batch, state, gradient in zip(batches[:-2], states[:-1], gradients[:-1], strict=True):
            rng.set_torch_state(state, self.device)
            _backward(self._features(bare, batch), gradient)
        rng.set_torch_state(states[-1], self.device)
        self.sharding.set_last_backward(True)
        _backward(self._features(self.model, batches[-2]), {**gradients[-1], **shared})
        rng.set_torch_state(after, self.device)
        return losses

    def _features(self, model: nn.Module, batch: Batch) -> Outputs:
        # One context per call: autocast caches casts of weights, and would reuse those made without gradients.
        with self.precision.autocast():
            return self._compute_features(model, batch)

    def _losses_of_all(self, leaves: Outputs, batches: list[Batch]) -> Outputs:
        with self.precision.autocast():
            targets = concatenate([self.objective.targets(batch) for batch in batches])
            losses = self._losses_of_features({**leaves, **targets})
        self._scaled(losses["loss"]).backward()
        return losses

    def _scaled(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(self.guard.mark(loss))

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)  # before the norm, which is that of the true gradient
        norm = self._clip()
        self.guard.step(self.optimizer, self.scaler, norm)
        self.scaler.update()

    def _clip(self) -> Tensor:
        """Clip the gradients, and return their norm before clipping."""
        if self.grad_clip_norm == math.inf:
            return self.guard.norm(self.optimizer)
        return clip_gradients(self.optimizer, self.model.parameters(), self.grad_clip_norm)


def _without_numbers(batch: Batch) -> Batch:
    return {
        name: torch.full_like(value, torch.nan) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def _clamp_logit_scale(model: nn.Module) -> None:
    logit_scale = getattr(model, "logit_scale", None)
    if isinstance(logit_scale, Tensor):
        with torch.no_grad():
            logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def _gradients(leaves: Outputs, parts: list[Outputs]) -> tuple[Outputs, list[Outputs]]:
    """Return the gradients of SHARED outputs, and those of each batch's rows. They are 0 for unused outputs.

    Args:
        leaves: the outputs of all batches, concatenated.
        parts: the outputs of each batch.
    """
    whole = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
        if leaf.requires_grad
    }
    shared = {name: whole.pop(name) for name in SHARED & whole.keys()}
    by_name = {name: gradient.split([len(part[name]) for part in parts]) for name, gradient in whole.items()}
    return shared, [{name: rows[i] for name, rows in by_name.items()} for i in range(len(parts))]


def _backward(outputs: Outputs, gradients: Outputs) -> None:
    """Continue the backward pass from the gradients of some of the outputs."""
    if gradients:
        torch.autograd.backward([outputs[name] for name in gradients], list(gradients.values()))
