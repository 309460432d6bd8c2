"""`python -m training.main`: trains and evaluates. This file only sequences; each part is in a file of its own."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import open_clip
from open_clip import device as devices
from open_clip import progress
from open_clip.utils import check_folder
from open_clip.whole_file import write_text
from training import children, distributed, file_utils, half_weights, logger, precision, preflight, rng, run_warnings
from training.batches import TextGrouping, to_pixels
from training.build import (
    build_model,
    build_scheduler,
    build_teacher,
    parallelise,
    start_logit_bias,
    synchronise_batch_norms,
)
from training.checkpoint import TrainState, check_fit, get_latest_checkpoint, load_checkpoint, natural_key
from training.data import DataInfo, get_data
from training.distributed import World
from training.ema import WeightAverage
from training.evaluate import evaluate
from training.flag_checks import step_range
from training.flops import pairs_at_peak
from training.guard import StepGuard
from training.objective import create_objective
from training.optim import create_optimizer
from training.params import (
    CheckpointConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    TrainConfig,
    parse_args,
    sections,
    warnings_for,
)
from training.rng import random_seed
from training.saver import Saver
from training.signals import Agreement, Stopped, StopSignals, exit_with
from training.trace import StepTrace
from training.train import Trainer, run_epoch

__all__ = ["copy_codebase", "get_latest_checkpoint", "main", "natural_key", "random_seed"]

log = logging.getLogger(__name__)


def main(args: list[str] | None = None) -> None:
    """Runs the command with the given options (`sys.argv[1:]` where None).

    Raises:
        SystemExit: for options that cannot be; and, as signals.Stopped, where a signal has stopped the run.
        FileExistsError: where the run's folder has another run already.
        ValueError, FileNotFoundError, RuntimeError: what is wrong with data, weights, device..., with its mend.
    """
    options = parse_args(args)
    logger.setup_logging(None, logging.DEBUG if options.debug else logging.INFO)
    world = distributed.world()  # of one process, until it joins the others
    with StopSignals() as signals:
        try:
            cfg = sections(options)
            preflight.check_options(cfg)
            with signals.default_handlers():
                preflight.check_device(cfg)
                world = distributed.init(cfg.distributed)
            with progress.showing(world.is_master):
                _run(options, world, signals)
        except (KeyboardInterrupt, Stopped) as stop:
            name = stop.name if isinstance(stop, Stopped) else "Ctrl-C"
            if world.is_master:  # all ranks stop together
                log.warning(
                    "Stopped by %s. If the run has saved a checkpoint, `--resume latest` with its --name continues "
                    "from there.", name
                )
            raise
        except Exception as error:
            _log_end(error, options.debug)
            # Nothing collective now, leaving the group included: the others wait elsewhere. The launcher ends them.
            if not distributed.world().distributed:
                distributed.shutdown()
            raise


def _log_end(error: Exception, debug: bool) -> None:
    """A sentence alone for what its reader can fix; the traceback too for what may be a bug, and with --debug."""
    if devices.is_out_of_memory(error):
        log.error(
            "Out of memory: %s Try --grad-checkpointing, or a smaller --batch-size with a larger --accum-freq.", error
        )
        return
    known = devices.hint(_text_with_causes(error))
    advice = f" {known}" if known else ""
    if distributed.says_that_a_peer_died(error):
        reason = str(error).strip().partition("\n")[0] + advice
        log.error("Another process of this run has ended, so this one does. The first error is the cause. %s", reason)
        return
    own_files = Path(open_clip.__file__).parents[1]
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    is_ours = isinstance(error, RuntimeError) and raised_in.is_relative_to(own_files)
    is_for_reader = is_ours or isinstance(error, (ValueError, OSError, NotImplementedError, ImportError))
    where = " (--debug shows where.)" if is_for_reader and not debug else ""
    log.error("The run ends: %s%s%s", error, advice, where, exc_info=debug or not is_for_reader)


def _text_with_causes(error: BaseException | None) -> str:
    """The texts of an error and of those that it was raised from, which may have been shortened in its own."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    return "\n".join(texts)


def _run(options: argparse.Namespace, world: World, signals: StopSignals) -> None:
    cfg = _complete(sections(options), world)
    folder, resume_from = _prepare_folder(cfg.checkpoint, world)
    _start_log(cfg, options, world, folder)
    if cfg.logging.copy_codebase and folder is not None and world.is_master:
        copy_codebase(options)
    metrics_writer = _metrics_writer(cfg, options, world, folder, resume_from)
    with metrics_writer as writer, _remote_copy(cfg.checkpoint, world, folder):
        _train_and_evaluate(cfg, world, folder, resume_from, writer, signals)


# What is decided before anything is built


