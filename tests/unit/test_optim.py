"""Tests of training.optim: groups, fused and unfused states, timm's optimizers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from open_clip import device as devices
from training.flat_adamw import FlatAdamW
from training.optim import create_optimizer
from training.params import OptimConfig, parse_args, sections


class Towers(nn.Module):
    """A model with the kinds of parameters of CLIP, by name and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones([]))
        self.logit_bias = nn.Parameter(torch.ones([]))
        self.positional_embedding = nn.Parameter(torch.randn(3, 4))
        self.ln_wide = nn.Parameter(torch.randn(2, 2))  # no decay because of its name
        self.relative_bias_table = nn.Parameter(torch.randn(2, 2))
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.bn1 = nn.BatchNorm1d(4)
        self.locked = nn.Linear(4, 4).requires_grad_(False)

    def no_weight_decay(self) -> set[str]:
        return {"positional_embedding"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.norm(self.linear(x))) @ self.positional_embedding.T
        return (x * self.logit_scale + self.logit_bias).sum() + (self.ln_wide @ self.relative_bias_table).sum()


NO_DECAY = ["logit_scale", "logit_bias", "ln_wide", "relative_bias_table", "linear.bias", "norm.weight", "norm.bias",
            "bn1.weight", "bn1.bias"]  # fmt: skip
DECAY = ["positional_embedding", "linear.weight"]


def config(*argv: str) -> OptimConfig:
    return sections(parse_args(argv)).optim


def names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [[by_id[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(5, 4)).backward()
    optimizer.step()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Towers()


def test_adamw_has_two_groups_in_the_order_of_the_parameters(model):
    optimizer = create_optimizer(model, config("--model", "ViT-B-32", "--wd", "0.1"), "cpu")
    assert type(optimizer) is torch.optim.AdamW
    assert names(model, optimizer) == [NO_DECAY, DECAY]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (5e-4, (0.9, 0.98), 1e-6)


def test_adamw_without_options_has_the_defaults_of_torch(model):
    group = create_optimizer(model, OptimConfig(), "cpu").param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.999), 1e-8)


def test_a_learning_rate_of_zero_is_kept(model):
    assert create_optimizer(model, config("--lr", "0"), "cpu").param_groups[0]["lr"] == 0.0


def test_a_group_may_be_empty():
    """States are compatible for any locked parameters."""
    optimizer = create_optimizer(nn.Linear(2, 2, bias=False), config(), "cpu")
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1]


def test_a_model_without_trainable_parameters_is_an_error(model):
    with pytest.raises(ValueError, match="no trainable parameter"):
        create_optimizer(model.requires_grad_(False), config(), "cpu")


@pytest.mark.parametrize(("choice", "skips", "dtype", "expected", "fused"), [
    ("auto", True, torch.float32, torch.optim.AdamW, True),
    ("auto", False, torch.float32, FlatAdamW, None),
    ("auto", True, torch.float16, FlatAdamW, None),
    ("auto", True, torch.bfloat16, torch.optim.AdamW, True),
    ("torch", False, torch.float32, torch.optim.AdamW, True),
    ("off", True, torch.float32, torch.optim.AdamW, None),
])  # fmt: skip
def test_the_form_follows_option_device_and_dtype(model, monkeypatch, choice, skips, dtype, expected, fused):
    monkeypatch.setattr(type(devices.get("cpu")), "fused_adamw_skips", skips)
    optimizer = create_optimizer(model.to(dtype), config("--fused-optimizer", choice), torch.device("cpu"))
    assert type(optimizer) is expected
    assert {group["fused"] for group in optimizer.param_groups} == {fused}


@pytest.mark.parametrize(("form", "dtype"), [
    ("torch", torch.float16), ("off", torch.float16), ("npu", torch.float16), ("npu", torch.bfloat16),
])  # fmt: skip
def test_forms_that_do_not_support_a_dtype_are_refused(model, form, dtype):
    with pytest.raises(ValueError, match=f"--fused-optimizer {form} .* Use --fused-optimizer auto"):
        create_optimizer(model.to(dtype), config("--fused-optimizer", form), "cpu")


