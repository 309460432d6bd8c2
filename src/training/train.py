"""One epoch of training: batches in, updated weights and a line of log now and then out.

The host never waits for the device inside a step; losses are summed there and fetched when a line of log is due.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import open_clip
from open_clip import device as devices
from training import evaluate as evaluation
from training import half_weights, rng
from training import precision as precisions
from training.batches import TextGrouping, to_device
from training.checkpoint import TrainState
from training.data.skips import report as report_skips
from training.distributed import world
from training.ema import WeightAverage
from training.evaluate import maybe_compute_generative_loss
from training.flat_adamw import FlatAdamW
from training.gradients import clip_gradients, gradient_norm
from training.guard import StepGuard
from training.metrics import AverageMeter, get_clip_metrics
from training.objective import SHARED, LossModule, Objective, Outputs, concatenate
from training.signals import Stopped

__all__ = [
    "AverageMeter", "Progress", "Trainer", "backward", "evaluate", "get_clip_metrics", "maybe_compute_generative_loss",
    "postprocess_clip_output", "run_epoch", "train_one_epoch", "unwrap_model",
]  # fmt: skip

logger = logging.getLogger(__name__)

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


@dataclass
class Progress:
    """What an epoch has come to: its losses, summed on the device, and its pace.

    Numbers are of the steps since the last `report`, averages of the epoch. `bad` of the steps were skipped by the
    guard: their losses count for nothing.
    """

    objective_losses: dict[str, AverageMeter] = field(default_factory=dict)
    sums: Outputs = field(default_factory=dict)
    bad: Tensor | float = 0
    steps: int = 0
    samples: int = 0
    data_seconds: float = 0.0
    save_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, losses: Outputs, samples: int, data_seconds: float, bad: Tensor | None = None) -> None:
        """One step: its losses on the device, its samples over all ranks, and how long it waited for data."""
        if bad is not None:
            losses = {name: torch.where(bad, 0, loss) for name, loss in losses.items()}
            self.bad = self.bad + bad
        self.sums = {name: self.sums[name] + loss if name in self.sums else loss for name, loss in losses.items()}
        self.steps += 1
        self.samples += samples
        self.data_seconds += data_seconds

    def report(self, logit_scale: Tensor | None, counters: Outputs | None = None) -> dict[str, float]:
        """The numbers by TensorBoard's names, losses as means over the steps. Waits for the device.

        counters: scalars on the device that are fetched with them.
        """
        good = self.steps - self.bad
        scalars = {name: value / good for name, value in self.sums.items()}
        if logit_scale is not None:
            scalars["scale"] = logit_scale.detach().exp().mean()
        if isinstance(self.bad, Tensor):
            scalars["bad"] = self.bad
        scalars |= counters or {}
        # one copy for all
        values = torch.stack([scalar.float() for scalar in scalars.values()]).tolist()
        fetched = dict(zip(scalars, values, strict=True))
        seconds = max(time.perf_counter() - self.started, 1e-9)
        counted = self.steps - int(fetched.pop("bad", 0))
        for name in self.sums if counted else ():
            self.objective_losses.setdefault(name, AverageMeter()).update(fetched[name], counted)
        numbers = {
            "data_time": self.data_seconds / self.steps,
            "batch_time": seconds / self.steps,
            "samples_per_second": self.samples / seconds,
            "samples_per_second_per_gpu": self.samples / seconds / world().world_size,
            **fetched,
        }
        if self.save_seconds:
            numbers["save_time"] = self.save_seconds
        self.sums, self.bad, self.steps, self.samples = {}, 0, 0, 0
        self.data_seconds, self.save_seconds = 0.0, 0.0
        self.started = time.perf_counter()
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to log what the unbroken one would have; its tensors are on the device."""
        return {
            "meters": {name: vars(meter).copy() for name, meter in self.objective_losses.items()},
            "sums": self.sums,
            "bad": self.bad,
            "steps": self.steps,
            "samples": self.samples,
            "data_seconds": self.data_seconds,
            "seconds": time.perf_counter() - self.started,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device) -> Progress:
        """From `state_dict`; a new one from an empty dict."""
        if not state:
            return cls()
        progress = cls(
            sums={name: value.to(device) for name, value in state["sums"].items()},
            bad=state["bad"].to(device) if isinstance(state["bad"], Tensor) else state["bad"],
            steps=state["steps"],
            samples=state["samples"],
            data_seconds=state["data_seconds"],
            started=time.perf_counter() - state["seconds"],
        )
        for name, values in state["meters"].items():
            vars(progress.objective_losses.setdefault(name, AverageMeter())).update(values)
        return progress


