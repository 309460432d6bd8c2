"""The run: build everything once, resume, and for each epoch train, save and evaluate."""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import open_clip
from open_clip import device as devices
from training import half_weights, precision, preflight, ranks, run_folder, run_warnings
from training import logger as logs
from training.batches import TextGrouping, to_pixels
from training.build import (
    build_model,
    build_scheduler,
    build_teacher,
    parallelise,
    start_logit_bias,
    synchronise_batch_norms,
)
from training.checkpoint import rng
from training.checkpoint.rng import random_seed
from training.checkpoint.saver import Saver
from training.checkpoint.state import TrainState, check_fit, load_checkpoint
from training.data import DataInfo, get_data
from training.ema import WeightAverage
from training.epoch import run_epoch
from training.evaluate import evaluate
from training.flops import pairs_at_peak
from training.objective import create_objective
from training.optim import create_optimizer
from training.params import CheckpointConfig, LoggingConfig, ModelConfig, TrainConfig, sections
from training.params.checks import step_range
from training.ranks import World
from training.signals import Agreement, Stopped, StopSignals
from training.step_guard import StepGuard
from training.trace import StepTrace
from training.trainer import Trainer

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace, world: World, signals: StopSignals) -> None:
    cfg = run_folder.complete(sections(options), world)
    folder, resume_from = run_folder.prepare(cfg.checkpoint, world)
    run_folder.start_log(cfg, options, world, folder)
    if cfg.logging.copy_codebase and folder is not None and world.is_master:
        run_folder.copy_codebase(cfg.checkpoint)
    metrics_writer = run_folder.create_metrics_writer(cfg, options, world, folder, resume_from)
    with metrics_writer as writer, run_folder.keep_remote_copy(cfg.checkpoint, world, folder):
        _train_and_evaluate(cfg, world, folder, resume_from, writer, signals)


def _train_and_evaluate(
    cfg: TrainConfig,
    world: World,
    folder: Path | None,
    resume_from: str | None,
    writer: logs.MetricsWriter,
    signals: StopSignals,
) -> None:
    """Builds everything once, in the order in which the parts need each other, and goes through the epochs."""
    chosen = str(cfg.model.precision)
    devices.get(world.device).set_fast_matmul(cfg.model.fp32_matmul == "high")
    random_seed(cfg.data.seed, 0)  # the same initial weights on every rank
    with _without_factory_warnings(resume_from is not None or not world.is_master):
        model, preprocess_train, preprocess_val = build_model(cfg.model, cfg.objective, chosen, world.device)
    random_seed(cfg.data.seed, world.rank)
    tokenizer = open_clip.get_tokenizer(
        cfg.model.model, context_length=cfg.model.force_context_length, cache_dir=cfg.model.cache_dir
    )
    preflight.check_tokenizer(model, tokenizer)
    state = TrainState(model=model, device=world.device, name=str(cfg.checkpoint.name), seed=cfg.data.seed)
    checkpoint = None if resume_from is None else load_checkpoint(resume_from)
    if checkpoint is not None:
        check_fit(model, checkpoint.get("state_dict", checkpoint))
    data = get_data(
        cfg.data,
        (to_pixels(preprocess_train), to_pixels(preprocess_val)),
        epoch=0 if checkpoint is None else int(checkpoint.get("epoch", 0)),
        tokenizer=tokenizer,
    )
    preflight.check_evaluation_data(model, data, cfg.eval, world.device)
    if "train" in data and cfg.objective.siglip and checkpoint is None:
        start_logit_bias(model)
    trainer = _build_trainer(cfg, world, state, data["train"], folder) if "train" in data else None
    if trainer is None and cfg.optim.ema_decay is not None:
        state.average = WeightAverage(model, cfg.optim.ema_decay)
    _resume(state, checkpoint, resume_from, cfg.checkpoint)
    if trainer is not None:
        trainer.rehearses = checkpoint is not None and world.distributed
        run_folder.warn(_run_warnings(cfg, state, trainer, checkpoint or {}, folder), world)
    del checkpoint
    saver = None
    if trainer is not None and folder is not None:
        saver = Saver(cfg.checkpoint, folder / "checkpoints", state, cfg.schedule.epochs)
    try:
        if trainer is None:
            # Whatever the frequencies say: this epoch counts as the last one.
            _evaluate(state, data, _evaluation_options(cfg, epochs=state.epoch), tokenizer, writer)
        else:
            with _tracing(cfg.logging, world, folder) as around_step, signals.deferred():
                _train(cfg, state, trainer, data, tokenizer, saver, writer, around_step, signals)
        ranks.leave()
        # What the master still writes and copies, nobody waits for.
        if saver is not None:
            saver.finish()
    except KeyboardInterrupt:  # a second Ctrl-C: what is being written stays a beginning
        saver = None
        raise
    finally:
        if saver is not None:
            saver.close()
        for info in data.values():
            info.dataloader.close()  # type: ignore[attr-defined]  # training.data's own loaders have it