@pytest.mark.parametrize("name", ["sgd", "lamb", "adafactor"])
def test_timm_optimizers_refuse_float16_weights(model, name):
    with pytest.raises(ValueError, match=f"--opt timm/{name} keeps its state in .* float16.* Use --opt adamw"):
        create_optimizer(model.half(), config("--opt", f"timm/{name}", "--lr", "0.1"), "cpu")
    create_optimizer(model.bfloat16(), config("--opt", f"timm/{name}", "--lr", "0.1"), "cpu")


@pytest.mark.parametrize(("first", "second"), [("torch", "off"), ("off", "torch")])
def test_states_are_compatible_between_fused_and_unfused(model, first, second):
    """A run that changes the implementation after half of the steps gives the same weights."""
    unbroken = copy.deepcopy(model)
    straight = create_optimizer(unbroken, config("--fused-optimizer", "off"), "cpu")
    before = create_optimizer(model, config("--fused-optimizer", first), "cpu")
    for seed in range(3):
        step(unbroken, straight, seed)
        step(model, before, seed)
    stored = io.BytesIO()
    torch.save(before.state_dict(), stored)
    stored.seek(0)
    after = create_optimizer(model, config("--fused-optimizer", second, "--lr", "0.5"), "cpu")
    after.load_state_dict(torch.load(stored, weights_only=True))
    assert {group["fused"] for group in after.param_groups} == {True if second == "torch" else None}
    assert {group["lr"] for group in after.param_groups} == {5e-4}, "the checkpoint has the learning rate"
    for seed in range(3, 6):
        step(unbroken, straight, seed)
        step(model, after, seed)
    for ours, theirs in zip(model.parameters(), unbroken.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_loading_does_not_change_the_given_state(model):
    optimizer = create_optimizer(model, config("--fused-optimizer", "off"), "cpu")
    step(model, optimizer)
    state = optimizer.state_dict()
    create_optimizer(model, config("--fused-optimizer", "torch"), "cpu").load_state_dict(state)
    assert {group["fused"] for group in state["param_groups"]} == {None}


def test_a_state_with_other_groups_raises_the_error_of_torch(model):
    optimizer = create_optimizer(model, config(), "cpu")
    other = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(other)


def test_timm_optimizers_get_the_options_and_the_names_without_decay(model):
    optimizer = create_optimizer(
        model, config("--opt", "timm/sgd", "--lr", "0.3", "--momentum", "0.7", "--wd", "0.1"), "cpu"
    )
    assert type(optimizer).__name__ == "SGD"
    decay = {name for names_, group in zip(names(model, optimizer), optimizer.param_groups, strict=True)
             for name in names_ if group["weight_decay"] > 0}  # fmt: skip
    assert decay == {"linear.weight", "ln_wide", "relative_bias_table"}, "no_weight_decay() is used"
    assert {(group["lr"], group["momentum"]) for group in optimizer.param_groups} == {(0.3, 0.7)}
    step(model, optimizer)


def test_timm_optimizers_keep_their_own_defaults(model):
    import timm.optim

    ours = create_optimizer(model, config("--opt", "timm/lamb", "--lr", "0.1", "--model", "ViT-B-32"), "cpu")
    theirs = timm.optim.create_optimizer_v2(model, "lamb", lr=0.1, weight_decay=0.2)
    assert ours.defaults == theirs.defaults
    given = create_optimizer(
        model, config("--opt", "timm/adamw", "--lr", "0.1", "--beta1", "0.5", "--beta2", "0.6", "--eps", "0.1"), "cpu"
    )
    assert (given.defaults["betas"], given.defaults["eps"]) == ((0.5, 0.6), 0.1)


def test_errors_of_unknown_optimizers_have_similar_names(model):
    with pytest.raises(ValueError, match="timm/lamb"):
        create_optimizer(model, OptimConfig(opt="timm/lambb", lr=0.1), "cpu")
    with pytest.raises(ValueError, match="Unknown --opt 'sgd'"):
        create_optimizer(model, OptimConfig(opt="sgd", lr=0.1), "cpu")
    with pytest.raises(ValueError, match="both --beta1 and --beta2"):
        create_optimizer(model, OptimConfig(beta1=0.9), "cpu")