def run_epoch(
    trainer: Trainer,
    data: Any,
    state: TrainState,
    log_every_n_steps: int = 100,
    writer: Any = None,
    around_step: Callable[[int], contextlib.AbstractContextManager] = contextlib.nullcontext,
    after_step: Callable[[], float] = lambda: 0.0,
) -> None:
    """Trains epoch number `state.epoch` on `data` (training.data.DataInfo), and keeps `state` up to date.

    Batches are dicts {"image": float or uint8 [B, 3, H, W], "text": int64 [B, L]}. uint8 images are normalized on the
    device (`training.batches.to_device`). A step takes `trainer.accum_freq` batches; an incomplete last step is left
    out, so an epoch has `state.steps_per_epoch` steps. Where `state` is within an epoch, the rest of it is done: `data`
    goes on where it was saved.
    `writer`: training.logger.MetricsWriter. `around_step`: makes a context for the step of a number. `after_step`: is
    called when `state` is one to save, but not at the epoch's end; returns the seconds that saving took from the loop.

    Raises:
        RuntimeError: where the data give not a single step.
        TooManyBadSteps: see training.guard. TooManyBadSamples: see training.data.skips.
        Stopped: after a signal, between two steps on all ranks; see training.signals.Agreement.
    """
    trainer.model.train()
    data.set_epoch(state.epoch)
    first_step, world_size = state.epoch * state.steps_per_epoch, world().world_size
    state.progress = progress = Progress.restored(state.progress, trainer.device)
    done = state.epoch_step >= state.steps_per_epoch  # resumed on more processes, there may be too few samples left
    for batches, data_seconds in () if done else _steps(data.dataloader, trainer):
        number = first_step + state.epoch_step
        with around_step(number):
            losses = trainer.step(batches, number)
        samples = sum(len(batch["image"]) for batch in batches) * world_size
        state.epoch_step += 1
        state.epoch_samples += samples
        state.step = number + 1
        state.samples_seen += samples
        progress.add(losses, samples, data_seconds, None if trainer.guard is None else trainer.guard.bad)
        at_end = state.epoch_step == state.steps_per_epoch
        if (state.epoch_step - 1) % log_every_n_steps == 0 or at_end:
            _report(trainer, progress, state, data, writer)
        if at_end:
            break
        progress.save_seconds += after_step()
    if state.epoch_step == 0:
        raise RuntimeError(
            f"The training data gave fewer batches than the {trainer.accum_freq} that one step takes: use a smaller "
            "--batch-size, fewer processes, or a smaller --accum-freq."
        )
    state.epoch += 1
    state.epoch_step = state.epoch_samples = 0
    state.progress = {}


def _report(trainer: Trainer, progress: Progress, state: TrainState, data: Any, writer: Any) -> None:
    """A line of log, and its numbers to the writer; on all ranks, so that all of them find a run that is stuck."""
    counters = None if trainer.guard is None else trainer.guard.counters()
    numbers = progress.report(getattr(unwrap_model(trainer.model), "logit_scale", None), counters)
    if trainer.pairs_at_peak is not None:
        numbers["mfu"] = numbers["samples_per_second_per_gpu"] / trainer.pairs_at_peak
    numbers["lr"] = trainer.optimizer.param_groups[0]["lr"]
    skips = "" if getattr(data, "skipped", None) is None else str(report_skips(data))
    logger.info(" ".join(filter(None, (_line(numbers, progress, state, trainer.device), skips))))
    if writer is not None:
        writer.write(numbers, state.step - 1, "train")
    if trainer.guard is not None:
        trainer.guard.check(int(numbers["bad_in_a_row"]))


def _steps(loader: Any, trainer: Trainer) -> Iterator[tuple[list[Batch], float]]:
    """The batches of each step, on the device, and how many seconds they were waited for."""
    batches: list[Batch] = []
    start = time.perf_counter()
    waited = 0.0
    normalization = getattr(loader, "normalization", None)
    position = getattr(loader, "position", None) if trainer.accum_freq > 1 else None
    if position is not None:
        position.mark()
    try:
        for batch in loader:
            waited += time.perf_counter() - start
            batches.append(
                to_device(
                    batch, trainer.device, trainer.input_dtype,
                    normalization=normalization, group_text=trainer.group_text,
                )
            )  # fmt: skip
            if len(batches) == trainer.accum_freq:
                yield batches, waited
                batches, waited = [], 0.0
                if position is not None:
                    position.mark()
            start = time.perf_counter()
    except Stopped:
        if position is not None:
            position.rewind()  # the batches of a step that is not made will come again
        raise


