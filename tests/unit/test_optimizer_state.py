"""Tests of training.checkpoint.optimizer_state: states that were saved with other parameter groups."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from open_clip import CLIP, CustomTextCLIP
from training.checkpoint.optimizer_state import parameter_names
from training.checkpoint.state import TrainState
from training.optim import create_optimizer
from training.parameter_groups import has_no_decay, no_decay_names
from training.params import OptimConfig

CPU = torch.device("cpu")
CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 3, "width": 8, "head_width": 4, "patch_size": 8},
    "text_cfg": {"context_length": 6, "vocab_size": 30, "width": 8, "heads": 2, "layers": 2},
}
AS_3_3, AS_4 = OptimConfig(lr=1e-2, eps=1e-3), OptimConfig(lr=1e-2, eps=1e-3, decay_rule="4")
WITH_DECAY = OptimConfig(lr=1e-2, eps=1e-3, image_layer_decay=0.7, text_layer_decay=0.5)
WITH_IMAGE_DECAY = OptimConfig(lr=1e-2, eps=1e-3, image_layer_decay=0.6)


def state_of(cfg: OptimConfig, kind: type[nn.Module] = CLIP, lock: bool = False) -> TrainState:
    torch.manual_seed(0)
    model = kind(**CONFIG)
    if lock:
        model.lock_image_tower(1)
    return TrainState(model=model, device=CPU, parts={"optimizer": create_optimizer(model, cfg, CPU)})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        image, text, *_ = model(torch.randn(3, 3, 16, 16), torch.randint(1, 30, (3, 6)))
        (image @ text.T).diag().sum().mul(model.logit_scale).backward()
        optimizer.step()


def without_names(state: TrainState) -> dict:
    """Return a checkpoint as open_clip writes it."""
    saved = copy.deepcopy(state.state_dict())
    del saved["train_state"]
    return saved


def reference(state: TrainState, cfg: OptimConfig, model: nn.Module) -> torch.optim.AdamW:
    """Make torch's AdamW with a group per parameter: moments of `state` by name, options of `cfg` as documented."""
    saved = {}
    optimizer = state.parts["optimizer"]
    for name, p in state.model.named_parameters():
        if p in optimizer.state:
            saved[name] = optimizer.state[p]
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_4 = cfg.decay_rule == "4" or cfg.image_layer_decay is not None
    undecayed = no_decay_names(model) if of_4 else set()
    groups = []
    for name, p in named.items():
        is_without = p.ndim < 2 or name in undecayed or (not of_4 and has_no_decay(name, p))
        groups.append({"params": [p], "weight_decay": 0.0 if is_without else cfg.wd, "lr": cfg.lr * rate(name, cfg)})
    made = torch.optim.AdamW(groups, eps=cfg.eps)
    for name, p in named.items():
        if name in saved:
            made.state[p] = {key: value.clone() for key, value in saved[name].items()}
    return made


def rate(name: str, cfg: OptimConfig) -> float:
    """Return the scale of the learning rate of this model's parameters, written by hand."""
    if name.startswith("visual."):
        decay, after = cfg.image_layer_decay, {"visual.proj": 0, "visual.ln_post": 1}
        blocks, layers = "visual.transformer.resblocks.", 3
    else:
        decay, after = cfg.text_layer_decay, {"text_projection": 0, "ln_final": 1, "logit_scale": 0}
        blocks, layers = "transformer.resblocks.", 2
    if decay is None:
        return 1.0
    for prefix, power in after.items():
        if name.startswith(prefix):
            return decay**power
    if name.startswith(blocks):
        return decay ** (layers - int(name.removeprefix(blocks).split(".")[0]))
    return decay ** (layers + 1)


@pytest.mark.parametrize("names", ["named", "nameless"])
@pytest.mark.parametrize(("before", "after"), [
    (AS_3_3, AS_4), (AS_4, AS_3_3), (AS_3_3, WITH_DECAY), (WITH_DECAY, AS_3_3), (AS_4, WITH_IMAGE_DECAY),
    (WITH_IMAGE_DECAY, WITH_DECAY), (WITH_DECAY, AS_4),
])  # fmt: skip
def test_a_state_resumes_with_other_groups(before, after, names):
    saved = state_of(before)
    train(saved.model, saved.parts["optimizer"], range(3))
    expected = copy.deepcopy(saved.model)
    theirs = reference(saved, after, expected)

    ours = state_of(after)
    ours.load_state_dict(saved.state_dict() if names == "named" else without_names(saved))
    train(ours.model, ours.parts["optimizer"], range(3, 6))
    train(expected, theirs, range(3, 6))
    for (name, mine), other in zip(ours.model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)


