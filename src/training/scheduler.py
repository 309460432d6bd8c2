"""Learning rate schedules. They depend only on the step, so that a resumed run continues exactly.

Each of the functions below returns a schedule: a function that takes the step (0 for the first update), sets the
learning rate of the optimizer, and returns it. During warmup the rate is base_lr * (step + 1) / warmup_length, which
is above 0 in the first step and base_lr in the last one. After the last step of the run the rate is constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Scheduler = Callable[[int], float]


def assign_learning_rate(optimizer: torch.optim.Optimizer, new_lr: float) -> None:
    """Set the learning rate of all parameter groups, times the "lr_scale" of groups that have one (layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = new_lr * group["lr_scale"] if "lr_scale" in group else new_lr


def unscaled_lr(group: Mapping[str, Any]) -> float:
    """Return the learning rate of a parameter group without its "lr_scale"."""
    return group["lr"] / group["lr_scale"] if "lr_scale" in group else group["lr"]


def _after_warmup(
    optimizer: torch.optim.Optimizer, base_lr: float, warmup_length: int, rate_at: Callable[[int], float]
) -> Scheduler:
    def schedule(step: int) -> float:
        lr = base_lr * (step + 1) / warmup_length if step < warmup_length else rate_at(step)
        assign_learning_rate(optimizer, lr)
        return lr

    return schedule


def unchanged_lr(optimizer: torch.optim.Optimizer) -> Scheduler:
    """Create a schedule that keeps the learning rates of the optimizer."""
    return lambda step: unscaled_lr(optimizer.param_groups[0])


def const_lr(optimizer: torch.optim.Optimizer, base_lr: float, warmup_length: int, steps: int) -> Scheduler:
    """Create a schedule: warmup, then base_lr. `steps` is not used; all schedules have the same first parameters."""
    return _after_warmup(optimizer, base_lr, warmup_length, lambda step: base_lr)


def const_lr_cooldown(
    optimizer: torch.optim.Optimizer,
    base_lr: float,
    warmup_length: int,
    steps: int,
    cooldown_steps: int,
    cooldown_power: float = 1.0,
    cooldown_end_lr: float = 0.0,
) -> Scheduler:
    """Create a schedule: warmup, base_lr, then a polynomial decay ("Scaling Vision Transformers", arXiv:2106.04560).

    The decay takes the last `cooldown_steps` of `steps`, has the power `cooldown_power` and ends at `cooldown_end_lr`.
    See section 3.5 of the paper.
    """
    start = steps - cooldown_steps

    def rate_at(step: int) -> float:
        if step < start or cooldown_steps == 0:
            return base_lr
        left = max(1 - (step - start) / cooldown_steps, 0.0)
        return left**cooldown_power * (base_lr - cooldown_end_lr) + cooldown_end_lr

    return _after_warmup(optimizer, base_lr, warmup_length, rate_at)


def cosine_lr(optimizer: torch.optim.Optimizer, base_lr: float, warmup_length: int, steps: int) -> Scheduler:
    """Create a schedule: warmup, then half a cosine from base_lr to 0 (SGDR without restarts, arXiv:1608.03983)."""

    def rate_at(step: int) -> float:
        done = (step - warmup_length) / (steps - warmup_length) if step < steps else 1.0
        return 0.5 * (1 + math.cos(math.pi * done)) * base_lr

    return _after_warmup(optimizer, base_lr, warmup_length, rate_at)


def rate_at(schedule: Scheduler, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Return the learning rate of the schedule at a step, without changing that of the optimizer."""
    before = [group["lr"] for group in optimizer.param_groups]
    rate = schedule(step)
    for group, lr in zip(optimizer.param_groups, before, strict=True):
        group["lr"] = lr
    return rate