def _line(
    numbers: dict[str, float],
    progress: Progress,
    state: TrainState,
    device: torch.device,
) -> str:
    """A line of log, in the form that open_clip's have."""
    total = str(state.samples_per_epoch)
    percent = 100 * state.epoch_step / state.steps_per_epoch
    parts = [
        f"Train Epoch: {state.epoch} [{state.epoch_samples:>{len(total)}}/{total} ({percent:.0f}%)]",
        f"Data (t): {numbers['data_time']:.3f}",
        f"Batch (t): {numbers['batch_time']:.3f},",
        f"{numbers['samples_per_second']:.6g}/s, {numbers['samples_per_second_per_gpu']:.6g}/s/device",
        f"LR: {numbers['lr']:.6g}",
    ]
    if "mfu" in numbers:
        parts.append(f"MFU: {numbers['mfu']:.1%}")
    if "scale" in numbers:
        parts.append(f"Logit Scale: {numbers['scale']:.3f}")
    for name, meter in progress.objective_losses.items():
        parts.append(f"{name.capitalize()}: {meter.val:#.5g} ({meter.avg:#.5g})")
    if "save_time" in numbers:
        parts.append(f"Save (t): {numbers['save_time']:.3f}")
    for name, words in (("skipped_steps", "Bad steps"), ("scaler_overflows", "Overflows")):
        if numbers.get(name):
            parts.append(f"{words}: {numbers[name]:.0f}")
    memory = devices.get(device).memory(device.index)
    if memory:
        parts.append(f"Memory: {memory['allocated'] / 2**30:.2f} GiB (peak {memory['peak'] / 2**30:.2f})")
    return " ".join(parts)


# Names of open_clip_train.train, for scripts.


def postprocess_clip_output(model_out: Any) -> Outputs:
    """The first three of a model's tuple by name: image_features, text_features, logit_scale."""
    return {name: model_out[index] for index, name in enumerate(("image_features", "text_features", "logit_scale"))}


def backward(total_loss: Tensor, scaler: Any) -> None:
    """The backward pass, of the scaled loss where there is a gradient scaler."""
    (total_loss if scaler is None else scaler.scale(total_loss)).backward()


def evaluate(
    model: nn.Module,
    data: Mapping[str, Any],
    epoch: int,
    args: Any,
    tb_writer: Any = None,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
) -> dict[str, float]:
    """`training.evaluate.evaluate`, whose metrics the master also logs and writes.

    Every rank calls it: evaluation is spread over them.

    args: as there, and save_logs, checkpoint_path: whether and in which folder results.jsonl gets a line.
    tb_writer: of TensorBoard.
    """
    metrics = evaluation.evaluate(unwrap_model(model), data, epoch, args, tokenizer)
    if not metrics or not world().is_master:
        return metrics
    logger.info("Eval Epoch: %d %s", epoch, "\t".join(f"{name}: {value:.4f}" for name, value in metrics.items()))
    if tb_writer is not None:
        _ScalarWriter(tb_writer).write(metrics, epoch, "val")
    if getattr(args, "save_logs", False):
        with open(Path(args.checkpoint_path) / "results.jsonl", "a", encoding="utf-8") as results:
            results.write(json.dumps(metrics) + "\n")
    return metrics


class _ScalarWriter:
    """A TensorBoard writer with MetricsWriter's `write`."""

    def __init__(self, tensorboard: Any) -> None:
        self._tensorboard = tensorboard

    def write(self, metrics: Mapping[str, float], step: int, prefix: str) -> None:
        for name, value in metrics.items():
            self._tensorboard.add_scalar(f"{prefix}/{name}", value, step)


def train_one_epoch(
    model: nn.Module,
    data: Mapping[str, Any],
    loss: Objective | nn.Module,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    scheduler: Callable[[int], Any] | None,
    dist_model: nn.Module | None,
    args: Any,
    tb_writer: Any = None,
) -> None:
    """`run_epoch` with the parameters that it has in open_clip_train, for scripts.

    loss: an objective, or a module of open_clip.create_loss, with `dist_model` as the teacher of a distillation loss.
    args: device, precision, accum_freq, grad_clip_norm, log_every_n_steps, skip_scheduler. tb_writer: of TensorBoard.
    """
    device = torch.device(args.device)
    precision = precisions.resolve(args.precision, device)
    trainer = Trainer(
        model=model,
        objective=loss if isinstance(loss, Objective) else LossModule(loss, dist_model),
        optimizer=optimizer,
        device=device,
        scaler=scaler,
        scheduler=None if args.skip_scheduler else scheduler,
        autocast=precisions.get_autocast(precision, device.type),
        half_weights=half_weights.create(unwrap_model(model), precision, device),
        input_dtype=open_clip.get_input_dtype(args.precision),
        group_text=TextGrouping([unwrap_model(model), *([] if dist_model is None else [dist_model])], device, 4),
        accum_freq=args.accum_freq,
        grad_clip_norm=args.grad_clip_norm,
    )
    loader = data["train"].dataloader
    state = TrainState(
        model=unwrap_model(model),
        device=device,
        steps_per_epoch=loader.num_batches // args.accum_freq,
        samples_per_epoch=loader.num_samples,
        epoch=epoch,
    )
    writer = None if tb_writer is None else _ScalarWriter(tb_writer)
    run_epoch(trainer, data["train"], state, args.log_every_n_steps, writer)
