"""Tests of training.flat_adamw: agreement with torch's AdamW, skipped steps, compatible state dicts."""

from __future__ import annotations

import copy
import io
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from training.flat_adamw import FlatAdamW

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6}


class Late(nn.Module):
    """Three layers: one always used, one used only on request, one never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.late, self.unused = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, use_late: bool = True) -> torch.Tensor:
        x = self.first(x)
        return self.late(x) if use_late else x


def groups(model: nn.Module) -> list[dict]:
    small = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": small, "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.2},
    ]


def flat(model: nn.Module) -> FlatAdamW:
    return FlatAdamW(groups(model), **OPTIONS)


def plain(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(model), **OPTIONS)


def fused(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(model), **OPTIONS, fused=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, use_late: bool = True) -> None:
    for seed in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(model.first.weight.dtype)
        optimizer.zero_grad()
        model(x, use_late).square().sum().backward()
        optimizer.step()


def stored(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def all_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {p: name for name, p in model.named_parameters()}
    for p, state in optimizer.state.items():
        found |= {f"{names[p]} {name}": value.clone() for name, value in state.items()}
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if tolerance:
            error = (found[name] - value).abs().max() / value.abs().max()
            assert error < tolerance, name
        else:
            assert torch.equal(found[name], value), name


def random_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


# The formula


@pytest.mark.parametrize("reference", [plain, fused])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_hundred_steps_equal_those_of_torch(reference, dtype, tolerance):
    model, other = Late().to(dtype), Late().to(dtype)
    ours, theirs = flat(model), reference(other)
    for seed in range(100):
        for each, optimizer in ((model, ours), (other, theirs)):
            random_gradients(each, seed)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + seed % 7)
            optimizer.step()
    assert_same(all_tensors(model, ours), all_tensors(other, theirs), tolerance)


def test_each_group_uses_its_own_coefficients():
    model, other = Late(), Late()
    ours, theirs = flat(model), plain(other)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.param_groups[1]["betas"] = (0.0, 0.5)
    for seed in range(5):
        for each, optimizer in ((model, ours), (other, theirs)):
            random_gradients(each, seed)
            optimizer.step()
    assert_same(all_tensors(model, ours), all_tensors(other, theirs), 1e-6)


def test_parameters_without_a_gradient_do_not_change():
    """Parameters that are used later have a smaller step count; those without a gradient have no state."""
    model, other = Late(), Late()
    ours, theirs = flat(model), plain(other)
    for use_late, steps in ((False, range(2)), (True, range(2, 5)), (False, range(5, 6)), (True, range(6, 8))):
        train(model, ours, steps, use_late)
        train(other, theirs, steps, use_late)
    assert_same(all_tensors(model, ours), all_tensors(other, theirs), 1e-6)
    assert not any(p in ours.state for p in model.unused.parameters())
    assert torch.equal(model.unused.weight, Late().unused.weight)
    assert (ours.state[model.first.weight]["step"], ours.state[model.late.weight]["step"]) == (8, 5)


def test_a_group_that_is_added_later_is_trained():
    model, other = Late(), Late()
    optimizers = []
    for each, kind in ((model, FlatAdamW), (other, torch.optim.AdamW)):
        optimizer = kind([each.first.weight], **OPTIONS)
        optimizer.add_param_group({"params": [each.late.weight], "lr": 0.5})
        train(each, optimizer, range(3))
        optimizers.append(optimizer)
    assert_same(all_tensors(model, optimizers[0]), all_tensors(other, optimizers[1]), 1e-6)


def test_norm_and_scale_equal_those_of_clip_grad_norm():
    model, other = Late(), Late()
    ours, theirs = flat(model), plain(other)
    for seed in range(4):
        for each, optimizer in ((model, ours), (other, theirs)):
            random_gradients(each, seed, scale=10.0)
            if optimizer is ours:
                norm = ours.gradient_norm()
                ours.scale_gradients((1.0 / (norm + 1e-6)).clamp(max=1.0))
                assert ours.gradient_norm() == pytest.approx(1.0, abs=1e-5)
            else:
                assert norm == pytest.approx(nn.utils.clip_grad_norm_(other.parameters(), 1.0).item(), rel=1e-6)
            optimizer.step()
    assert_same(all_tensors(model, ours), all_tensors(other, theirs), 1e-5)


# Number of launches


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [2, 40])
def test_the_number_of_operators_does_not_depend_on_the_number_of_parameters(layers):
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers)])
    optimizer = flat(model)
    for seed in range(2):
        random_gradients(model, seed)
        optimizer.found_inf = torch.tensor(0.0)
        with Calls() as calls:
            optimizer.scale_gradients((1.0 / optimizer.gradient_norm()).clamp(max=1.0))
            optimizer.step()
    assert calls.counts["aten::_foreach_copy_"] == 1
    assert calls.counts["aten::linalg_vector_norm"] == 1
    assert not any("_local_scalar_dense" in name or "equal" in name for name in calls.counts)
    large = [name for name in calls.counts if name.startswith("aten::")]
    assert sum(calls.counts[name] for name in large) <= 40


@pytest.mark.parametrize("layers", [2, 20])
def test_with_layer_decay_the_number_of_operators_grows_by_six_per_learning_rate(layers):
    """Per rate the factor of the rate and that of the decay are computed and applied; moments are updated together."""

    def count(rates: int) -> int:
        model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers * 8)])
        parameters = list(model.parameters())
        size = len(parameters) // rates
        groups = [
            {"params": parameters[number * size : (number + 1) * size], "lr": 1e-3 * 0.9**number}
            for number in range(rates)
        ]
        optimizer = FlatAdamW(groups, weight_decay=0.1)
        for seed in range(2):
            random_gradients(model, seed)
            with Calls() as calls:
                optimizer.step()
        return sum(number for name, number in calls.counts.items() if not name.startswith("aten::slice"))

    assert count(8) - count(1) == 7 * 6


def test_layer_decay_equals_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = Late(), Late()
    theirs.load_state_dict(ours.state_dict())

    def split(model: nn.Module) -> list[dict]:
        return [{"params": [p], "lr": 1e-2 * 0.7**n, "weight_decay": 0.1 * (n % 2)} for n, p in
                enumerate(model.parameters())]  # fmt: skip

    mine, reference = FlatAdamW(split(ours)), torch.optim.AdamW(split(theirs))
    train(ours, mine, range(6))
    train(theirs, reference, range(6))
    assert_same(all_tensors(ours, mine), all_tensors(theirs, reference), 1e-6)


# Skipping


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_a_skipped_step_changes_nothing_and_has_no_effect_on_the_next_one(dtype, before, value):
    model, reference = Late().to(dtype), Late().to(dtype)
    ours, theirs = flat(model), flat(reference)
    for each, optimizer in ((model, ours), (reference, theirs)):
        train(each, optimizer, range(before), use_late=before != 3)
    weights = all_tensors(model, ours)
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
    ours.scale_gradients(torch.tensor(float("nan")))
    ours.found_inf = torch.tensor(True)
    ours.step()
    found = all_tensors(model, ours)
    assert_same({name: found[name] for name in weights}, weights)
    assert all(not value.any() for name, value in found.items() if name not in weights and "master" not in name)
    assert ours.found_inf is None, "it is for one step"
    for each, optimizer in ((model, ours), (reference, theirs)):
        train(each, optimizer, range(5, 8))
    expected = all_tensors(reference, theirs)
    assert_same({name: value for name, value in all_tensors(model, ours).items() if name in expected}, expected)


def test_a_step_with_found_inf_0_equals_a_step_without_found_inf():
    model, other = Late(), Late()
    ours, theirs = flat(model), flat(other)
    for seed in range(3):
        random_gradients(model, seed)
        random_gradients(other, seed)
        ours.found_inf = torch.tensor(0.0)
        ours.step()
        theirs.step()
    assert_same(all_tensors(model, ours), all_tensors(other, theirs))


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_the_rounded_fp32_weights(dtype):
    """Small gradients, whose squares underflow in float16, and updates below the precision of the weights."""
    model = Late().to(dtype)
    other = copy.deepcopy(model).float()
    ours, theirs = flat(model), plain(other)
    for seed in range(50):
        random_gradients(model, seed, scale=1e-4)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = p.grad.float()
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-4
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        state = ours.state[p]
        assert state["exp_avg_sq"].dtype == state["master_weight"].dtype == torch.float32
        torch.testing.assert_close(state["master_weight"], q.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(p, state["master_weight"].to(dtype))


def test_weights_that_were_set_from_outside_are_used():
    """The clamp of logit_scale does this, and loading a model after the optimizer was created."""
    model = Late().bfloat16()
    optimizer = flat(model)
    train(model, optimizer, range(2))
    with torch.no_grad():
        model.first.bias.clamp_(-0.01, 0.01)
        model.late.weight[0] = 3.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masters = {name: optimizer.state[p]["master_weight"].clone() for name, p in model.late.named_parameters()}
    random_gradients(model, 0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    after = optimizer.state[model.late.weight]["master_weight"]
    assert torch.equal(after[0], torch.full((3,), 3.0))
    assert torch.equal(after[1:], masters["weight"][1:]), "what others left alone is not rounded"


# States


@pytest.mark.parametrize("make_first", [plain, fused, flat])
@pytest.mark.parametrize("make_second", [plain, fused, flat])
def test_states_are_compatible_in_both_directions(make_first, make_second):
    model, reference = Late(), Late()
    straight = plain(reference)
    train(reference, straight, range(2), use_late=False)
    train(reference, straight, range(2, 8))
    before = make_first(model)
    train(model, before, range(2), use_late=False)
    train(model, before, range(2, 4))
    state = stored(before.state_dict())
    after = make_second(model)
    own = [{key: group[key] for key in ("fused", "foreach")} for group in after.param_groups]
    state["param_groups"] = [{**group, **kept} for group, kept in zip(state["param_groups"], own, strict=True)]
    after.load_state_dict(state)
    train(model, after, range(4, 8))
    assert_same(all_tensors(model, after), all_tensors(reference, straight), 1e-5)


def test_a_saved_state_has_the_layout_of_torch():
    model, reference = Late(), Late()
    ours, theirs = flat(model), fused(reference)
    train(model, ours, range(2))
    train(reference, theirs, range(2))
    saved, expected = stored(ours.state_dict()), stored(theirs.state_dict())
    assert [list(group) for group in saved["param_groups"]] == [list(group) for group in expected["param_groups"]]
    assert saved["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert list(saved["state"][index]) == list(state)
        for name, value in state.items():
            torch.testing.assert_close(saved["state"][index][name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(dtype):
    whole, model = Late().to(dtype), Late().to(dtype)
    straight, before = flat(whole), flat(model)
    train(whole, straight, range(6))
    train(model, before, range(3))
    weights, state = copy.deepcopy(model.state_dict()), stored(before.state_dict())
    resumed = Late().to(dtype)
    after = flat(resumed)
    train(resumed, after, range(20, 22))  # loading replaces the earlier state
    resumed.load_state_dict(weights)
    after.load_state_dict(state)
    train(resumed, after, range(3, 6))
    assert_same(all_tensors(resumed, after), all_tensors(whole, straight))


def test_states_that_do_not_fit_are_errors():
    model = Late()
    optimizer = flat(model)
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="amsgrad=True"):
        optimizer.load_state_dict({**state, "param_groups": [{**g, "amsgrad": True} for g in state["param_groups"]]})
    with pytest.raises(ValueError, match="parameter group"):
        flat(nn.Linear(2, 2)).load_state_dict(state)
    wider = Late()
    wider.first = nn.Linear(7, 3)
    with pytest.raises(ValueError, match=r"\[3, 4\].*\[3, 7\]"):
        flat(wider).load_state_dict(state)


# Errors


@pytest.mark.parametrize("change", [
    lambda model: model.bfloat16(),
    lambda model: setattr(model.first.weight, "data", model.first.weight.data.clone()),
])  # fmt: skip
def test_parameters_that_were_moved_are_an_error(change):
    model = Late()
    optimizer = flat(model)
    change(model)
    with pytest.raises(RuntimeError, match="before you create the optimizer"):
        train(model, optimizer, range(1))


def test_an_eps_of_zero_is_an_error():
    with pytest.raises(ValueError, match="eps=0"):
        FlatAdamW(Late().parameters(), eps=0.0)
