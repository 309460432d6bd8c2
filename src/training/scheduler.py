"""Learning-rate schedules: functions of the step alone, so that a resumed run continues exactly.

Each maker returns a function that takes the step (0 for the first update), sets the optimizer's learning rate for it
and returns it. During warmup the rate is base_lr * (step + 1) / warmup_length: the first step already moves, the last
one of the warmup has base_lr. Beyond the last step the rate stays what it was there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Scheduler = Callable[[int], float]


def assign_learning_rate(optimizer: torch.optim.Optimizer, new_lr: float) -> None:
    """Sets the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = new_lr


def _after_warmup(
    optimizer: torch.optim.Optimizer, base_lr: float, warmup_length: int, rate_at: Callable[[int], float]
) -> Scheduler:
    def schedule(step: int) -> float:
        lr = base_lr * (step + 1) / warmup_length if step < warmup_length else rate_at(step)
        assign_learning_rate(optimizer, lr)
        return lr

    return schedule


def const_lr(optimizer: torch.optim.Optimizer, base_lr: float, warmup_length: int, steps: int) -> Scheduler:
    """Warmup, then base_lr. `steps` has no influence; it is there so that all schedules are made alike."""
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
    """Warmup, base_lr, then over the last `cooldown_steps` of `steps` a polynomial of `cooldown_power` down to
    `cooldown_end_lr` ("Scaling Vision Transformers", arXiv:2106.04560, section 3.5)."""
    start = steps - cooldown_steps

    def rate_at(step: int) -> float:
        if step < start or cooldown_steps == 0:
            return base_lr
        left = max(1 - (step - start) / cooldown_steps, 0.0)
        return left**cooldown_power * (base_lr - cooldown_end_lr) + cooldown_end_lr

    return _after_warmup(optimizer, base_lr, warmup_length, rate_at)


def cosine_lr(optimizer: torch.optim.Optimizer, base_lr: float, warmup_length: int, steps: int) -> Scheduler:
    """Warmup, then half a cosine from base_lr to 0 at `steps` (SGDR, arXiv:1608.03983, without restarts)."""

    def rate_at(step: int) -> float:
        done = (step - warmup_length) / (steps - warmup_length) if step < steps else 1.0
        return 0.5 * (1 + math.cos(math.pi * done)) * base_lr

    return _after_warmup(optimizer, base_lr, warmup_length, rate_at)


def rate_at(schedule: Scheduler, optimizer: torch.optim.Optimizer, step: int) -> float:
    """The learning rate that the schedule sets for a step; the optimizer keeps the one that it has."""
    before = [group["lr"] for group in optimizer.param_groups]
    rate = schedule(step)
    for group, lr in zip(optimizer.param_groups, before, strict=True):
        group["lr"] = lr
    return rate
