"""Tests of skipped steps (training.step_guard) and of the average of the weights (training.ema)."""

from __future__ import annotations

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gloo_ranks import run_ranks
from open_clip import device as devices
from towers import CPU, FP32, SIZE, Towers, Writer, batches_of, data_of, state_of, train_epoch
from training.checkpoint.saver import NullSaver
from training.ema import WeightAverage
from training.flat_adamw import FlatAdamW
from training.objective import ContrastiveObjective
from training.progress import Progress
from training.step_guard import NoGuard, StepGuard, TooManyBadSteps
from training.trainer import Trainer


def trainer_of(model: nn.Module, form: str = "fused", folder=None, limit: int = 3, **options) -> Trainer:
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    if form == "flat":
        optimizer = FlatAdamW(bare.parameters(), lr=0.01)
    else:
        optimizer = torch.optim.AdamW(bare.parameters(), lr=0.01, fused=form == "fused" or None)
    guard = StepGuard(bare, optimizer, CPU, limit, folder, remembered=8)
    average = WeightAverage(bare, 0.9)
    return Trainer(model, ContrastiveObjective(), optimizer, FP32, guard=guard, average=average, **options)


def parts_of(trainer: Trainer) -> dict:
    return {"optimizer": trainer.optimizer, "guard": trainer.guard, "average": trainer.average}


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Clone weights, buffers, moments, step counts and averages."""
    bare = trainer.model.module if isinstance(trainer.model, DistributedDataParallel) else trainer.model
    found = {name: value.clone() for name, value in bare.state_dict().items()}
    for number, state in enumerate(trainer.optimizer.state.values()):
        found |= {f"{number} {name}": value.clone() for name, value in state.items()}
    averages = trainer.average.state_dict()
    return found | {f"average {name}": value.clone() for name, value in averages.items()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    changed = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert changed == []


def bad(batch: dict) -> dict:
    return {**batch, "image": batch["image"].index_fill(0, torch.tensor([1]), float("nan"))}


class Normed(Towers):
    def __init__(self) -> None:
        super().__init__()
        self.visual.insert(1, nn.BatchNorm1d(8).double())


@pytest.mark.parametrize("form", ["fused", "foreach", "flat"])
@pytest.mark.parametrize("options", [{}, {"grad_clip_norm": 1.0}])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", [Towers, Normed])
def test_a_bad_step_changes_nothing_and_the_next_one_is_as_if_it_had_not_been(form, options, count, kind):
    model = kind()
    trainer, reference = trainer_of(model, form, **options), trainer_of(copy.deepcopy(model), form, **options)
    batches = batches_of(2 * count)
    for each in (trainer, reference):
        each.step(batches[:count], 0)
    before = everything(trainer)
    trainer.step([bad(batches[0]), *batches[1:count]], 1)
    assert_same(everything(trainer), before)
    for each in (trainer, reference):
        each.step(batches[count:], 1)
    assert_same(everything(trainer), everything(reference))
    assert trainer.guard.counters()["skipped_steps"] == 1
    assert trainer.guard.counters()["bad_in_a_row"] == 0


@pytest.fixture
def blind_fused_adamw(monkeypatch):
    """A device whose fused AdamW ignores `found_inf`, like op-plugin's on an NPU."""
    kernel = torch._fused_adamw_

    def ignore_flags(*args, grad_scale=None, found_inf=None, **options):
        kernel(*args, **options)

    monkeypatch.setattr(torch, "_fused_adamw_", ignore_flags)
    monkeypatch.setattr(type(devices.get("cpu")), "fused_adamw_skips", False)


@pytest.mark.parametrize("options", [{}, {"grad_clip_norm": 1.0}])
def test_a_fused_kernel_that_cannot_skip_is_not_called_for_a_bad_step(blind_fused_adamw, options):
    trainer = trainer_of(Towers(), "fused", **options)
    batches = batches_of(3)
    trainer.step([batches[0]], 0)
    before = everything(trainer)
    trainer.step([bad(batches[1])], 1)
    assert_same(everything(trainer), before)
    trainer.step([batches[2]], 2)
    assert not torch.equal(everything(trainer)["logit_scale"], before["logit_scale"])