def test_the_same_groups_keep_the_options_of_the_checkpoint():
    saved = state_of(OptimConfig(lr=1e-2, eps=1e-3, wd=0.4, decay_rule="4"))
    train(saved.model, saved.parts["optimizer"], range(2))
    ours = state_of(AS_4)
    ours.load_state_dict(without_names(saved))
    assert [group["weight_decay"] for group in ours.parts["optimizer"].param_groups] == [0.0, 0.4]


def test_parameters_that_were_locked_start_from_zero_and_unused_states_are_dropped(caplog):
    saved = state_of(WITH_DECAY, lock=True)
    train(saved.model, saved.parts["optimizer"], range(2))
    ours = state_of(AS_3_3)
    with caplog.at_level(logging.INFO):
        ours.load_state_dict(saved.state_dict())
    assert "start from zero: visual." in caplog.text
    optimizer = ours.parts["optimizer"]
    steps = {name: optimizer.state[p]["step"].item() for name, p in ours.model.named_parameters()
             if p in optimizer.state}  # fmt: skip
    assert steps["visual.proj"] == steps["text_projection"] == 2
    assert not any("resblocks.0" in name and name.startswith("visual") for name in steps)
    train(ours.model, optimizer, range(2))

    back = state_of(WITH_DECAY, lock=True)
    with caplog.at_level(logging.INFO):
        back.load_state_dict(ours.state_dict())
    assert "are not used: visual." in caplog.text


def test_names_of_a_wrapped_model_are_known():
    """torch writes names if an optimizer was made with them; DDP adds a prefix."""
    saved = state_of(AS_3_3)
    train(saved.model, saved.parts["optimizer"], range(2))
    content = without_names(saved)
    names = parameter_names(dict(saved.model.named_parameters()), saved.parts["optimizer"])
    for group, own in zip(content["optimizer"]["param_groups"], names, strict=True):
        group["param_names"] = [f"module.{name}" for name in own]
    ours = state_of(WITH_DECAY)
    ours.load_state_dict(content)
    assert len(ours.parts["optimizer"].state) == sum(map(len, names))


@pytest.mark.parametrize("after", [AS_3_3, AS_4])
def test_scalars_that_are_stored_as_one_element_resume(after):
    saved, ours = state_of(AS_3_3), state_of(after)
    train(saved.model, saved.parts["optimizer"], range(2))
    content = without_names(saved)
    content["state_dict"]["logit_scale"] = content["state_dict"]["logit_scale"].reshape(1)
    for state in content["optimizer"]["state"].values():
        state |= {key: value.reshape(1) for key, value in state.items() if key != "step" and value.ndim == 0}
    ours.load_state_dict(content)
    scale, theirs = ours.model.logit_scale, saved.model.logit_scale
    assert torch.equal(scale, theirs)
    moment = ours.parts["optimizer"].state[scale]["exp_avg"]
    assert torch.equal(moment, saved.parts["optimizer"].state[theirs]["exp_avg"])
    train(ours.model, ours.parts["optimizer"], range(2, 3))


@pytest.mark.parametrize("change", ["fewer", "shapes", "sizes"])
def test_a_state_that_fits_no_grouping_is_refused(change):
    saved = state_of(AS_4)
    train(saved.model, saved.parts["optimizer"], range(1))
    content = without_names(saved)
    if change == "fewer":
        content["optimizer"]["param_groups"][1]["params"].pop()
    elif change == "shapes":
        content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2, 2)
    else:
        groups = content["optimizer"]["param_groups"]
        groups[0]["params"].append(groups[1]["params"].pop(0))
    ours = state_of(AS_3_3)
    with pytest.raises(
        ValueError, match=r"are not those that open_clip makes from .* trainable parameters.*--pretrained"
    ):
        ours.load_state_dict(content)


def test_nadamw_does_not_take_the_state_of_adamw():
    saved = state_of(AS_3_3)
    train(saved.model, saved.parts["optimizer"], range(1))
    with pytest.raises(ValueError, match="no mu_product, which NAdam needs"):
        state_of(OptimConfig(opt="nadamw", lr=1e-3)).load_state_dict(saved.state_dict())


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_checkpoints_have_the_names_by_group(kind):
    state = state_of(WITH_DECAY, kind)
    names = state.state_dict()["train_state"]["optimizer_names"]
    assert sorted(sum(names, [])) == sorted(name for name, _ in state.model.named_parameters())  # noqa: RUF017
    assert [len(group) for group in names] == [len(g["params"]) for g in state.parts["optimizer"].param_groups]
