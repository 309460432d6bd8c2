"""One epoch: batches through the trainer, and a line of log now and then."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from training.batches import to_device
from training.checkpoint.state import TrainState
from training.data.skips import report_skips
from training.progress import Progress, format_line
from training.ranks import world
from training.signals import Stopped
from training.trainer import Batch, Trainer, unwrap_model

logger = logging.getLogger(__name__)


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
        TooManyBadSteps: see training.step_guard. TooManyBadSamples: see training.data.skips.
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
    logger.info(" ".join(filter(None, (format_line(numbers, progress, state, trainer.device), skips))))
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
