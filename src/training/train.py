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
from training import precision as precisions
from training import rng
from training.batches import to_device
from training.checkpoint import TrainState
from training.distributed import world
from training.evaluate import maybe_compute_generative_loss
from training.metrics import AverageMeter, get_clip_metrics
from training.objective import SHARED, LossModule, Objective, Outputs, concatenate

__all__ = [
    "AverageMeter", "Progress", "Trainer", "backward", "evaluate", "get_clip_metrics", "maybe_compute_generative_loss",
    "postprocess_clip_output", "run_epoch", "train_one_epoch", "unwrap_model",
]  # fmt: skip

logger = logging.getLogger(__name__)

MAX_LOGIT_SCALE = math.log(100)  # CLIP's bound, arXiv:2103.00020, section 2.5
Batch = Mapping[str, Tensor]


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
    accum_freq: batches of one step, see `_accumulate`. grad_clip_norm: bound of the gradient's global 2-norm.
    pairs_at_peak: what a device could do in a second, for the log's MFU; None where that is not known.
    """

    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    device: torch.device
    scaler: Any = None
    scheduler: Callable[[int], Any] | None = None
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    input_dtype: torch.dtype | None = None
    accum_freq: int = 1
    grad_clip_norm: float | None = None
    pairs_at_peak: float | None = None

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
        self.optimizer.zero_grad()  # to None or to zero, as the optimizer prefers
        losses = self.backward(batches)
        self._update()
        logit_scale = getattr(unwrap_model(self.model), "logit_scale", None)
        if logit_scale is not None:
            with torch.no_grad():
                logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        return losses

    def backward(self, batches: list[Batch]) -> Outputs:
        """Adds the gradient of the loss over the samples of all batches (times the scaler's factor); the losses."""
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
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _update(self) -> None:
        if self.scaler is None:
            self._clip()
            self.optimizer.step()
            return
        if self.grad_clip_norm is not None:
            self.scaler.unscale_(self.optimizer)  # the bound is of the true gradient
            self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _clip(self) -> None:
        if self.grad_clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip_norm, norm_type=2.0)


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

    Numbers are of the steps since the last `report`, averages of the epoch.
    """

    objective_losses: dict[str, AverageMeter] = field(default_factory=dict)
    sums: Outputs = field(default_factory=dict)
    steps: int = 0
    samples: int = 0
    data_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, losses: Outputs, samples: int, data_seconds: float) -> None:
        """One step: its losses on the device, its samples over all ranks, and how long it waited for data."""
        self.sums = {name: self.sums[name] + loss if name in self.sums else loss for name, loss in losses.items()}
        self.steps += 1
        self.samples += samples
        self.data_seconds += data_seconds

    def report(self, logit_scale: Tensor | None) -> dict[str, float]:
        """The numbers by TensorBoard's names, losses as means over the steps. Waits for the device."""
        scalars = [value / self.steps for value in self.sums.values()]
        if logit_scale is not None:
            scalars.append(logit_scale.detach().exp().mean())
        fetched = torch.stack([scalar.float() for scalar in scalars]).tolist()  # one copy for all
        seconds = max(time.perf_counter() - self.started, 1e-9)
        losses = dict(zip(self.sums, fetched, strict=False))
        for name, value in losses.items():
            self.objective_losses.setdefault(name, AverageMeter()).update(value, self.steps)
        numbers = {
            "data_time": self.data_seconds / self.steps,
            "batch_time": seconds / self.steps,
            "samples_per_second": self.samples / seconds,
            "samples_per_second_per_gpu": self.samples / seconds / world().world_size,
            **losses,
        }
        if logit_scale is not None:
            numbers["scale"] = fetched[-1]
        self.sums, self.steps, self.samples, self.data_seconds = {}, 0, 0, 0.0
        self.started = time.perf_counter()
        return numbers


def run_epoch(
    trainer: Trainer,
    data: Any,
    state: TrainState,
    log_every_n_steps: int = 100,
    writer: Any = None,
    around_step: Callable[[int], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """Trains epoch number `state.epoch` on `data` (training.data.DataInfo), and keeps `state` up to date.

    Batches are dicts {"image": float [B, 3, H, W], "text": int64 [B, L]}. A step takes `trainer.accum_freq` of them; an
    incomplete last one is left out, so an epoch has `state.steps_per_epoch` steps, those of a resumed run included.
    `writer`: training.logger.MetricsWriter. `around_step`: makes a context for the step of a number.

    Raises:
        RuntimeError: where the data give not a single step.
    """
    trainer.model.train()
    data.set_epoch(state.epoch)
    first_step, world_size = state.epoch * state.steps_per_epoch, world().world_size
    progress, samples_done, done = Progress(), 0, 0
    for batches, data_seconds in _steps(data.dataloader, trainer):
        with around_step(first_step + done):
            losses = trainer.step(batches, first_step + done)
        samples = sum(len(batch["image"]) for batch in batches) * world_size
        done += 1
        samples_done += samples
        state.step = first_step + done
        state.samples_seen += samples
        progress.add(losses, samples, data_seconds)
        if (done - 1) % log_every_n_steps == 0 or done == state.steps_per_epoch:
            numbers = progress.report(getattr(unwrap_model(trainer.model), "logit_scale", None))
            if trainer.pairs_at_peak is not None:
                numbers["mfu"] = numbers["samples_per_second_per_gpu"] / trainer.pairs_at_peak
            numbers["lr"] = trainer.optimizer.param_groups[0]["lr"]
            logger.info(_line(numbers, progress, state, samples_done, done, trainer.device, data))
            if writer is not None:
                writer.write(numbers, state.step - 1, "train")
    if done == 0:
        raise RuntimeError(
            f"The training data gave fewer batches than the {trainer.accum_freq} that one step takes: use a smaller "
            "--batch-size, fewer processes, or a smaller --accum-freq."
        )
    state.epoch += 1


def _steps(loader: Any, trainer: Trainer) -> Iterator[tuple[list[Batch], float]]:
    """The batches of each step, on the device, and how many seconds they were waited for."""
    batches: list[Batch] = []
    start = time.perf_counter()
    waited = 0.0
    for batch in loader:
        waited += time.perf_counter() - start
        batches.append(to_device(batch, trainer.device, trainer.input_dtype))
        if len(batches) == trainer.accum_freq:
            yield batches, waited
            batches, waited = [], 0.0
        start = time.perf_counter()


def _line(
    numbers: dict[str, float],
    progress: Progress,
    state: TrainState,
    samples_done: int,
    steps_done: int,
    device: torch.device,
    data: Any,
) -> str:
    """A line of log, in the form that open_clip's have."""
    total = str(state.samples_per_epoch)
    percent = 100 * steps_done / state.steps_per_epoch
    parts = [
        f"Train Epoch: {state.epoch} [{samples_done:>{len(total)}}/{total} ({percent:.0f}%)]",
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
    memory = devices.row(device).memory(device.index)
    if memory:
        parts.append(f"Memory: {memory['allocated'] / 2**30:.2f} GiB (peak {memory['peak'] / 2**30:.2f})")
    skipped = getattr(data, "skipped", None)
    if skipped is not None and skipped.total():
        parts.append(f"Skipped: {skipped.total()}")
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
    trainer = Trainer(
        model=model,
        objective=loss if isinstance(loss, Objective) else LossModule(loss, dist_model),
        optimizer=optimizer,
        device=device,
        scaler=scaler,
        scheduler=None if args.skip_scheduler else scheduler,
        autocast=precisions.get_autocast(precisions.resolve(args.precision, device), device.type),
        input_dtype=open_clip.get_input_dtype(args.precision),
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