def _complete(cfg: TrainConfig, world: World) -> TrainConfig:
    """The sections with what was left open decided: the precision by the device, the run's name by its options."""
    chosen = precision.resolve(cfg.model.precision, world.device)
    name = cfg.checkpoint.name
    if name is None:
        parts = [
            f"{datetime.now():%Y_%m_%d-%H_%M_%S}",
            "model_" + cfg.model.model.replace("/", "-").replace(":", "-"),
            f"lr_{cfg.optim.lr}",
            f"b_{cfg.data.batch_size}",
            f"j_{cfg.data.workers}",
            f"p_{chosen}",
        ]
        name = distributed.broadcast_object(None, "-".join(parts))  # clocks differ
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, precision=chosen),
        eval=dataclasses.replace(cfg.eval, precision=chosen),
        checkpoint=dataclasses.replace(cfg.checkpoint, name=name),
        logging=dataclasses.replace(cfg.logging, name=name),
    )


def _prepare_folder(cfg: CheckpointConfig, world: World) -> tuple[Path | None, str | None]:
    """(LOGS/NAME with its sub-folders made, or None where nothing is written; the checkpoint to resume from, or None).

    The master looks and tells the others: they may see the file system at another moment.
    """
    folder = None if cfg.logs is None else Path(cfg.logs) / str(cfg.name)
    found: tuple[bool, str | None] = (False, None)
    if world.is_master:
        taken = folder is not None and (folder / "out.log").exists() and not distributed.restarts()
        found = (taken and cfg.resume is None, _find_checkpoint(cfg, folder))
    taken, resume_from = distributed.broadcast_object(None, found)
    if taken:
        raise FileExistsError(
            f"{folder} has a run already. Choose another --name, or continue that run with --resume latest."
        )
    if folder is not None:
        if world.is_master:
            check_folder(folder / "checkpoints", "--output-dir")
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if world.is_master:
            file_utils.remove_leftovers(folder / "checkpoints")
    return folder, resume_from


def _find_checkpoint(cfg: CheckpointConfig, folder: Path | None) -> str | None:
    if cfg.resume != "latest":
        # What a restart goes on from is this run's own, whatever it began with.
        own = get_latest_checkpoint(folder / "checkpoints") if folder is not None and distributed.restarts() else None
        return own or cfg.resume
    latest = None
    if cfg.remote_sync is not None:
        latest = get_latest_checkpoint(f"{cfg.remote_sync.rstrip('/')}/{cfg.name}/checkpoints", remote=True)
    if latest is None and folder is not None:
        latest = get_latest_checkpoint(folder / "checkpoints")
    return latest


def _start_log(cfg: TrainConfig, options: argparse.Namespace, world: World, folder: Path | None) -> None:
    """Text log to the screen and the run's folder, one for the run or one a machine, and the options to params.txt."""
    local = cfg.logging.log_local
    writes = world.is_local_master if local else world.is_master
    level = logging.DEBUG if cfg.logging.debug else logging.INFO if writes else logging.WARNING
    file = "out.log" if world.is_master else f"out-{world.rank}.log"
    logger.setup_logging(str(folder / file) if folder is not None and writes else None, level, include_host=local)
    if not world.is_master:
        return
    kind = devices.get(world.device)
    log.info("Run %s on %d x %s (%s), precision %s.", cfg.checkpoint.name, world.world_size, world.device.type,
             kind.name(world.device.index), cfg.model.precision)  # fmt: skip
    for note in kind.notes():
        log.info("%s", note)
    if cfg.distributed.deterministic:
        log.info("--deterministic: %s.", kind.deterministic_settings())
    _warn(kind.environment_warnings(), world)
    _warn((f"{sentence}." for sentence in warnings_for(options, world.world_size)), world)
    if folder is not None:
        lines = [f"{name}: {value}\n" for name, value in sorted({**vars(options), **_decided(cfg, world)}.items())]
        write_text(folder / "params.txt", "".join(lines))


def _warn(sentences: Iterable[str], world: World) -> None:
    """Logs warnings that hold for all ranks once."""
    for sentence in sentences if world.is_master else ():
        log.warning("%s", sentence)


def _decided(cfg: TrainConfig, world: World) -> dict[str, Any]:
    """Options whose values were decided here, and this run's processes."""
    return {
        "name": cfg.checkpoint.name,
        "precision": cfg.model.precision,
        "device": str(world.device),
        "dist_backend": world.backend,
        "world_size": world.world_size,
        "distributed": world.distributed,
    }


def copy_codebase(args: Any) -> str:
    """Copies the packages that run to LOGS/NAME/code, in place of an earlier copy; the path."""
    target = Path(args.logs) / args.name / "code"
    for package in (open_clip, sys.modules["training"]):
        source = Path(package.__file__ or "").parent
        shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    log.info("Copied the source to %s", target)
    return str(target)