@pytest.mark.parametrize("form", ["fused", "flat"])
def test_a_good_step_is_the_one_without_a_guard(form):
    model = Towers()
    guarded, plain = trainer_of(model, form), trainer_of(copy.deepcopy(model), form)
    plain.guard = NoGuard()
    for number, batch in enumerate(batches_of(3)):
        assert torch.equal(guarded.step([batch], number)["loss"], plain.step([batch], number)["loss"])
    assert_same(everything(guarded), everything(plain))


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too():
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    model = Towers()
    trainer = trainer_of(model)
    (batch,) = batches_of(1)
    trainer.step([batch], 0)
    before = everything(trainer)
    model.visual.append(nn.Identity())
    model.visual[-1].forward = Steep.apply
    assert torch.isfinite(trainer.step([batch], 1)["loss"])
    assert_same(everything(trainer), before)


def test_bad_losses_are_left_out_of_the_means_and_counted_in_the_log(caplog):
    model, data, writer = Towers(), data_of(4), Writer()
    reference = trainer_of(copy.deepcopy(model))
    good = [data.dataloader[0], data.dataloader[1], data.dataloader[3]]
    losses = [reference.step([batch], 0)["loss"].item() for batch in good]
    data.dataloader[2] = bad(data.dataloader[2])
    with caplog.at_level(logging.INFO):
        train_epoch(trainer_of(model), data, state_of(model, 4), writer=writer)
    assert writer[-1][2]["skipped_steps"] == 1
    assert writer[-1][2]["loss"] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-6)
    assert "Bad steps: 1" in caplog.messages[-1]


def test_too_many_in_a_row_stop_the_run_where_it_was_and_name_the_samples(tmp_path):
    model, data = Towers(), data_of(8)
    for number, batch in enumerate(data.dataloader):
        batch["key"] = [f"{number}-{i}" for i in range(SIZE)]
    data.dataloader[2:6] = [bad(batch) for batch in data.dataloader[2:6]]  # the last two good steps come too late
    trainer = trainer_of(model, folder=tmp_path, limit=3)
    after_two = trainer_of(copy.deepcopy(model))
    for number in range(2):
        after_two.step([data.dataloader[number]], number)
    with pytest.raises(TooManyBadSteps, match="3 steps in a row"):
        train_epoch(trainer, data, state_of(model, 8))
    assert_same(everything(trainer), everything(after_two))
    named = json.loads((tmp_path / "bad_steps-0.json").read_text())
    assert named == {str(step): [f"{step}-{i}" for i in range(SIZE)] for step in (2, 3, 4)}


def test_with_a_scaler_too_every_step_after_the_limit_is_skipped():
    model = Towers()
    trainer, batches = trainer_of(model, scaler=Scaler(2.0), limit=2), batches_of(5)
    before = everything(trainer)
    for number, batch in enumerate([bad(batches[0]), bad(batches[1]), *batches[2:]]):
        trainer.step([batch], number)
    assert_same(everything(trainer), before)
    counters = trainer.guard.counters()
    assert (counters["skipped_steps"], counters["bad_in_a_row"], counters["scaler_overflows"]) == (5, 5, 0)


def test_a_run_of_skipped_steps_alone_is_an_error():
    trainer = trainer_of(Towers(), limit=0)
    trainer.guard.check_run()  # no error without steps: a resumed run may have completed all epochs
    batches = [bad(batch) for batch in batches_of(3)]
    for number, batch in enumerate(batches):
        trainer.step([batch], number)
    with pytest.raises(TooManyBadSteps, match=r"All 3 steps of this run were skipped.*--precision"):
        trainer.guard.check_run()
    saved = trainer.guard.state_dict()
    trainer.step([batches_of(1)[0]], 3)
    trainer.guard.check_run()
    resumed = trainer_of(Towers(), limit=0)
    resumed.guard.load_state_dict(saved)
    resumed.step([batches[0]], 3)
    with pytest.raises(TooManyBadSteps, match="All 1 steps"):
        resumed.guard.check_run()


def test_a_short_run_in_which_the_scaler_lowers_its_factor_ends_with_a_warning(caplog):
    trainer = trainer_of(Towers(), scaler=Scaler(1e308 * 1.7), limit=0)
    trainer.step([batches_of(1)[0]], 0)
    counters = trainer.guard.counters()
    assert (counters["scaler_overflows"], counters["skipped_steps"]) == (1, 0)
    trainer.guard.check_run()
    assert "All 1 steps of this run were skipped while the gradient scaler" in caplog.text


