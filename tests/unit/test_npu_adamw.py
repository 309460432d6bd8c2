"""open_clip.device.npu_adamw with a fake of torch_npu's optimizer. tests/npu tests the real one."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from open_clip.device import npu_adamw
from training.checkpoint.state import TrainState

OPTIONS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}


class StandIn(torch.optim.Optimizer):
    """AdamW on flat tensors, created once from the parameters with gradients, with one integer step count."""

    def __init__(self, params, lr, betas, eps, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": False})
        self.combined: list[dict] | None = None
        self.is_states_combined = False

    @torch.no_grad()
    def _combine(self):
        if self.combined is not None or all(p.grad is None for group in self.param_groups for p in group["params"]):
            return
        self.combined = []
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            parameters, gradients = self._flat(members), self._flat([p.grad for p in members])
            self.combined.append({"members": members, "parameters": parameters, "gradients": gradients})

    @staticmethod
    def _flat(tensors):
        flat, start = torch.cat([tensor.reshape(-1) for tensor in tensors]), 0
        for tensor in tensors:
            tensor.data = flat[start : start + tensor.numel()].view_as(tensor)
            start += tensor.numel()
        return flat

    @torch.no_grad()
    def zero_grad(self, set_to_none=False):
        if set_to_none:
            raise ValueError("set_to_none is not supported in fused optimizers")
        self._combine()
        for group in self.combined or ():
            group["gradients"].zero_()

    @torch.no_grad()
    def step(self, closure=None):
        self._combine()
        assert self.combined is not None
        if not self.is_states_combined:
            for group in self.combined:
                for p in group["members"]:
                    self.state[p].setdefault("step", 0)
                    for moment in ("exp_avg", "exp_avg_sq"):
                        self.state[p][moment] = self.state[p].get(moment, torch.zeros_like(p)).clone()
                states = [self.state[p] for p in group["members"]]
                group["step"] = states[0]["step"]
                for moment in ("exp_avg", "exp_avg_sq"):
                    group[moment] = self._flat([state[moment] for state in states])
            self.is_states_combined = True
        for options, group in zip(self.param_groups, self.combined, strict=True):
            for p in group["members"]:
                self.state[p]["step"] += 1
            group["step"] += 1  # in place for a tensor, which then is shared with a parameter's state
            (beta1, beta2), step, gradient = options["betas"], float(group["step"]), group["gradients"]
            group["parameters"].mul_(1 - options["lr"] * options["weight_decay"])
            group["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
            group["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (group["exp_avg_sq"] / (1 - beta2**step)).sqrt().add_(options["eps"])
            group["parameters"].addcdiv_(group["exp_avg"], root, value=-options["lr"] / (1 - beta1**step))


class Late(nn.Module):
    """A model with a layer that the loss uses from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.late = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, use_late: bool) -> torch.Tensor:
        x = self.first(x)
        return self.late(x) if use_late else x


def groups(model: nn.Module) -> list[dict]:
    biases = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": biases, "weight_decay": 0.0}, {"params": [p for p in model.parameters() if p.ndim > 1]}]


def guarded(model: nn.Module) -> StandIn:
    optimizer = StandIn(groups(model), **OPTIONS)
    return npu_adamw.make_safe(optimizer)


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(model), **OPTIONS)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, use_late: bool = True) -> None:
    for seed in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x, use_late).square().sum().backward()
        optimizer.step()


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def stored(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_parameter_without_a_gradient_at_first_is_updated_later():
    model = Late()
    before = copy.deepcopy(model)
    optimizer = guarded(model)
    train(model, optimizer, range(1), use_late=False)
    torch.testing.assert_close(model.late.weight, before.late.weight * (1 - 0.1 * 0.2))  # it decays, as documented
    train(model, optimizer, range(1, 4))
    assert not torch.allclose(model.late.weight, before.late.weight * (1 - 0.1 * 0.2) ** 4)


def test_steps_equal_adamws():
    model, reference = Late(), Late()
    train(model, guarded(model), range(5))
    train(reference, plain(reference), range(5))
    assert_equal(model, reference)


@pytest.mark.parametrize("make_first", [plain, guarded])
@pytest.mark.parametrize("make_second", [plain, guarded])
def test_states_can_be_exchanged_with_adamw(make_first, make_second):
    model, reference = Late(), Late()
    train(reference, plain(reference), range(6))
    before = make_first(model)
    train(model, before, range(3))
    state = stored(before.state_dict())
    after = make_second(model)
    after.load_state_dict(state)
    train(model, after, range(3, 6))
    assert_equal(model, reference)


def test_a_state_can_be_loaded_after_steps_too():
    model, reference = Late(), Late()
    train(reference, plain(reference), range(4))
    optimizer = guarded(model)
    train(model, optimizer, range(2))
    weights, state = copy.deepcopy(model.state_dict()), stored(optimizer.state_dict())
    train(model, optimizer, range(7, 9))
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(model, optimizer, range(2, 4))
    assert_equal(model, reference)


def test_a_saved_state_has_adamws_form():
    model, reference = Late(), Late()
    optimizer, theirs = guarded(model), plain(reference)
    train(model, optimizer, range(2))
    train(reference, theirs, range(2))
    ours, expected = optimizer.state_dict(), theirs.state_dict()
    assert [group.keys() for group in ours["param_groups"]] == [group.keys() for group in expected["param_groups"]]
    assert ours["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert ours["state"][index].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(ours["state"][index][name], value)
    assert all(isinstance(state["step"], int) for state in optimizer.state.values()), "its own is left as it was"


def test_bfloat16_weights_raise_with_a_fix():
    with pytest.raises(ValueError, match=r"bfloat16.*--precision amp_bf16"):
        guarded(Late().bfloat16())
    train_in_half = guarded(Late().half())
    assert train_in_half.combined is not None


def test_replaced_gradients_raise():
    model = Late()
    optimizer = guarded(model)
    train(model, optimizer, range(1))
    model.zero_grad()  # sets None, so the backward pass creates new gradients that the optimizer does not use
    model(torch.ones(1, 4), True).sum().backward()
    with pytest.raises(RuntimeError, match=r"optimizer\.zero_grad"):
        optimizer.step()


def test_replaced_parameters_raise():
    model = Late()
    optimizer = guarded(model)
    model.first.weight.data = model.first.weight.data.clone()
    with pytest.raises(RuntimeError, match="after the model is moved"):
        train(model, optimizer, range(1))


def test_a_checkpoint_with_different_step_counts_raises_with_a_fix():
    uneven = Late()
    theirs = plain(uneven)
    train(uneven, theirs, range(1), use_late=False)
    for steps in (range(0), range(1)):  # the late layer has no state, and later another count
        train(uneven, theirs, steps)
        saved = TrainState(uneven, torch.device("cpu"), parts={"optimizer": theirs}).state_dict()
        model = Late()
        ours = TrainState(model, torch.device("cpu"), parts={"optimizer": guarded(model)})
        with pytest.raises(ValueError, match="not all at the same step"):
            ours.load_state_dict(saved)
