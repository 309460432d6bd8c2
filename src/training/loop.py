"""The run: build, resume, and for each epoch train, save, evaluate."""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from training import compilation, components, ranks, run_folder
from training.checkpoint import rng
from training.checkpoint.saver import NullSaver
from training.components import Components
from training.epoch import run_epoch
from training.evaluate import evaluate, evaluators_due
from training.logger import MetricsWriter
from training.ranks import World
from training.signals import Agreement, Stopped, StopSignals
from training.trainer import Trainer

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace, world: World, signals: StopSignals) -> None:
    """Do what the options say: train and evaluate, or only evaluate.

    Raises:
        Stopped: a signal has stopped the run, after it was saved.
        ValueError, OSError, RuntimeError: something does not fit or has failed; the message says how to fix it.
    """
    this = run_folder.open_run(options, world)
    with run_folder.create_metrics_writer(this, options) as writer, run_folder.keep_remote_copy(this):
        agreement = Agreement(signals)
        parts = components.build(this, writer, agreement)
        with contextlib.ExitStack() as stack:
            for info in parts.data.values():
                stack.callback(info.dataloader.close)  # type: ignore[attr-defined]  # a training.data.loader.Loader
            saver = stack.enter_context(components.create_saver(this, parts))
            if parts.trainer is None:
                run_evaluators(parts, writer, is_last_epoch=True)
            else:
                epochs = this.cfg.schedule.epochs
                with components.tracing(this) as around_step, signals.deferred():
                    TrainLoop(parts, parts.trainer, epochs, saver, writer, signals, agreement, around_step).run()
            saver.finish_shared()
            ranks.leave()
            saver.finish()  # the other ranks do not wait for what the master still writes


@dataclass
class TrainLoop:
    """The epochs of a run.

    Attributes:
        epochs: the number of epochs after which the run is complete.
        around_step: creates a context for the step with the given number.
    """

    parts: Components
    trainer: Trainer
    epochs: int
    saver: NullSaver
    writer: MetricsWriter
    signals: StopSignals
    agreement: Agreement
    around_step: Callable[[int], contextlib.AbstractContextManager]

    def run(self) -> None:
        state = self.parts.state
        if state.epoch >= self.epochs:
            logger.warning("The run already has %d epochs. Use a larger --epochs to continue.", state.epoch)
        while state.epoch < self.epochs:
            logger.info("Start epoch %d", state.epoch)
            self._train_epoch()
            self.saver.after_epoch()  # before the evaluation, which may fail
            self._stop_if_signalled()
            self._evaluate_epoch()
            self.saver.after_evaluation()
        self.trainer.guard.check_run()

    def _train_epoch(self) -> None:
        parts = self.parts
        try:
            run_epoch(self.trainer, parts.data["train"], parts.state, parts.progress, self.saver, self.around_step)
        except Stopped as stopped:
            self._stop(stopped.number)

    def _stop_if_signalled(self) -> None:
        number = self.agreement.at_epoch_end()
        if number:
            self._stop(number)

    def _stop(self, signal: int) -> NoReturn:
        """Save and stop, on all ranks."""
        self.saver.stop(is_collective=True)
        ranks.leave()
        raise Stopped(signal)

    def _evaluate_epoch(self) -> None:
        is_last = self.parts.state.epoch == self.epochs
        try:
            with self.signals.at_once():
                run_evaluators(self.parts, self.writer, is_last)
        except Stopped:
            self.saver.stop(is_collective=False)  # other ranks may still be evaluating
            raise


def run_evaluators(parts: Components, writer: MetricsWriter, is_last_epoch: bool) -> None:
    """Run the evaluators that are due, log the metrics, and write them. All ranks call this; the master writes.

    The random states of training do not change. After the last epoch, all evaluators are due.
    """
    start, state = time.perf_counter(), parts.state
    due = evaluators_due(parts.evaluators, state.epoch, is_last_epoch)
    half_weights = contextlib.nullcontext if parts.trainer is None else parts.trainer.half_weights
    with rng.untouched(state.device), compilation.paused(state.model):
        metrics = evaluate(state.model, due, state.epoch, half_weights)
        if metrics and parts.average.is_enabled:
            with parts.average.in_place():  # without half_weights, which may be copies of the optimizer's buffers
                averaged = evaluate(state.model, due, state.epoch)
            metrics |= {f"ema_{name}": averaged[name] for name in averaged if name not in ("epoch", "num_samples")}
    if not metrics:
        return
    numbers = "\t".join(f"{name}: {value:.4f}" for name, value in metrics.items() if name != "epoch")
    logger.info("Eval Epoch: %d %s\ttook %.1f s", state.epoch, numbers, time.perf_counter() - start)
    writer.write(metrics, state.epoch, "val")
    writer.write_results(metrics, state.epoch)