@contextlib.contextmanager
def _without_factory_warnings(hidden: bool) -> Iterator[None]:
    """Hide "no pretrained weights": the same on all ranks, and not true of a run that loads a checkpoint."""
    factory_log = logging.getLogger("open_clip.factory")
    level = factory_log.level
    if hidden:
        factory_log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        factory_log.setLevel(level)


def _build_trainer(cfg: TrainConfig, world: World, state: TrainState, train: DataInfo, folder: Path | None) -> Trainer:
    """Everything that moves the weights; completes `state` with what of it must be saved."""
    model, chosen = state.model, str(cfg.model.precision)
    loader: Any = train.dataloader
    state.steps_per_epoch = loader.num_batches // cfg.optim.accum_freq
    state.samples_per_epoch = loader.num_samples
    state.samples_per_step = cfg.data.batch_size * cfg.optim.accum_freq * world.world_size
    state.data = train
    if state.steps_per_epoch == 0:
        raise ValueError(
            f"An epoch has {loader.num_batches} batches per process, fewer than --accum-freq {cfg.optim.accum_freq}: "
            "give more data, a smaller --batch-size or a smaller --accum-freq."
        )
    if cfg.model.use_bn_sync and world.distributed:
        state.model = model = synchronise_batch_norms(model)
    teacher = build_teacher(cfg.objective, chosen, world.device, cfg.model.cache_dir)
    if teacher is not None:
        preflight.check_teacher(model, teacher)
    objective = create_objective(cfg.objective, model, teacher)
    state.optimizer = create_optimizer(model, cfg.optim, world.device)
    state.scaler = precision.grad_scaler(chosen, world.device)
    if cfg.optim.ema_decay is not None:
        state.average = WeightAverage(model, cfg.optim.ema_decay)
    remembered = cfg.logging.log_every_n_steps + cfg.optim.max_bad_steps  # the host learns of them when it logs
    state.guard = StepGuard(model, state.optimizer, world.device, cfg.optim.max_bad_steps, folder, remembered)
    at_peak = pairs_at_peak(model, teacher, chosen, cfg.model.fp32_matmul, world.device)
    if cfg.model.torchcompile:
        model.compile()  # in place: names in the checkpoint stay what they are
    return Trainer(
        model=parallelise(model, cfg.distributed, world, cfg.optim.accum_freq),
        objective=objective,
        optimizer=state.optimizer,
        device=world.device,
        scaler=state.scaler,
        scheduler=build_scheduler(state.optimizer, cfg.schedule, cfg.optim, state.steps_per_epoch),
        autocast=precision.get_autocast(chosen, world.device.type),
        half_weights=half_weights.create(model, chosen, world.device, getattr(state.optimizer, "flats", ())),
        input_dtype=open_clip.get_input_dtype(chosen),
        group_text=TextGrouping([model, teacher], world.device, _text_groups(cfg.model)),
        accum_freq=cfg.optim.accum_freq,
        grad_clip_norm=cfg.optim.grad_clip_norm,
        pairs_at_peak=at_peak,
        guard=state.guard,
        average=state.average,
    )


def _text_groups(cfg: ModelConfig) -> int:
    return min(cfg.text_groups, 1) if cfg.torchcompile else cfg.text_groups  # the compiler meets fewer shapes


def _run_warnings(
    cfg: TrainConfig, state: TrainState, trainer: Trainer, checkpoint: Mapping[str, Any], folder: Path | None
) -> Iterator[str]:
    """What will not work as the options suggest, now that the number of steps and the first step are known."""
    assert state.optimizer is not None
    steps = state.steps_per_epoch * cfg.schedule.epochs
    yield from run_warnings.frozen(state.model)
    if state.step < steps:
        rate = state.optimizer.defaults["lr"] if cfg.optim.lr is None else cfg.optim.lr
        yield from run_warnings.schedule(cfg.schedule, rate, state.steps_per_epoch)
        yield from run_warnings.jump_of_learning_rate(state.optimizer, trainer.scheduler, checkpoint, state.step)
        yield from run_warnings.profiled_steps(cfg.logging.profile_steps, state.step, steps)
    if folder is not None:
        size = run_warnings.checkpoint_bytes(state.model, state.average is not None)
        yield from run_warnings.disk_space(folder, size)


