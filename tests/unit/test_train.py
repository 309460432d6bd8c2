"""A step and an epoch: gradients of accumulated batches, clipping, scaling, and what is logged."""

from __future__ import annotations

import argparse
import copy
import logging
import math
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import open_clip
import tiny_clip
from gloo_ranks import run_ranks
from open_clip import device as devices
from towers import CPU, FP32, SIZE, Towers, Writer, batches_of, data_of, state_of, train_epoch
from training.checkpoint import rng
from training.data.skips import BadSample, SkipCounter
from training.ema import WeightAverage
from training.objective import ContrastiveObjective, SigmoidObjective, create_objective
from training.optim import create_optimizer
from training.params import ObjectiveConfig, OptimConfig
from training.progress import Progress
from training.step_guard import StepGuard
from training.train import train_one_epoch
from training.trainer import Trainer, unwrap_model


def trainer_of(model: nn.Module, objective=None, **options) -> Trainer:
    optimizer = torch.optim.SGD(unwrap_model(model).parameters(), lr=0.1)
    return Trainer(model, objective or ContrastiveObjective(), optimizer, FP32, **options)


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in unwrap_model(model).named_parameters() if p.grad is not None}


def gradients_in_one_graph(model: nn.Module, objective, batches) -> dict[str, torch.Tensor]:
    """The reference: every batch forward with all activations kept, one loss, one backward."""
    outputs = [model(**batch) for batch in batches]
    whole = {
        name: value if value.ndim == 0 else torch.cat([o[name] for o in outputs]) for name, value in outputs[-1].items()
    }
    losses = objective.losses(whole)
    losses["loss"].backward()
    return gradients_of(model)


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, f"{name} proves nothing"
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, key=name: f"{key}: {text}"
        )


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("count", [2, 4])
def test_accumulated_batches_have_the_gradient_of_one_large_batch(siglip, dropout, count):
    model = Towers(dropout, bias=siglip)
    objective = SigmoidObjective() if siglip else ContrastiveObjective()
    batches, reference = batches_of(count), copy.deepcopy(model)
    torch.manual_seed(7)
    expected = gradients_in_one_graph(reference, objective, batches)
    following = torch.rand(1)
    torch.manual_seed(7)
    trainer_of(model, objective).backward(batches)
    assert_equal(gradients_of(model), expected)
    assert torch.rand(1) == following, "later random numbers must not depend on the replay"
    assert model.forwards == 2 * count - 1
    assert model.grad_forwards == count


def test_a_locked_tower_is_accumulated_too():
    model, batches = Towers(dropout=0.5), batches_of(3)
    model.visual.requires_grad_(False)
    reference = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = gradients_in_one_graph(reference, ContrastiveObjective(), batches)
    torch.manual_seed(1)
    trainer_of(model).backward(batches)
    assert_equal(gradients_of(model), expected)
    assert not any(name.startswith("visual") for name in expected)


def test_distillation_accumulates_with_one_answer_of_the_teacher_a_batch():
    teacher = Towers()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.3)
    teacher.requires_grad_(False)
    model, batches = Towers(), batches_of(3)
    reference = copy.deepcopy(model)
    objective = create_objective(ObjectiveConfig(), model, teacher)
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in ("image", "text")}
    trainer_of(reference, objective).backward([whole])
    teacher.forwards = 0
    trainer_of(model, objective).backward(batches)
    assert_equal(gradients_of(model), gradients_of(reference))
    assert teacher.forwards == 3


def test_accumulating_patch_dropout_of_a_real_image_tower():
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "patch_dropout": 0.5}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, output_dict=True).train()
    batches = [{"image": torch.randn(SIZE, 3, 32, 32), "text": torch.randint(1, 64, (SIZE, 8))} for _ in range(3)]
    reference = copy.deepcopy(model)
    torch.manual_seed(3)
    expected = gradients_in_one_graph(reference, ContrastiveObjective(), batches)
    torch.manual_seed(3)
    trainer_of(model).backward(batches)
    for name, value in expected.items():
        torch.testing.assert_close(gradients_of(model)[name], value, rtol=1e-5, atol=1e-6)
    torch.manual_seed(4)  # other patches give another gradient: the comparison above means something
    other = gradients_in_one_graph(copy.deepcopy(model).requires_grad_(), ContrastiveObjective(), batches)
    assert not torch.allclose(other["visual.conv1.weight"], expected["visual.conv1.weight"], atol=1e-6)


