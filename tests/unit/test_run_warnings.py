"""Tests of training.run_warnings: each warning with its numbers, and no warning without a reason."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch

import open_clip
from coca_cases import build as build_coca
from open_clip import coca_model
from tiny_clip import folder
from training import run_warnings, scheduler
from training.params import ScheduleConfig


def schedule(steps_per_epoch: int = 10, lr: float = 5e-4, **options) -> list[str]:
    return list(run_warnings.schedule(ScheduleConfig(**options), lr, steps_per_epoch))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"epochs": 2, "warmup": 10000},
            "--warmup 10000 is more than the run's 20 steps, so the learning rate only reaches 0.2% of --lr 0.0005. "
            "Use a shorter --warmup (a tenth of the run is 2) or more --epochs.",
        ),
        ({"epochs": 2, "warmup": 21}, "reaches 95.2% of"),
        ({"epochs": 2, "warmup": 20}, "--warmup 20 is more than half of the run's 20 steps."),
        ({"epochs": 2, "warmup": 11}, "more than half"),
        ({"epochs": 2, "warmup": 11, "lr_scheduler": "const"}, "more than half"),
        ({"epochs": 2, "warmup": 11, "lr_scheduler": "const-cooldown", "epochs_cooldown": 1}, "at step 10 of 20"),
        ({"epochs": 4, "warmup": 11, "lr_scheduler": "const-cooldown", "epochs_cooldown": 3}, "at step 10 of 40"),
        ({"epochs": 2, "warmup": 30, "lr_scheduler": "const-cooldown", "epochs_cooldown": 1}, "more than the run's 20"),
    ],
)
def test_a_warmup_that_is_too_long(options, words):
    (sentence,) = schedule(**options)
    assert words in sentence


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 2, "warmup": 10},
        {"epochs": 2, "warmup": 0},
        {"epochs": 2, "warmup": 10000, "skip_scheduler": True},
        {"epochs": 0, "warmup": 10000},
        {"epochs": 32, "warmup": 10000, "steps_per_epoch": 5000},
        {"epochs": 2, "warmup": 10, "lr_scheduler": "const-cooldown", "epochs_cooldown": 1},
        {"epochs": 2, "warmup": 5, "lr_scheduler": "const-cooldown", "epochs_cooldown": 0},
    ],
)
def test_a_warmup_that_fits(options):
    assert schedule(**options) == []


def test_the_rate_does_jump_where_the_warmup_reaches_into_the_cooldown():
    """The warning is true, and without it the opposite is true."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for warmup, jumps in ((15, True), (10, False)):
        rate = scheduler.const_lr_cooldown(optimizer, 1.0, warmup, 20, 10)
        steps = [rate(step) for step in range(20)]
        assert (max(abs(a - b) for a, b in itertools.pairwise(steps)) > 0.2) == jumps
        options = {"warmup": warmup, "lr_scheduler": "const-cooldown", "epochs_cooldown": 1}
        assert bool(schedule(epochs=2, **options)) == jumps


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize(
    ("text_options", "names"),
    [({"freeze_layer_norm": True}, "Only logit_scale is trained, 1 of "), ({"freeze_layer_norm": False}, "and ")],
)
def test_both_towers_locked(tmp_path, custom_text, text_options, names):
    model = open_clip.create_model(folder(tmp_path), load_weights=False, force_custom_text=custom_text)
    model.lock_image_tower()
    assert list(run_warnings.frozen(model)) == []
    model.lock_text_tower(**text_options)
    (sentence,) = run_warnings.frozen(model)
    assert names in sentence
    assert "logit_scale" in sentence
    assert "--lock-image and --lock-text" in sentence
    assert len(sentence) < 400
    model.lock_image_tower(unlocked_groups=1)
    assert list(run_warnings.frozen(model)) == []


def test_a_captioner_with_locked_towers_trains_its_decoder():
    model = build_coca(coca_model)
    model.lock_image_tower()
    model.lock_text_tower()
    assert list(run_warnings.frozen(model)) == []


def optimizer_at(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def checkpoint_of(epochs: int, step: int, **changes) -> dict:
    """Return the checkpoint of a run of 10 steps per epoch after the given number of steps."""
    optimizer = optimizer_at(1.0)
    schedule = scheduler.cosine_lr(optimizer, changes.get("lr", 5e-4), changes.get("warmup", 3), 10 * epochs)
    schedule(step - 1)
    return {"optimizer": optimizer.state_dict()}


def test_a_rate_that_jumps_as_the_run_is_resumed():
    optimizer = optimizer_at(0.125)
    own = scheduler.cosine_lr(optimizer, 5e-4, 3, 40)
    (sentence,) = run_warnings.jump_of_learning_rate(optimizer, own, checkpoint_of(2, 20), 20)
    assert sentence.startswith("The learning rate changes from 4.26e-06 to 0.000282 at step 20, where the run is")
    assert "--epochs" in sentence
    assert optimizer.param_groups[0]["lr"] == 0.125, "asking changes nothing"
    for changes in ({"lr": 1e-4}, {"warmup": 30}):
        assert list(run_warnings.jump_of_learning_rate(optimizer, own, checkpoint_of(4, 20, **changes), 20))


@pytest.mark.parametrize("step", [1, 2, 3, 20, 39, 40])
def test_a_rate_that_goes_on(step):
    optimizer = optimizer_at(0.125)
    own = scheduler.cosine_lr(optimizer, 5e-4, 3, 40)
    assert list(run_warnings.jump_of_learning_rate(optimizer, own, checkpoint_of(4, step), step)) == []


@pytest.mark.parametrize("checkpoint", [{}, {"optimizer": {}}, {"optimizer": {"param_groups": [{}]}}])
def test_no_rate_to_compare_with(checkpoint):
    optimizer = optimizer_at(0.125)
    own = scheduler.cosine_lr(optimizer, 5e-4, 3, 40)
    assert list(run_warnings.jump_of_learning_rate(optimizer, own, checkpoint, 20)) == []
    assert list(run_warnings.jump_of_learning_rate(optimizer, scheduler.unchanged_lr(optimizer), checkpoint, 20)) == []


@pytest.mark.parametrize(
    ("steps", "words"),
    [("30:40", "traces nothing"), ("0:10", "traces nothing"), ("5:15", "in part"), ("15:25", "in part"), ("12:15", "")],
)
def test_steps_to_trace_are_steps_of_the_run(steps, words):
    found = list(run_warnings.profiled_steps(steps, 10, 20))
    assert [words in sentence and "the steps 10 to 19" in sentence for sentence in found] == ([True] if words else [])


def test_room_for_a_checkpoint(tmp_path, monkeypatch):
    model = open_clip.create_model("RN50", load_weights=False, device="meta")
    size = run_warnings.checkpoint_bytes(model, averaged=False)
    assert size == pytest.approx(3 * 102e6 * 4, rel=0.01)
    assert run_warnings.checkpoint_bytes(model, averaged=True) == pytest.approx(4 * 102e6 * 4, rel=0.01)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    (sentence,) = run_warnings.disk_space(tmp_path, size)
    assert "has 1.0 GB of free space, but a checkpoint needs about 1.2 GB" in sentence
    assert list(run_warnings.disk_space(tmp_path, 10**9)) == []


def test_the_shortest_warmup_is_not_called_too_long():
    assert not list(run_warnings.schedule(ScheduleConfig(epochs=1, warmup=1), 0.1, 1))
