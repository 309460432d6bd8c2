"""Warnings about runs that will not do what their options suggest.

These warnings need the model, the number of steps or the checkpoint. Those that need only options are in
`training.params.checks`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from open_clip.checkpoint.mismatch import join_some
from training import scheduler
from training.params import ScheduleConfig
from training.params.checks import step_range

_SAME_RATE = 0.01  # relative difference up to which two learning rates count as equal
_USUAL_WARMUP = 10  # the usual warmup is the number of steps divided by this
_HIGHEST_ADVISED_WARMUP = 10000


def frozen(model: nn.Module) -> Iterator[str]:
    """Warn if no weight matrix is trained, only scalars, biases and gains of norms."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trained and all(p.ndim < 2 for p in trained.values()):
        count, total = (sum(p.numel() for p in parameters) for parameters in (trained.values(), model.parameters()))
        yield (
            f"Only {join_some(trained, limit=3)} {'is' if len(trained) == 1 else 'are'} trained, {count:,} of "
            f"{total:,} parameters, because --lock-image and --lock-text freeze both towers. Leave out one, or add "
            "--lock-image-unlocked-groups or --lock-text-unlocked-layers."
        )


def schedule(cfg: ScheduleConfig, lr: float, steps_per_epoch: int) -> Iterator[str]:
    """Warn if the warmup is too long for the run, or overlaps with the cooldown.

    Args:
        lr: peak learning rate.
        steps_per_epoch: optimizer steps.
    """
    steps = steps_per_epoch * cfg.epochs
    if cfg.skip_scheduler or not steps or not cfg.warmup:
        return
    usual = max(1, min(steps // _USUAL_WARMUP, _HIGHEST_ADVISED_WARMUP))
    advice = f"Use a shorter --warmup (a tenth of the run is {usual}) or more --epochs."
    run = f"the run's {steps} step{'s' if steps > 1 else ''}"
    if cfg.warmup > steps:
        yield (
            f"--warmup {cfg.warmup} is more than {run}, so the learning rate only reaches "
            f"{100 * steps / cfg.warmup:.3g}% of --lr {lr:g}. {advice}"
        )
        return
    cooldown = steps_per_epoch * (cfg.epochs_cooldown or 0) if cfg.lr_scheduler == "const-cooldown" else 0
    if cooldown and cfg.warmup > steps - cooldown:
        yield (
            f"--warmup {cfg.warmup} overlaps with the cooldown, which starts at step {steps - cooldown} of {steps}, so "
            f"the learning rate drops from --lr {lr:g} when the warmup ends. Use a --warmup of at most "
            f"{steps - cooldown}, or fewer --epochs-cooldown."
        )
    elif 2 * cfg.warmup > steps and cfg.warmup > usual:
        yield f"--warmup {cfg.warmup} is more than half of {run}. {advice}"


def jump_of_learning_rate(
    optimizer: torch.optim.Optimizer, own: scheduler.Scheduler, checkpoint: Mapping[str, Any], step: int
) -> Iterator[str]:
    """Warn if the schedule of a resumed run differs from that of the checkpoint.

    The learning rate of the checkpoint's last step is compared with that of this run for the same step.

    Args:
        own: schedule of this run.
        step: completed steps of the checkpoint.
    """
    groups = checkpoint.get("optimizer", {}).get("param_groups", [])
    if not groups or step == 0:
        return
    before = float(scheduler.unscaled_lr({"lr": math.nan, **groups[0]}))
    now = scheduler.rate_at(own, optimizer, step - 1)
    if math.isfinite(before) and not math.isclose(before, now, rel_tol=_SAME_RATE, abs_tol=1e-12):
        following = scheduler.rate_at(own, optimizer, step)
        yield (
            f"The learning rate changes from {before:.3g} to {following:.3g} at step {step}, where the run is resumed, "
            "because the schedule has changed. It depends on --epochs, --lr, --lr-scheduler, --warmup and the steps "
            "per epoch (--batch-size, --accum-freq, processes, samples). Keep them unless the change is intended."
        )


def text_pad_multiple(pad_multiple: int | None, tokenizer: Any) -> Iterator[str]:
    """Warn if --text-pad-multiple is given and captions are padded to the context length of the model."""
    if pad_multiple is not None and not getattr(tokenizer, "variable_text", False):
        yield (
            "--text-pad-multiple has no effect: the model's captions are padded to its context length. Set "
            "variable_text in its text_cfg to pad batches to their longest caption."
        )


def profiled_steps(profile_steps: str | None, first: int, steps: int) -> Iterator[str]:
    """Warn if the run does not make all steps of --profile-steps.

    Args:
        first: first step of this run, after resuming.
        steps: number of steps of the whole run.
    """
    if profile_steps is None:
        return
    start, end = step_range(profile_steps)
    if end <= first or start >= steps:
        yield (
            f"--profile-steps {profile_steps} traces nothing: this run makes the steps {first} to {steps - 1}. "
            "Choose some of these."
        )
    elif start < first or end > steps:
        yield (
            f"--profile-steps {profile_steps} is traced only in part: this run makes the steps {first} to {steps - 1}."
        )


def disk_space(folder: Path, needed: int) -> Iterator[str]:
    """Warn if the disk does not have the space for a checkpoint of `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        yield (
            f"{folder} has {free / 1e9:.1f} GB of free space, but a checkpoint needs about {needed / 1e9:.1f} GB, so "
            "saving will fail. Free some space, or choose another --output-dir."
        )


def checkpoint_bytes(model: nn.Module, averaged: bool) -> int:
    """Estimate the size of a checkpoint with the state of AdamW, in bytes; an upper bound for half precision."""
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    # For half precision weights, training.flat_adamw saves both moments and master weights in float32.
    trained = [p for p in model.parameters() if p.requires_grad]
    state = sum(p.numel() * (3 * 4 if p.element_size() == 2 else 2 * p.element_size()) for p in trained)
    average = 4 * sum(p.numel() for p in model.parameters()) if averaged else 0
    return weights + state + average
