"""One epoch: the batches of each step through the trainer, and a log line now and then."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from training import scheduler
from training.batches import num_samples, num_tokens, to_device
from training.checkpoint.saver import NullSaver
from training.checkpoint.state import TrainState
from training.data.loader import ENDS_STEP
from training.data.skips import report_skips
from training.progress import Progress, format_line
from training.ranks import world
from training.signals import Stopped
from training.trainer import Batch, Trainer, unwrap_model

logger = logging.getLogger(__name__)

_SAVES_NOTHING = NullSaver()


def run_epoch(
    trainer: Trainer,
    data: Any,
    state: TrainState,
    progress: Progress,
    saver: NullSaver = _SAVES_NOTHING,
    around_step: Callable[[int], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """Train epoch number `state.epoch`, or the rest of it if `state` and `data` are within the epoch.

    A step takes `trainer.accum_freq` batches, or those up to one that says that it ends the step. An incomplete last
    step is left out, so an epoch has `state.steps_per_epoch` steps.

    Args:
        data: training.data.DataInfo. Its batches are dicts with the inputs of the model, such as {"image": float or
            uint8 [B, 3, H, W], "text": int64 [B, L]}, whose values may be dicts. uint8 images are normalized on the
            device, see `training.batches.to_device`.
        state: updated after each step.
        progress: collects the losses, and reports them to its writer.
        saver: called after each step but the last.
        around_step: creates a context for the step with the given number.

    Raises:
        RuntimeError: the data do not give a single step.
        TooManyBadSteps: see training.step_guard.
        TooManyBadSamples: see training.data.skips.
        Stopped: after a signal, on all ranks between the same two steps; see training.signals.Agreement.
    """
    trainer.model.train()
    data.set_epoch(state.epoch)
    progress.start_epoch()
    first_step, world_size = state.epoch * state.steps_per_epoch, world().world_size
    is_done = state.epoch_step >= state.steps_per_epoch  # on more ranks than before, too few samples may be left
    for batches, data_seconds in () if is_done else _steps(data.dataloader, trainer):
        number = first_step + state.epoch_step
        if trainer.rehearses:
            progress.exclude(trainer.rehearse(batches))
        with around_step(number):
            losses = trainer.step(batches, number)
        samples = sum(num_samples(batch, trainer.objective.traits.sample_key) for batch in batches) * world_size
        state.add_step(samples)
        progress.add(losses, samples, data_seconds, trainer.guard.bad, _count_tokens(batches))
        is_last = state.epoch_step == state.steps_per_epoch
        if is_last or progress.is_line_due(state.epoch_step):
            _log_line(trainer, data, state, progress)
        if progress.is_point_due(state.epoch_step) or (is_last and progress.log_metric_every_n_steps is not None):
            _write_point(trainer, state, progress)
        if is_last:
            break
        saver.after_step()
        progress.add_saving(saver.take_waited())
    if state.epoch_step == 0:
        raise RuntimeError(
            f"The training data gave fewer batches than the {trainer.accum_freq} of one step. Use a smaller "
            "--batch-size, fewer processes, or a smaller --accum-freq."
        )
    if progress.bottleneck():
        logger.info("%s", progress.bottleneck())
    state.end_epoch()
    progress.end_epoch()


def steps_per_epoch(loader: Any, accum_freq: int) -> int:
    """Return how many steps an epoch has, for a step of `accum_freq` batches unless the loader knows the number."""
    steps = getattr(loader, "steps_per_epoch", None)
    return loader.num_batches // accum_freq if steps is None else steps


def _count_tokens(batches: list[Batch]) -> Counter[str]:
    tokens: Counter[str] = Counter()
    for batch in batches:
        tokens.update(num_tokens(batch))
    return tokens


def _log_line(trainer: Trainer, data: Any, state: TrainState, progress: Progress) -> None:
    """Log a line. All ranks do this: they count bad samples together."""
    numbers = _add_counters(progress.report(*_scalars_of(trainer)), trainer)
    parts = [format_line(numbers, progress, state), str(report_skips(data))]
    logger.info(" ".join(filter(None, parts)))
    if progress.log_metric_every_n_steps is None:
        progress.writer.write(numbers, state.step - 1, "train")
    trainer.guard.check(numbers)


def _write_point(trainer: Trainer, state: TrainState, progress: Progress) -> None:
    numbers = _add_counters(progress.point(*_scalars_of(trainer)), trainer)
    progress.writer.write(numbers, state.step - 1, "train")
    trainer.guard.check(numbers)


def _scalars_of(trainer: Trainer) -> tuple[Any, Any]:
    """Return the logit scale and the guard's counters, on the device."""
    return getattr(unwrap_model(trainer.model), "logit_scale", None), trainer.guard.counters()


def _add_counters(numbers: dict[str, float], trainer: Trainer) -> dict[str, float]:
    return numbers | trainer.compilation.counters() | {"lr": scheduler.unscaled_lr(trainer.optimizer.param_groups[0])}


def _steps(loader: Any, trainer: Trainer) -> Iterator[tuple[list[Batch], float]]:
    """Yield the batches of each step, on the device, and the seconds that the step has waited for them."""
    batches: list[Batch] = []
    start = time.perf_counter()
    waited = 0.0
    normalization = getattr(loader, "normalization", None)
    position = getattr(loader, "position", None) or _NO_POSITION
    position.mark()
    try:
        for batch in loader:
            waited += time.perf_counter() - start
            moved = to_device(
                batch, trainer.device, trainer.precision.input_dtype,
                trainer.objective.traits.inputs, normalization, trainer.unpad,
            )  # fmt: skip
            ends_step = moved.pop(ENDS_STEP, None)
            batches.append(moved)
            if len(batches) == trainer.accum_freq if ends_step is None else ends_step:
                yield batches, waited
                batches, waited = [], 0.0
                position.mark()
            start = time.perf_counter()
    except Stopped:
        position.rewind()  # the batches of an incomplete step are read again after a resume
        raise


class _NoPosition:
    """The position of loaders that are not from training.data."""

    def mark(self) -> None:
        pass

    def rewind(self) -> None:
        pass


_NO_POSITION = _NoPosition()
