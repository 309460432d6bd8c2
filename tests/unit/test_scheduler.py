"""Tests of training.scheduler: curves against closed forms, limits, independence of earlier steps."""

from __future__ import annotations

import math

import pytest
import torch

from training.scheduler import assign_learning_rate, const_lr, const_lr_cooldown, cosine_lr, unchanged_lr


@pytest.fixture
def optimizer():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    return torch.optim.SGD([{"params": [w]} for w in weights], lr=9.0)


def rates(optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def test_assign_sets_every_group(optimizer):
    assign_learning_rate(optimizer, 0.25)
    assert rates(optimizer) == [0.25, 0.25]


def test_an_unchanged_rate(optimizer):
    optimizer.param_groups[1]["lr"] = 3.0
    assert unchanged_lr(optimizer)(5) == 9.0
    assert rates(optimizer) == [9.0, 3.0]


def test_the_schedule_sets_the_rate_and_returns_it(optimizer):
    schedule = cosine_lr(optimizer, 1.0, 0, 10)
    assert rates(optimizer) == [9.0, 9.0], "nothing changes before the first call"
    returned = schedule(3)
    assert rates(optimizer) == [returned, returned]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: const_lr(o, 2.0, 4, 20),
        lambda o: cosine_lr(o, 2.0, 4, 20),
        lambda o: const_lr_cooldown(o, 2.0, 4, 20, 10),
    ],
    ids=["const", "cosine", "cooldown"],
)
def test_warmup_rises_linearly_and_ends_at_the_base(optimizer, make):
    schedule = make(optimizer)
    assert [schedule(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert schedule(4) == 2.0


def test_const_stays(optimizer):
    schedule = const_lr(optimizer, 2.0, 0, 20)
    assert {schedule(step) for step in (0, 1, 19, 20, 1000)} == {2.0}


def test_cosine(optimizer):
    schedule = cosine_lr(optimizer, 2.0, 10, 50)
    for step in range(10, 51):
        assert schedule(step) == pytest.approx(2 * math.cos(math.pi * (step - 10) / 80) ** 2, abs=1e-12)


def test_cooldown_is_a_polynomial_from_the_base_to_the_end(optimizer):
    schedule = const_lr_cooldown(optimizer, 2.0, 5, 50, 20, cooldown_power=2.0, cooldown_end_lr=0.5)
    assert {schedule(step) for step in range(5, 31)} == {2.0}
    for step in range(30, 51):
        assert schedule(step) == pytest.approx(0.5 + 1.5 * ((50 - step) / 20) ** 2)


def test_beyond_the_end_the_rate_stays(optimizer):
    assert cosine_lr(optimizer, 2.0, 10, 50)(70) == 0.0
    assert const_lr_cooldown(optimizer, 2.0, 5, 50, 20, 2.0, 0.5)(70) == 0.5


def test_warmup_as_long_as_the_run_or_longer(optimizer):
    schedule = cosine_lr(optimizer, 2.0, 100, 50)
    assert schedule(49) == 1.0
    assert cosine_lr(optimizer, 2.0, 50, 50)(50) == 0.0


def test_a_cooldown_of_no_steps_is_const(optimizer):
    assert const_lr_cooldown(optimizer, 2.0, 0, 50, 0)(50) == 2.0


@pytest.mark.parametrize("name", ["const", "cosine", "cooldown"])
def test_a_step_gives_the_same_rate_whatever_was_asked_before(optimizer, name):
    make = {
        "const": lambda: const_lr(optimizer, 1.0, 5, 30),
        "cosine": lambda: cosine_lr(optimizer, 1.0, 5, 30),
        "cooldown": lambda: const_lr_cooldown(optimizer, 1.0, 5, 30, 10),
    }[name]
    unbroken = make()
    curve = [unbroken(step) for step in range(30)]
    resumed = make()
    assert [resumed(step) for step in range(17, 30)] == curve[17:]
