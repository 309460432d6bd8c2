"""Builds the components of a run, in the order in which they need each other."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

import open_clip
from open_clip import device as devices
from open_clip.deferred_init import DeferredInit
from open_clip.transform import is_naflex_aug_cfg
from training import half_weights, preflight, run_folder, run_warnings
from training.batches import to_pixels
from training.build import (
    Transform,
    build_model,
    build_scheduler,
    build_teacher,
    parallelize,
    shard,
    start_logit_bias,
    synchronize_batch_norms,
)
from training.checkpoint.rng import random_seed
from training.checkpoint.saver import NullSaver, Saver
from training.checkpoint.state import TrainState
from training.checkpoint.weights import check_fit, load_checkpoint
from training.compilation import CompileOptions, NoCompilation, compile_model
from training.data import DataInfo, get_data
from training.data.naflex import plan_transforms, takes_any_shape, with_naflex
from training.ema import NoAverage
from training.epoch import steps_per_epoch
from training.evaluate import ScheduledEvaluator, create_evaluators
from training.flops import pairs_at_peak
from training.objective import create_objective
from training.params import DataConfig, ModelConfig, TrainConfig
from training.params.checks import reporters, step_range
from training.progress import Progress, Writer
from training.run_folder import Run
from training.sharding.part import NoSharding
from training.signals import Agreement
from training.step_guard import StepGuard
from training.trace import StepTrace
from training.trainer import Trainer, unwrap_model
from training.unpadding import PaddingOptions, PaddingReader, Unpadding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """What `build` returns.

    Attributes:
        data: loaders by name.
        trainer: None: the run only evaluates.
        progress: collects what `trainer` does.
    """

    state: TrainState
    data: Mapping[str, DataInfo]
    evaluators: list[ScheduledEvaluator]
    average: NoAverage
    trainer: Trainer | None
    progress: Progress


def build(run: Run, writer: Writer, agreement: Agreement) -> Components:
    """Build everything once, and load the checkpoint of a resumed run.

    Args:
        writer: gets the numbers of each log line.
        agreement: makes the ranks stop before the same batch of training data.

    Raises:
        ValueError, OSError, RuntimeError: something does not fit or cannot be read; the message says how to fix it.
    """
    cfg, device = run.cfg, run.world.device
    devices.get(device).set_fast_matmul(cfg.model.fp32_matmul == "high")
    preflight.check_compiled_step(cfg, run.precision, run.world)
    # Without memory for the weights, until each rank gets its part of them.
    deferred = DeferredInit() if cfg.distributed.fsdp and run.world.distributed else None
    model, transforms, tokenizer = _build_model(run, deferred)
    run_folder.warn(run_warnings.text_pad_multiple(cfg.data.text_pad_multiple, tokenizer), run.world)
    checkpoint = None if run.resume_from is None else load_checkpoint(run.resume_from, is_lazy=cfg.distributed.fsdp)
    if checkpoint is not None:
        check_fit(model, checkpoint.get("state_dict", checkpoint))
    pixel_transforms = [to_pixels(transform, cfg.data.fast_decode) for transform in transforms]
    if cfg.naflex.use_naflex:
        pixel_transforms = plan_transforms(cfg.naflex, cfg.data, model.visual, pixel_transforms)
    elif takes_any_shape(pixel_transforms[0]):
        preflight.check_takes_patches(model)
    data = get_data(
        _data_options(cfg, tokenizer),
        pixel_transforms,
        epoch=0 if checkpoint is None else int(checkpoint.get("epoch", 0)),
        tokenizer=tokenizer,
        agreement=agreement,
    )
    padding = PaddingOptions(max_groups=0, packing=cfg.model.packing)
    evaluators = create_evaluators(data, cfg.eval, run.precision, tokenizer, padding)
    evaluated = [data[name] for each in evaluators if each.frequency for name in each.data_names]
    preflight.check_evaluation_data(model, evaluated, device)
    if "train" in data:
        if cfg.objective.siglip and checkpoint is None:
            start_logit_bias(model)
        loader = data["train"].dataloader
        _check_steps(loader, cfg.optim.accum_freq)
        trainer, progress = _build_trainer(run, model, tokenizer, deferred, loader, writer)
        state = _create_state(run, trainer, progress, data["train"])
        components = Components(state, data, evaluators, trainer.average, trainer, progress)
    else:
        sharding = shard(model, cfg.distributed, run.world, run.precision, deferred)
        average = sharding.create_average(model, cfg.optim.ema_decay)
        state = TrainState(model, device, str(cfg.checkpoint.name), cfg.data.seed, parts={"average": average})
        components = Components(state, data, evaluators, average, None, Progress(device))
    _resume(state, checkpoint, run)
    run_folder.warn(_warnings(run, components, checkpoint or {}), run.world)
    return components


def _data_options(cfg: TrainConfig, tokenizer: Any) -> DataConfig:
    """Return the options of the data. What is compiled for fixed shapes gets captions of the context length."""
    fixed = cfg.model.torchcompile and cfg.model.torchcompile_strategy != "blocks"
    if fixed and cfg.data.text_pad_multiple is None and getattr(tokenizer, "variable_text", False):
        return dataclasses.replace(cfg.data, text_pad_multiple=tokenizer.context_length)
    return cfg.data


def _build_model(run: Run, deferred: DeferredInit | None) -> tuple[nn.Module, list[Transform], Any]:
    """Return the model, the transforms for training and validation, and the tokenizer."""
    cfg, world = run.cfg, run.world
    random_seed(cfg.data.seed, 0)  # the same initial weights on every rank
    with _without_factory_warnings(run.resume_from is not None or not world.is_master):
        model, *transforms = build_model(with_naflex(cfg), cfg.objective, run.precision, deferred)
    random_seed(cfg.data.seed, world.rank)
    tokenizer = open_clip.get_tokenizer(
        cfg.model.model, context_length=cfg.model.force_context_length, cache_dir=cfg.model.cache_dir
    )
    preflight.check_tokenizer(model, tokenizer)
    return model, transforms, tokenizer


@contextlib.contextmanager
def _without_factory_warnings(is_hidden: bool) -> Iterator[None]:
    """Hide "no pretrained weights": the same on all ranks, and not true of a run that loads a checkpoint."""
    factory_log = logging.getLogger("open_clip.factory")
    level = factory_log.level
    if is_hidden:
        factory_log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        factory_log.setLevel(level)


def _build_trainer(
    run: Run, model: Any, tokenizer: Any, deferred: DeferredInit | None, loader: Any, writer: Writer
) -> tuple[Trainer, Progress]:
    cfg, world, precision, optim = run.cfg, run.world, run.precision, run.cfg.optim
    if cfg.model.use_bn_sync and world.distributed:
        model = synchronize_batch_norms(model)
    teacher = build_teacher(cfg.objective, precision, cfg.model.cache_dir)
    if teacher is not None:
        preflight.check_teacher(model, teacher, is_naflex_aug_cfg(with_naflex(cfg).aug_cfg), tokenizer)
    objective = create_objective(cfg.objective, model, teacher)
    steps_vary = getattr(loader, "ends_steps", False)
    # Pairs of images of any size have no common number of FLOPs.
    at_peak = None if steps_vary else pairs_at_peak(model, teacher, precision, cfg.model.fp32_matmul)
    text_varies = getattr(tokenizer, "variable_text", False)
    compiled = _compile(model, cfg.model, deferred is not None, steps_vary, text_varies)
    readers = [model if deferred is None else PaddingReader(model), teacher]
    sharding = shard(model, cfg.distributed, world, precision, deferred)
    optimizer = sharding.create_optimizer(model, optim, world.device, compiled.captures_step)
    average = sharding.create_average(model, optim.ema_decay)
    remembered = cfg.logging.log_every_n_steps + optim.max_bad_steps  # the host learns of bad steps when it logs
    guard = StepGuard(model, optimizer, world.device, optim.max_bad_steps, run.folder, remembered)
    trainer = Trainer(
        model=parallelize(model, cfg.distributed, world, optim.accum_freq, steps_vary),
        objective=objective,
        optimizer=optimizer,
        precision=precision,
        scaler=sharding.agree(precision.grad_scaler()),
        scheduler=build_scheduler(optimizer, cfg.schedule, optim, steps_per_epoch(loader, optim.accum_freq)),
        half_weights=(
            contextlib.nullcontext
            if compiled.is_enabled
            else half_weights.create(model, precision, getattr(optimizer, "flats", ()))
        ),
        unpad=_create_unpadding(readers, run, compiled, sharding),
        accum_freq=optim.accum_freq,
        steps_vary=steps_vary,
        grad_clip_norm=math.inf if optim.grad_clip_norm is None else optim.grad_clip_norm,
        guard=guard,
        average=average,
        rehearses=compiled.is_enabled or (run.resume_from is not None and world.distributed),
        compilation=compiled,
        sharding=sharding,
    )
    return trainer, _create_progress(run, writer, at_peak)


def _create_progress(run: Run, writer: Writer, pairs_at_peak: float | None) -> Progress:
    logging_cfg = run.cfg.logging
    return Progress(
        run.world.device,
        logging_cfg.log_every_n_steps,
        writer,
        pairs_at_peak,
        log_metric_every_n_steps=logging_cfg.log_metric_every_n_steps if reporters(logging_cfg.report_to) else None,
        loss_average_samples=logging_cfg.train_loss_ema_samples,
    )


def _check_steps(loader: Any, accum_freq: int) -> None:
    """Raise ValueError if an epoch has no step, or the batches say where a step ends and --accum-freq does, too."""
    if accum_freq > 1 and getattr(loader, "ends_steps", False):
        raise ValueError(
            f"--accum-freq {accum_freq}: a step over images of any size is already cut into batches that fit the "
            "memory. Leave out --accum-freq, and use a larger --batch-size for more samples per step."
        )
    if steps_per_epoch(loader, accum_freq) == 0:
        raise ValueError(
            f"An epoch has {loader.num_batches} batches per process, fewer than --accum-freq {accum_freq}. "
            "Use more data, a smaller --batch-size or a smaller --accum-freq."
        )


def _compile(
    model: Any, cfg: ModelConfig, is_sharded: bool, images_vary: bool, text_varies: bool = False
) -> NoCompilation:
    if not cfg.torchcompile:
        return NoCompilation()
    options = CompileOptions(cfg.torchcompile_strategy, cfg.torchcompile_backend, cfg.torchcompile_mode)
    if images_vary and options.strategy != "blocks":
        raise ValueError(
            f"--torchcompile-strategy {options.strategy} compiles for fixed shapes, and the images have any size. Use "
            "--torchcompile-strategy blocks."
        )
    text_varies |= cfg.packing == "on" or (cfg.text_groups > 0 and getattr(model, "takes_grouped_text", False))
    return compile_model(model, options, text_varies or images_vary, is_sharded, images_vary)


def _create_unpadding(readers: list[Any], run: Run, compiled: NoCompilation, sharding: NoSharding) -> Unpadding:
    cfg = run.cfg.model
    packing = "off" if cfg.packing == "auto" and compiled.is_enabled else cfg.packing
    unpadding = Unpadding(readers, run.world.device, PaddingOptions(_text_groups(cfg, compiled, sharding), packing))
    if packing == "on":
        unpadding.check_packs()
    return unpadding


def _text_groups(cfg: ModelConfig, compiled: NoCompilation, sharding: NoSharding) -> int:
    if not compiled.takes_any_length:
        return 0
    # With several groups, the ranks of a sharded model would gather at different times.
    return min(cfg.text_groups, 1) if sharding.is_enabled else cfg.text_groups


def _create_state(run: Run, trainer: Trainer, progress: Progress, train: DataInfo) -> TrainState:
    """Register everything that changes during the run."""
    cfg = run.cfg
    loader: Any = train.dataloader
    return TrainState(
        model=unwrap_model(trainer.model),
        device=run.world.device,
        name=str(cfg.checkpoint.name),
        seed=cfg.data.seed,
        parts={
            "optimizer": trainer.optimizer,
            "scaler": trainer.scaler,
            "average": trainer.average,
            "progress": progress,
            "guard": trainer.guard,
        },
        rank_parts={"data": train},
        steps_per_epoch=steps_per_epoch(loader, trainer.accum_freq),
        samples_per_epoch=loader.num_samples,
        samples_per_step=0
        if cfg.naflex.use_naflex and cfg.naflex.naflex_variable_batch
        else cfg.data.batch_size * trainer.accum_freq * run.world.world_size,
    )


def _resume(state: TrainState, checkpoint: Mapping[str, Any] | None, run: Run) -> None:
    if checkpoint is not None:
        state.load_state_dict(checkpoint)
        logger.info("Resumed from %s (epoch %d, step %d).", run.resume_from, state.epoch, state.step)
    elif run.cfg.checkpoint.resume is not None:
        logger.info("--resume latest: there is no checkpoint yet, so the run starts from the beginning.")


def _warnings(run: Run, components: Components, checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """Yield what will not work as the options suggest, now that the number of steps and the first step are known."""
    cfg, state, trainer = run.cfg, components.state, components.trainer
    if trainer is None:
        return
    steps = state.steps_per_epoch * cfg.schedule.epochs
    yield from run_warnings.frozen(state.model)
    if state.step < steps:
        rate = trainer.optimizer.defaults["lr"] if cfg.optim.lr is None else cfg.optim.lr
        yield from run_warnings.schedule(cfg.schedule, rate, state.steps_per_epoch)
        yield from run_warnings.jump_of_learning_rate(trainer.optimizer, trainer.scheduler, checkpoint, state.step)
        yield from run_warnings.profiled_steps(cfg.logging.profile_steps, state.step, steps)
    if run.folder is not None:
        size = run_warnings.checkpoint_bytes(state.model, components.average.is_enabled)
        yield from run_warnings.disk_space(run.folder, size)


def create_saver(run: Run, components: Components) -> NullSaver:
    if run.folder is None or components.trainer is None:
        return NullSaver()
    return Saver(run.cfg.checkpoint, run.folder / "checkpoints", components.state, run.cfg.schedule.epochs)


@contextlib.contextmanager
def tracing(run: Run) -> Iterator[Callable[[int], contextlib.AbstractContextManager]]:
    """Give a function that makes a context for each step: the master's trace of --profile-steps, or nothing."""
    cfg = run.cfg.logging
    if cfg.profile_steps is None or run.folder is None or not run.world.is_master:
        yield contextlib.nullcontext
        return
    first, end = step_range(cfg.profile_steps)
    with StepTrace(run.world.device, run.folder / "profile", first, end, cfg.profile_level) as trace:
        yield trace.step