def test_without_a_limit_it_goes_on(tmp_path):
    model, data = Towers(), data_of(6)
    data.dataloader[1:5] = [bad(batch) for batch in data.dataloader[1:5]]
    trainer = trainer_of(model, folder=tmp_path, limit=0)
    train_epoch(trainer, data, state_of(model, 6), 1)
    assert trainer.guard.counters()["skipped_steps"] == 4
    assert list(tmp_path.iterdir()) == []


class Scaler:
    """The protocol of torch: a scale, and no step if a gradient is not finite."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def is_enabled(self):
        return True

    def scale(self, value):
        return value * self.factor

    def unscale_(self, optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.found = any(not torch.isfinite(gradient).all() for gradient in gradients)
        for gradient in gradients:
            gradient /= self.factor

    def step(self, optimizer):
        if not self.found:
            optimizer.step()

    def update(self):
        self.factor *= 0.5 if self.found else 1


def test_a_scaler_s_overflow_is_its_own_affair_and_counted_apart():
    model = Towers()
    trainer = trainer_of(model, scaler=Scaler(2.0))
    (batch,) = batches_of(1)
    trainer.step([batch], 0)
    before = everything(trainer)
    for factor, overflows, skipped in [(1e308, 1, 0), (2.0, 1, 1), (1.0, 1, 2)]:
        trainer.scaler.factor = factor
        hurt = batch if factor > 2 else bad(batch)
        if factor > 2:
            trainer.scaler.scale = lambda value: value * 1e308 * 10  # more than there are
        else:
            trainer.scaler.scale = lambda value, factor=factor: value * factor
        trainer.step([hurt], 1)
        assert_same(everything(trainer), before)
        counters = trainer.guard.counters()
        assert (counters["scaler_overflows"], counters["skipped_steps"]) == (overflows, skipped)


def test_a_skip_that_only_the_scaler_sees_is_an_overflow():
    """Saturating chips: the gradients stay finite, and the scaler reads a status flag."""

    class FlagScaler(Scaler):
        overflowed = True

        def step(self, optimizer):
            self.found = True

    trainer = trainer_of(Normed(), scaler=FlagScaler(2.0), limit=0)
    trainer.step([batches_of(1)[0]], 0)
    trainer.scaler.factor = 1.0
    before = everything(trainer)
    trainer.step([batches_of(2)[1]], 1)
    assert_same(everything(trainer), before)
    counters = trainer.guard.counters()
    assert (counters["scaler_overflows"], counters["skipped_steps"]) == (1, 1)
    with pytest.raises(TooManyBadSteps, match="All 2 steps"):
        trainer.guard.check_run()


def ranks_skip(rank: int, world_size: int) -> dict:
    """Make a step with NaN on rank 1 only and a good one, and return the state of each rank after each step."""
    return {form: steps_of_a_rank(rank, world_size, form) for form in ("fused", "flat")}


def steps_of_a_rank(rank: int, world_size: int, form: str) -> dict:
    model = Towers()
    trainer = trainer_of(model, form)
    trainer.model = DistributedDataParallel(model)
    batches = batches_of(3 * world_size)[rank::world_size]
    found = []
    for number, batch in enumerate(batches):
        trainer.step([bad(batch) if (number, rank) == (1, 1) else batch], number)
        found.append(everything(trainer))
    return {"after": found, "counters": {name: int(value) for name, value in trainer.guard.counters().items()}}


@pytest.mark.parametrize("form", ["fused", "flat"])
def test_all_ranks_skip_together(form, tmp_path):
    of_all = run_ranks(__file__, "ranks_skip", (4,), tmp_path)[4]
    ranks = [rank[form] for rank in of_all]
    for rank in ranks:
        first, second, third = rank["after"]
        assert_same(second, first)
        assert_same(third, ranks[0]["after"][2])
        assert not torch.equal(third["logit_scale"], second["logit_scale"])
        assert rank["counters"] == {"skipped_steps": 1, "bad_in_a_row": 0, "scaler_overflows": 0}


# The average of the weights


def test_the_average_follows_its_formula():
    model = nn.Linear(2, 1)
    average, expected = WeightAverage(model, 0.5), model.weight.detach().clone()
    for number in range(20):
        with torch.no_grad():
            model.weight.normal_()
        average.update(number, torch.tensor(number == 4))
        decay = min(0.5, (1 + number) / (10 + number)) if number != 4 else 1.0
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.state_dict()["weight"], expected)


def test_the_model_computes_with_the_average_for_a_while():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).bfloat16()
    model[0].requires_grad_(False)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model[1].weight.add_(1)
    own = model[1].weight.data_ptr()
    average.update(100)
    mean = average.state_dict()["1.weight"]
    assert mean.dtype == torch.float32, "in half precision small changes would be lost"
    with average.in_place():
        assert torch.equal(model[1].weight, mean.bfloat16())
        assert model[1].weight.dtype == torch.bfloat16
    assert model[1].weight.data_ptr() == own
    with pytest.raises(ValueError, match="another model"):
        average.load_state_dict({"0.weight": torch.zeros(1)})


def test_averaged_weights_are_saved_and_resumed_and_begin_where_there_are_none():
    model = Towers()
    trainer = trainer_of(model)
    state = state_of(model, 4)
    state.parts |= {"average": trainer.average, "guard": trainer.guard}
    for number, batch in enumerate(batches_of(2)):
        trainer.step([batch], number)
    saved = copy.deepcopy(state.state_dict())
    other = Towers()
    other.logit_scale.data.fill_(3.0)
    resumed = state_of(other, 4)
    resumed.parts["average"] = average = WeightAverage(other, 0.9)
    resumed.load_state_dict(saved)
    ours, theirs = average.state_dict(), trainer.average.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    del saved["state_dict_ema"]
    resumed.load_state_dict(saved)
    assert torch.equal(average.state_dict()["logit_scale"], model.logit_scale.float())


def test_the_epoch_goes_on_in_its_midst_with_the_same_log():
    """A checkpoint of step 3 of 7 is enough to make the other four steps and to log the same values."""
    whole, writer, saved = Towers(), Writer(), {}
    trainer, state = trainer_of(whole), state_of(whole, 7)
    state.parts |= parts_of(trainer)

    class Saver(NullSaver):
        def after_step(self) -> None:
            if state.step == 3:
                saved.update(copy.deepcopy(state.state_dict()))

    data = data_of(7)
    data.dataloader[1] = bad(data.dataloader[1])
    train_epoch(trainer, data, state, 5, writer, saver=Saver())

    again, rest = Towers(), Writer()
    resumed, state = trainer_of(again), state_of(again, 7)
    state.parts |= {**parts_of(resumed), "progress": Progress(CPU, 5, rest)}
    state.load_state_dict(saved)
    assert (state.epoch, state.step, state.epoch_step, state.epoch_samples) == (0, 3, 3, 3 * SIZE)
    data = SimpleNamespace(dataloader=data_of(7).dataloader[3:], set_epoch=lambda epoch: None, skipped=None)
    train_epoch(resumed, data, state)
    assert_same(everything(resumed), everything(trainer))
    assert [step for step, *_ in rest] == [5, 6]
    for ours, theirs in zip(rest, writer[1:], strict=True):
        for name in ("loss", "scale", "skipped_steps", "lr"):
            assert ours[2][name] == theirs[2][name]
    assert (state.epoch, state.epoch_step, state.step, state.samples_seen) == (1, 0, 7, 7 * SIZE)


@pytest.mark.parametrize(("per_step", "steps", "expected"), [(8, 6, 3), (4, 12, 5), (16, 3, 2), (40, 1, 1)])
def test_another_number_of_processes_goes_on_after_the_samples_that_are_done(per_step, steps, expected):
    """After 5 steps of 4 samples, only as many steps are left as there are samples."""
    model = Towers()
    state = state_of(model, 12)
    state.samples_per_step, state.epoch, state.step, state.epoch_step, state.epoch_samples = 4, 1, 17, 5, 20
    other = state_of(Towers(), 12)
    other.steps_per_epoch, other.samples_per_step = steps, per_step
    other.load_state_dict(state.state_dict())
    assert (other.epoch, other.epoch_step, other.step) == (1, expected, steps + expected)
    assert (other.steps_per_epoch - other.epoch_step) * per_step <= 48 - 20