def ranks_accumulate(rank: int, world_size: int) -> dict:
    """On every rank: gradients of DDP in a second step: accumulated with each kind of loss, and of one batch."""
    everyone = batches_of(3 * world_size)
    own = everyone[rank::world_size]
    found = {}
    for name, siglip, static in (("clip", False, False), ("siglip", True, False), ("one", False, True)):
        model = Towers(bias=siglip)
        if siglip:
            objective = SigmoidObjective()
        else:
            objective = ContrastiveObjective(local_loss=True, gather_with_grad=True)
        wrapped = DistributedDataParallel(model, static_graph=static)
        trainer = trainer_of(wrapped, objective)
        for _ in range(2):
            trainer.optimizer.zero_grad()
            trainer.backward([{key: torch.cat([batch[key] for batch in own]) for key in own[0]}] if static else own)
        found[name] = gradients_of(wrapped)
    with pytest.raises(ValueError, match="static_graph"):
        trainer_of(wrapped, accum_freq=2)
    return found


def test_ranks_that_accumulate_have_the_gradient_of_one_large_batch(tmp_path):
    ranks = run_ranks(__file__, "ranks_accumulate", (2,), tmp_path)[2]
    whole = {key: torch.cat([batch[key] for batch in batches_of(6)]) for key in ("image", "text")}
    for name, siglip in (("clip", False), ("siglip", True), ("one", False)):
        model = Towers(bias=siglip)
        trainer_of(model, SigmoidObjective() if siglip else ContrastiveObjective()).backward([whole])
        for rank in ranks:
            assert_equal(rank[name], gradients_of(model))


def ranks_resume(rank: int, world_size: int) -> list[dict]:
    """Three steps of a wrapper, and the third again by a new one, from a checkpoint and after a rehearsal."""
    batches = batches_of(3 * world_size)[rank::world_size]
    whole = trainer_of(DistributedDataParallel(Towers(dropout=0.5)), grad_clip_norm=1.0)
    for number, batch in enumerate(batches[:2]):
        whole.step([batch], number)
    again = trainer_of(DistributedDataParallel(Towers(dropout=0.5)), grad_clip_norm=1.0)
    again.model.load_state_dict(whole.model.state_dict())
    again.rehearse([batches[2]])
    state, found = torch.get_rng_state(), []
    for trainer in (whole, again):
        torch.set_rng_state(state)
        trainer.step([batches[2]], 2)
        found.append({name: p.detach().clone() for name, p in unwrap_model(trainer.model).named_parameters()})
    return found


def test_a_resumed_run_of_several_ranks_adds_up_in_the_order_of_the_unbroken_one(tmp_path):
    for whole, again in run_ranks(__file__, "ranks_resume", (4,), tmp_path)[4]:
        for name, value in whole.items():
            assert torch.equal(again[name], value), name


def test_a_rehearsal_changes_nothing_and_is_left_out_of_the_speeds(monkeypatch):
    weights, reports = [], []
    monkeypatch.setattr(devices.CpuDevice, "synchronize", lambda self: time.sleep(0.5))
    for rehearses in (False, True):
        model, writer = Towers(dropout=0.5), Writer()
        trainer = trainer_of(model, rehearses=rehearses)
        train_epoch(trainer, data_of(2), state_of(model, 2), every=1, writer=writer)
        assert model.grad_forwards == 2 + rehearses
        weights.append([p.detach() for p in model.parameters()])
        reports.append(writer[0][2])
    assert all(map(torch.equal, *weights))
    assert all(0 < numbers["batch_time"] < 0.4 for numbers in reports)