@contextlib.contextmanager
def _remote_copy(cfg: CheckpointConfig, world: World, folder: Path | None) -> Iterator[None]:
    """Keeps a remote copy of the run's folder up to date, by a process of its own, and completes it at the end."""
    if cfg.remote_sync is None or folder is None or not world.is_master:
        yield
        return
    remote = f"{cfg.remote_sync.rstrip('/')}/{cfg.name}"
    if not file_utils.remote_sync(str(folder), remote, cfg.remote_sync_protocol):
        raise RuntimeError(f"--remote-sync: the first copy to {remote} failed (the reason is logged above).")
    process = file_utils.start_sync_process(cfg.remote_sync_frequency, str(folder), remote, cfg.remote_sync_protocol)
    process.start()
    remote_is_due = True
    try:
        yield
    except KeyboardInterrupt:  # a second Ctrl-C
        remote_is_due = False
        raise
    finally:
        children.end([process], seconds=0)
        if remote_is_due and not file_utils.remote_sync(str(folder), remote, cfg.remote_sync_protocol):
            log.error("The last copy to %s failed: it may lack the newest files of %s.", remote, folder)


def _metrics_writer(
    cfg: TrainConfig, options: argparse.Namespace, world: World, folder: Path | None, resume_from: str | None
) -> logger.MetricsWriter:
    run_config = {**vars(options), **_decided(cfg, world)}
    return logger.MetricsWriter(cfg.logging, folder, world.is_master, run_config, resume=resume_from is not None)


# What is built, and what it does


def _train_and_evaluate(
    cfg: TrainConfig,
    world: World,
    folder: Path | None,
    resume_from: str | None,
    writer: logger.MetricsWriter,
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
        _warn(_run_warnings(cfg, state, trainer, checkpoint or {}, folder), world)
    del checkpoint
    saver = None
    if trainer is not None and folder is not None:
        saver = Saver(cfg.checkpoint, folder / "checkpoints", state, cfg.schedule.epochs)
    try:
        if trainer is None:
            # Whatever the frequencies say: this epoch counts as the last one.
            _evaluate(state, data, dataclasses.replace(cfg.eval, epochs=state.epoch), tokenizer, writer)
        else:
            with _tracing(cfg.logging, world, folder) as around_step, signals.deferred():
                _train(cfg, state, trainer, data, tokenizer, saver, writer, around_step, signals)
        distributed.leave()
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


def _build_trainer(
    cfg: TrainConfig, world: World, state: TrainState, train: DataInfo, folder: Path | None
) -> Trainer:
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
        group_text=_text_grouping(cfg.model, [model] if teacher is None else [model, teacher], world),
        accum_freq=cfg.optim.accum_freq,
        grad_clip_norm=cfg.optim.grad_clip_norm,
        pairs_at_peak=at_peak,
        guard=state.guard,
        average=state.average,
    )


def _text_grouping(cfg: ModelConfig, models: list[Any], world: World) -> TextGrouping:
    max_groups = min(cfg.text_groups, 1) if cfg.torchcompile else cfg.text_groups  # the compiler meets fewer shapes
    return TextGrouping(models, world.device, max_groups)


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
        log.info("Resumed from %s (epoch %d, step %d).", path, state.epoch, state.step)
    elif cfg.resume is not None:
        log.info("--resume latest: there is no checkpoint yet, so the run starts from the beginning.")


def _train(
    cfg: TrainConfig,
    state: TrainState,
    trainer: Trainer,
    data: Mapping[str, DataInfo],
    tokenizer: Any,
    saver: Saver | None,
    writer: logger.MetricsWriter,
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
        distributed.leave()
        raise Stopped(signal)

    if state.epoch >= epochs:
        log.warning("The run has its %d epochs already: give more --epochs to train on.", state.epoch)
    while state.epoch < epochs:
        log.info("Start epoch %d", state.epoch)
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
                _evaluate(state, data, cfg.eval, tokenizer, writer)
        except Stopped:
            # The others may be in the midst of it and know nothing.
            if saver is not None:
                saver.stop(together=False)
            raise
        if saver is not None:
            saver.evaluated()
    if trainer.guard is not None:
        trainer.guard.check_run()


def _evaluate(
    state: TrainState,
    data: Mapping[str, DataInfo],
    cfg: EvalConfig,
    tokenizer: Any,
    writer: logger.MetricsWriter,
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
    log.info("Eval Epoch: %d %s\ttook %.1f s", state.epoch, numbers, time.perf_counter() - start)
    writer.write(metrics, state.epoch, "val")
    writer.write_results(metrics, state.epoch)


def command() -> int:
    """Run `main` for the command line and return the exit status that a shell expects. Errors have been logged."""
    try:
        main()
    except KeyboardInterrupt:
        return 130
    except Stopped as stopped:
        return int(stopped.code or 0)
    except Exception:
        return 1
    return 0


if __name__ == "__main__":
    exit_with(command())