@contextlib.contextmanager
def _tracing(
    cfg: LoggingConfig, world: World, folder: Path | None
) -> Iterator[Callable[[int], contextlib.AbstractContextManager]]:
    """What goes around each step: the master's trace of --profile-steps, or nothing."""
    if cfg.profile_steps is None or folder is None or not world.is_master:
        yield contextlib.nullcontext
        return
    first, end = step_range(cfg.profile_steps)
    with StepTrace(world.device, folder / "profile", first, end, cfg.profile_level) as trace:
        yield trace.step


def _resume(state: TrainState, checkpoint: Mapping[str, Any] | None, path: str | None, cfg: CheckpointConfig) -> None:
    if checkpoint is not None:
        state.load_state_dict(checkpoint)
        logger.info("Resumed from %s (epoch %d, step %d).", path, state.epoch, state.step)
    elif cfg.resume is not None:
        logger.info("--resume latest: there is no checkpoint yet, so the run starts from the beginning.")


def _train(
    cfg: TrainConfig,
    state: TrainState,
    trainer: Trainer,
    data: Mapping[str, DataInfo],
    tokenizer: Any,
    saver: Saver | None,
    writer: logs.MetricsWriter,
    around_step: Callable[[int], contextlib.AbstractContextManager],
    signals: StopSignals,
) -> None:
    epochs, loader = cfg.schedule.epochs, data["train"].dataloader
    loader.agreement = agreement = Agreement(signals)

    def after_step() -> float:
        if saver is None:
            return 0.0
        saver.after_step()
        return saver.take_waited()

    def stop(signal: int) -> NoReturn:
        if saver is not None:
            saver.stop(together=True)
        ranks.leave()
        raise Stopped(signal)

    if state.epoch >= epochs:
        logger.warning("The run has its %d epochs already: give more --epochs to train on.", state.epoch)
    while state.epoch < epochs:
        logger.info("Start epoch %d", state.epoch)
        try:
            run_epoch(trainer, data["train"], state, cfg.logging.log_every_n_steps, writer, around_step, after_step)
        except Stopped as stopped:
            stop(stopped.number)
        # Before the evaluation, which may fail, and with the random states that the next epoch begins with.
        if saver is not None:
            saver.after_epoch()
        if number := agreement.at_epoch_end():
            stop(number)
        try:
            with signals.at_once():
                _evaluate(state, data, _evaluation_options(cfg, epochs), tokenizer, writer)
        except Stopped:
            # The others may be in the midst of it and know nothing.
            if saver is not None:
                saver.stop(together=False)
            raise
        if saver is not None:
            saver.evaluated()
    if trainer.guard is not None:
        trainer.guard.check_run()


def _evaluation_options(cfg: TrainConfig, epochs: int) -> argparse.Namespace:
    """Return what `evaluate` reads: the section, the precision of the run, and its last epoch."""
    return argparse.Namespace(**vars(cfg.eval), precision=cfg.model.precision, epochs=epochs)


def _evaluate(
    state: TrainState,
    data: Mapping[str, DataInfo],
    cfg: argparse.Namespace,
    tokenizer: Any,
    writer: logs.MetricsWriter,
) -> None:
    """All ranks evaluate together; the master writes the numbers. Training's random numbers are left alone."""
    start = time.perf_counter()
    with rng.untouched(state.device):
        metrics = evaluate(state.model, data, state.epoch, cfg, tokenizer=tokenizer)
        if metrics and state.average is not None:
            with state.average.in_place():
                averaged = evaluate(state.model, data, state.epoch, cfg, tokenizer=tokenizer)
            metrics |= {f"ema_{name}": averaged[name] for name in averaged if name not in ("epoch", "num_samples")}
    if not metrics:
        return
    numbers = "\t".join(f"{name}: {value:.4f}" for name, value in metrics.items() if name != "epoch")
    logger.info("Eval Epoch: %d %s\ttook %.1f s", state.epoch, numbers, time.perf_counter() - start)
    writer.write(metrics, state.epoch, "val")
    writer.write_results(metrics, state.epoch)
