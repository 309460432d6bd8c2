"""Tests of the numbers of an epoch: log lines, points (--log-metric-every-n-steps) and averages of the losses."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch

from towers import CPU, FP32, SIZE, Towers, Writer, data_of, state_of
from training.epoch import run_epoch
from training.objective import ContrastiveObjective
from training.progress import Progress
from training.trainer import Trainer


def add(progress: Progress, losses: list[float], bad: tuple[int, ...] = ()) -> None:
    for number, loss in enumerate(losses):
        progress.add({"loss": torch.tensor(loss)}, SIZE, 0.25, torch.tensor(number in bad))


def test_lines_and_points_have_the_means_of_their_own_steps():
    progress = Progress(CPU, 100, log_metric_every_n_steps=2)
    progress.start_epoch()
    add(progress, [1.0, 3.0])
    assert progress.point()["loss"] == 2.0
    add(progress, [5.0, 99.0], bad=(1,))
    assert progress.point()["loss"] == 5.0
    add(progress, [7.0])
    numbers = progress.report()
    assert numbers["loss"] == pytest.approx((1 + 3 + 5 + 7) / 4)
    assert numbers["data_time"] == 0.25
    assert progress.point()["loss"] == 7.0
    assert progress.meters["loss"].avg == pytest.approx(4.0)
    add(progress, [8.0])
    assert progress.report()["loss"] == 8.0


def test_a_window_in_which_all_steps_are_bad():
    progress = Progress(CPU, 100, log_metric_every_n_steps=1)
    progress.start_epoch()
    add(progress, [1.0], bad=(0,))
    assert math.isnan(progress.point()["loss"])
    add(progress, [2.0])
    assert progress.point()["loss"] == 2.0
    assert progress.report()["loss"] == 2.0


def train(points: int | None, every: int = 4, count: int = 7, **options):
    model, writer = Towers(), Writer()
    state = state_of(model, count)
    progress = Progress(CPU, every, writer, log_metric_every_n_steps=points, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, ContrastiveObjective(), optimizer, FP32)
    run_epoch(trainer, data_of(count), state, progress)
    return writer


def test_points_of_an_epoch(caplog):
    with caplog.at_level(logging.INFO):
        each = train(1)
    assert [step for step, *_ in each] == [0, 1, 2, 3, 4, 5, 6]
    lines = [line for line in caplog.messages if line.startswith("Train Epoch")]
    assert len(lines) == 3  # after the steps 1, 5 and 7
    losses = [numbers["loss"] for *_, numbers in each]
    assert f"Loss: {sum(losses[1:5]) / 4:#.5g} " in lines[1]
    assert {"lr", "scale", "samples_per_second"} <= set(each[0][2])
    assert [step for step, *_ in train(3)] == [0, 3, 6]
    assert [step for step, *_ in train(100)] == [0, 6]
    for (*_, ours), (*_, theirs) in zip(train(4), train(None), strict=True):
        assert ours["loss"] == theirs["loss"]


def test_the_moving_average_of_the_losses(caplog):
    with caplog.at_level(logging.INFO):
        losses = [numbers["loss"] for *_, numbers in train(1, every=1, count=4, loss_average_samples=10)]
    average, kept = losses[0], math.exp(-SIZE / 10)
    for loss in losses[1:]:
        average = kept * average + (1 - kept) * loss
    assert f"Loss: {losses[-1]:#.5g} ({average:#.5g})" in caplog.messages[-1]


def test_averages_and_unfinished_windows_are_part_of_the_state():
    options = {"log_metric_every_n_steps": 2, "loss_average_samples": 3 * SIZE}
    whole = Progress(CPU, 100, **options)
    whole.start_epoch()
    add(whole, [1.0, 2.0])
    whole.point()
    add(whole, [5.0])
    resumed = Progress(CPU, 100, **options)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    resumed.start_epoch()
    for progress in (whole, resumed):
        add(progress, [3.0])
    assert resumed.point()["loss"] == whole.point()["loss"] == 4.0
    assert resumed.report()["loss"] == whole.report()["loss"]
    assert resumed.loss_average("loss") == whole.loss_average("loss") != whole.meters["loss"].avg
    whole.end_epoch()
    later = Progress(CPU, 100, **options)
    later.load_state_dict(whole.state_dict())
    assert later.state_dict() == whole.state_dict() != {}


def test_the_state_of_a_run_without_these_options_has_no_new_entries():
    progress = Progress(CPU, 100)
    progress.start_epoch()
    add(progress, [1.0])
    progress.report()
    add(progress, [2.0])
    assert set(progress.state_dict()) == {"meters", "sums", "bad", "steps", "samples", "data_seconds", "seconds"}
    progress.end_epoch()
    assert progress.state_dict() == {}