class Calls(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name().removeprefix("aten::").split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("limit", [math.inf, 1.0])
def test_a_step_computes_one_norm_and_updates_the_weights_in_one_operator_per_group(limit):
    model = open_clip.CLIP(**tiny_clip.config(text={"layers": 5}), output_dict=True)
    optimizer = create_optimizer(model, OptimConfig(), CPU)
    guard, average = StepGuard(model, optimizer, CPU), WeightAverage(model, 0.9)
    trainer = Trainer(model, ContrastiveObjective(), optimizer, FP32, guard=guard, average=average)
    trainer.grad_clip_norm = limit
    images, texts = tiny_clip.inputs()
    batch = {"image": images, "text": texts[:2]}
    trainer.step([batch], 0)
    before = [p.grad for p in model.parameters()]
    with Calls() as calls:
        trainer.step([batch], 1)
    counts, num_parameters = calls.counts, len(before)
    assert num_parameters > 64
    assert counts["_fused_adamw_"] == len(optimizer.param_groups) == 2
    assert counts["_foreach_norm"] == 1
    assert counts["linalg_vector_norm"] == 3  # of the image features, the text features, and the gradients' norms
    assert counts["_foreach_mul_"] == (limit < math.inf) + math.ceil(num_parameters / 64)  # clipping; the average
    assert counts["_foreach_zero_"] == 0
    assert all(counts[name] < num_parameters for name in ("zero_", "mul_", "addcdiv_", "lerp_")), "a loop"
    assert all(p.grad is not old for p, old in zip(model.parameters(), before, strict=True)), "zero_grad keeps tensors"
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


class Scaler:
    """A gradient scaler that writes down in which order it is used."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def is_enabled(self):
        return True

    def scale(self, loss):
        self.calls.append("scale")
        return loss * 8

    def unscale_(self, optimizer):
        self.calls.append("unscale")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= 8

    def step(self, optimizer):
        self.calls.append("step")
        optimizer.step()

    def update(self):
        self.calls.append("update")


@pytest.mark.parametrize("count", [1, 2])
def test_the_bound_is_of_the_true_gradient_and_not_of_the_scaled_one(count):
    model, batches = Towers(), batches_of(count)
    reference = copy.deepcopy(model)
    scaler = Scaler()
    trainer_of(model, scaler=scaler, grad_clip_norm=1e-3).step(batches, 0)
    trainer_of(reference, grad_clip_norm=1e-3).step(batches, 0)
    assert scaler.calls == ["scale", "unscale", "step", "update"]
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    norm = torch.stack([gradient.norm() for gradient in gradients_of(model).values()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_the_scaler_unscales_without_a_bound_too():
    scaler = Scaler()
    trainer_of(Towers(), scaler=scaler).step(batches_of(1), 0)
    assert scaler.calls == ["scale", "unscale", "step", "update"]


def test_a_disabled_scaler_and_a_guard_that_never_skips_change_nothing():
    model, (batch,) = Towers(), batches_of(1)
    reference = copy.deepcopy(model)
    trainer_of(model).step([batch], 0)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    ContrastiveObjective().losses(reference(**batch))["loss"].backward()
    optimizer.step()
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("start", "end"), [(9.0, math.log(100)), (-3.0, 0.0)])
def test_the_logit_scale_stays_within_clips_bounds(start, end):
    model = Towers()
    model.logit_scale.data.fill_(start)
    trainer = trainer_of(model)
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    trainer.step(batches_of(1), 0)
    assert model.logit_scale.item() == pytest.approx(end)


def test_an_epoch_counts_schedules_and_reports(caplog):
    model, writer, steps = Towers(), Writer(), []
    trainer = trainer_of(model, scheduler=steps.append)
    state, data = state_of(model, 5, epoch=2, samples_seen=2 * 20), data_of(5)
    reference = trainer_of(copy.deepcopy(model))
    expected = [reference.step([batch], i)["loss"].item() for i, batch in enumerate(data.dataloader)]
    with caplog.at_level(logging.INFO):
        train_epoch(trainer, data, state, 3, writer)
    assert data.epochs == [2]
    assert steps == [10, 11, 12, 13, 14]
    assert (state.epoch, state.step, state.samples_seen) == (3, 15, 60)
    # The first step, then every third; the last one of the epoch in any case.
    assert [step for step, _, _ in writer] == [10, 13, 14]
    means = [expected[0], sum(expected[1:4]) / 3, expected[4]]
    assert [numbers["loss"] for _, _, numbers in writer] == pytest.approx(means, rel=1e-6)
    names = {"loss", "contrastive_loss", "data_time", "batch_time", "samples_per_second", "samples_per_second_per_gpu"}
    assert {*names, "scale", "lr"} == set(writer[0][2])
    assert writer[0][1] == "train"
    assert writer[2][2]["scale"] == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    line = caplog.messages[-1]
    for part in ("Train Epoch: 2 [20/20 (100%)]", "Data (t):", "/s/device", "LR: 0.1", "Logit Scale:", "Memory:"):
        assert part in line
    assert f"Loss: {means[2]:#.5g} ({sum(expected) / 5:#.5g})" in line
    assert "Skipped" not in line


def test_skipped_samples_are_in_the_line(caplog):
    model, data = Towers(), data_of(1)
    data.skipped = SkipCounter(0)
    for number in range(3):
        data.skipped.add_bad(BadSample("corrupt_image", f"{number}.png", "truncated"))
    with caplog.at_level(logging.INFO):
        train_epoch(trainer_of(model), data, state_of(model, 1))
    assert "Skipped: corrupt_image 3" in caplog.messages[-1]


def test_the_share_of_the_peak_is_reported_where_that_is_known(caplog):
    model, writer = Towers(), Writer()
    state = state_of(model, 1)
    state.parts["progress"] = Progress(CPU, writer=writer, pairs_at_peak=1000.0)
    with caplog.at_level(logging.INFO):
        train_epoch(trainer_of(model), data_of(1), state)
    (_, _, numbers) = writer[0]
    assert numbers["mfu"] == numbers["samples_per_second_per_gpu"] / 1000
    assert f" MFU: {numbers['mfu']:.1%} " in caplog.messages[-1]


@pytest.mark.parametrize(
    ("data", "saving", "sync", "expected"),
    [
        (0.01, 0.0, 0.0, ""),
        (0.3, 0.0, 0.0, "Waiting for data took 60% of the epoch. Use more --workers or faster storage."),
        (0.3, 2.0, 0.0, "Waiting for saving took 50% of the epoch. Save less often, or without --sync-save."),
        (0.3, 0.0, 3.0, ""),  # the host was ahead of the device, which did not wait for data
    ],
)
def test_what_the_epoch_waited_for(monkeypatch, data, saving, sync, expected):
    clock = [100.0]
    monkeypatch.setattr("training.progress.time.perf_counter", lambda: clock[0])
    progress = Progress(CPU, log_every_n_steps=4)

    progress.start_epoch()
    progress.add({"loss": torch.tensor(1.0)}, SIZE, 50.0)  # the workers start, which does not count
    clock[0] += 50
    progress.report()
    for _ in range(4):
        progress.add({"loss": torch.tensor(1.0)}, SIZE, data)
        clock[0] += 0.5
    progress.add_saving(saving)
    clock[0] += saving
    stack = torch.stack

    def slow_stack(values):
        numbers = stack(values)

        class Pending:
            def tolist(self):
                clock[0] += sync
                return numbers.tolist()

        return Pending()

    monkeypatch.setattr(torch, "stack", slow_stack)
    progress.report()
    assert progress.bottleneck() == expected
    progress.end_epoch()
    assert progress.bottleneck() == ""


def test_an_incomplete_last_step_is_left_out():
    model, data = Towers(), data_of(5)
    trainer, state, writer = trainer_of(model, accum_freq=2), state_of(model, 5, 2), Writer()
    train_epoch(trainer, data, state, writer=writer)
    assert (state.step, state.samples_seen) == (2, 4 * SIZE)
    assert [step for step, _, _ in writer] == [0, 1]


def test_no_batch_at_all_is_an_error():
    model = Towers()
    with pytest.raises(RuntimeError, match="--accum-freq"):
        train_epoch(trainer_of(model, accum_freq=3), data_of(2), state_of(model, 3, 3))


def test_the_host_waits_for_the_device_only_when_it_reports(monkeypatch):
    fetched = []
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _f=original, _n=name, **k: (fetched.append(_n), _f(self, *a, **k))[1]
        )
    model = Towers()
    trainer = trainer_of(model, grad_clip_norm=1.0, accum_freq=2)
    train_epoch(trainer, data_of(8), state_of(model, 8, 2), writer=Writer())
    assert fetched == ["tolist", "tolist"], "one for the first step, one for the last"


def test_ones_own_script_calls_it_as_in_open_clip():
    model, data = Towers(), data_of(3)
    model.float()
    data.dataloader[:] = [(batch["image"].float(), batch["text"].float()) for batch in data.dataloader]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.visual[0].weight.clone()
    scalars = []
    args = argparse.Namespace(
        device="cpu", precision="fp32", accum_freq=1, grad_clip_norm=None, log_every_n_steps=1, skip_scheduler=False
    )
    train_one_epoch(
        model, {"train": data}, ContrastiveObjective().loss, 1, optimizer, None, scalars.append, None, args,
        tb_writer=SimpleNamespace(add_scalar=lambda name, value, step: scalars.append((name, step))),
    )  # fmt: skip
    assert not torch.equal(before, model.visual[0].weight)
    assert [entry for entry in scalars if isinstance(entry, int)] == [3, 4, 5]
    assert ("train/loss", 5) in scalars
    assert data.epochs == [1]


def test_random_numbers_can_be_kept_and_left_alone():
    import random

    import numpy as np

    rng.random_seed(5, 1)
    random.gauss(0, 1)  # leaves a second number behind, which is part of the state
    state = rng.rng_state(CPU)
    with rng.untouched(CPU):
        first = (random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1))
    second = (random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1))
    rng.set_rng_state(state, CPU)
    third = (random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1))
    assert first == second == third
    rng.random_seed(6, 0)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(6)), "seed + rank"
