"""One step of training: batches on the device in, updated weights and their losses out.

The host never waits for the device inside a step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.checkpoint import rng
from training.ema import WeightAverage
from training.flat_adamw import FlatAdamW
from training.gradients import clip_gradients, gradient_norm
from training.objective import SHARED, Objective, Outputs, concatenate
from training.step_guard import StepGuard

MAX_LOGIT_SCALE = math.log(100)  # CLIP's bound, arXiv:2103.00020, section 2.5
Batch = Mapping[str, Any]  # tensors on the device; and "key", a list of the samples' names


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside DDP's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@dataclass
class Trainer:
    """Updates a model's weights, batch by batch.

    model: to be called, so DDP's wrapper where there is one.
    scaler: of fp16 gradients; None without.
    scheduler: sets the learning rate for a step; None leaves it as it is.
    autocast: makes the context for forward passes and losses. input_dtype: of images; None as they come.
    group_text: applied to the texts of a batch before they are moved to the device, see batches.TextGrouping.
    half_weights: makes the context for forward and backward passes in which weights are converted once.
    accum_freq: batches of one step, see `_accumulate`. grad_clip_norm: bound of the gradient's global 2-norm.
    pairs_at_peak: what a device could do in a second, for the log's MFU; None where that is not known.
    guard: skips steps whose numbers are not finite; None: they are taken as they are.
    average: of the weights, updated after each step; None without.
    rehearses: the first step is preceded by one that changes nothing, see `rehearse`.
    """

    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    device: torch.device
    scaler: Any = None
    scheduler: Callable[[int], Any] | None = None
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    half_weights: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    input_dtype: torch.dtype | None = None
    group_text: Callable[[Any], Any] | None = None
    accum_freq: int = 1
    grad_clip_norm: float | None = None
    pairs_at_peak: float | None = None
    guard: StepGuard | None = None
    average: WeightAverage | None = None
    rehearses: bool = False

    def __post_init__(self) -> None:
        if self.accum_freq > 1 and getattr(self.model, "static_graph", False):
            raise ValueError(
                "DDP with static_graph counts every backward pass from its second step on, and so would take the "
                "gradients of a part of the batches: with accumulation make it without static_graph."
            )

    def step(self, batches: list[Batch], number: int) -> Outputs:
        """Update `number` (from 0) of the weights, from `accum_freq` batches on the device; the losses, there too."""
        if self.scheduler is not None:
            self.scheduler(number)
        if self.rehearses:
            self.rehearse(batches)
        if self.guard is not None:
            self.guard.begin(number, batches)
        self.optimizer.zero_grad()  # to None or to zero, as the optimizer prefers
        losses = self.backward(batches)
        self._update()
        logit_scale = getattr(unwrap_model(self.model), "logit_scale", None)
        if logit_scale is not None:
            with torch.no_grad():
                logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if self.average is not None:
            self.average.update(number, None if self.guard is None else self.guard.skipped)
        return losses

    def rehearse(self, batches: list[Batch]) -> None:
        """Forward and backward, of which nothing remains but DDP's buckets, for a resumed run of several processes.

        DDP arranges gradients anew after its first backward pass, and how they are arranged decides in which order the
        ranks' are added up. The unbroken run did so long ago; without this the first step would round differently.
        """
        self.rehearses = False
        state, buffers = rng.torch_state(self.device), [buffer.clone() for buffer in self.model.buffers()]
        self.backward(batches)
        rng.set_torch_state(state, self.device)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def backward(self, batches: list[Batch]) -> Outputs:
        """Adds the gradient of the loss over the samples of all batches (times the scaler's factor); the losses."""
        with self.half_weights():
            losses = self._backward_one(batches[0]) if len(batches) == 1 else self._accumulate(batches)
        return {name: loss.detach() for name, loss in losses.items()}

    def _backward_one(self, batch: Batch) -> Outputs:
        with self.autocast():
            outputs = self.objective.features(self.model, batch)
            losses = self.objective.losses({**outputs, **self.objective.targets(batch)})
        self._scaled(losses["loss"]).backward()
        return losses

    def _accumulate(self, batches: list[Batch]) -> Outputs:
        """One loss over the samples of k batches, each other's negatives, in the memory of one (arXiv:2101.06983).

        All batches but the last go forward without keeping activations. The loss is taken once, on the features of all,
        and gives the features' gradients. Then each batch goes forward again, and backward with its part of them. The
        cost is k - 1 forward passes beyond those of one large batch. Random numbers are replayed, so that dropout drops
        the same the second time; a layer that counts what it sees (BatchNorm) counts it twice.

        The gradients of the scalars (logit_scale) come whole from the one loss and go in with the last backward pass.
        That is the only pass through DDP's wrapper, which then averages over the ranks what all passes have added up,
        and waits for every parameter. The others go past it, and the graph kept from the first phase is one of them:
        DDP would have to be told at its forward that it comes last.
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
        shared, gradients = _gradients(leaves, [len(batch["image"]) for batch in batches])

        _backward(kept, gradients.pop())
        del kept, parts, leaves
        for batch, state, gradient in zip(batches[:-2], states[:-1], gradients[:-1], strict=True):
            rng.set_torch_state(state, self.device)
            _backward(self._features(bare, batch), gradient)
        rng.set_torch_state(states[-1], self.device)
        _backward(self._features(self.model, batches[-2]), {**gradients[-1], **shared})
        rng.set_torch_state(after, self.device)
        return losses

    def _features(self, model: nn.Module, batch: Batch) -> Outputs:
        # A context for each call: within one, autocast would reuse the casts of weights that it made without gradient.
        with self.autocast():
            return self.objective.features(model, batch)

    def _losses_of_all(self, leaves: Outputs, batches: list[Batch]) -> Outputs:
        with self.autocast():
            targets = concatenate([self.objective.targets(batch) for batch in batches])
            losses = self.objective.losses({**leaves, **targets})
        self._scaled(losses["loss"]).backward()
        return losses

    def _scaled(self, loss: Tensor) -> Tensor:
        if self.guard is not None:
            loss = self.guard.marked(loss)
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _update(self) -> None:
        is_flat = isinstance(self.optimizer, FlatAdamW)  # its gradients are read once, so the scaler comes first
        if self.scaler is not None and (is_flat or self.grad_clip_norm is not None):
            self.scaler.unscale_(self.optimizer)  # the bound is of the true gradient
        norm = self._clip()
        if self.guard is not None:
            norm = gradient_norm(self.optimizer) if norm is None else norm
            if self.scaler is None:
                self.guard.step(self.optimizer, norm)
            else:
                self.guard.scaled_step(self.optimizer, self.scaler, norm)
        elif self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _clip(self) -> Tensor | None:
        """The gradient norm before it was bounded; None where it has no bound."""
        if self.grad_clip_norm is None:
            return None
        return clip_gradients(self.optimizer, self.model.parameters(), self.grad_clip_norm)


def _gradients(leaves: Outputs, sizes: list[int]) -> tuple[Outputs, list[Outputs]]:
    """Gradients of what all samples share, and for each batch those of its rows. 0 for what the loss does not use."""
    whole = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
        if leaf.requires_grad
    }
    shared = {name: whole.pop(name) for name in SHARED & whole.keys()}
    by_name = {name: gradient.split(sizes) for name, gradient in whole.items()}
    return shared, [{name: parts[i] for name, parts in by_name.items()} for i in range(len(sizes))]


def _backward(outputs: Outputs, gradients: Outputs) -> None:
    """Continues the backward pass from gradients of some of the outputs."""
    if gradients:
        torch.autograd.backward([outputs[name] for name in gradients], list(gradients.values()))
