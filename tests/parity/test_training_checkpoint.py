"""A training checkpoint that open_clip_torch 3.3.0 wrote (tests/parity/record/training_checkpoint.py) resumes here."""

from __future__ import annotations

import copy
import dataclasses
import lzma
from pathlib import Path

import pytest
import torch

from open_clip import CLIP
from recorded_model import MODEL
from training.checkpoint.state import TrainState
from training.checkpoint.weights import load_checkpoint
from training.optim import create_optimizer
from training.params import OptimConfig

FIXTURE = Path(__file__).parent / "fixtures" / "training_checkpoint_3.3.0.pt.xz"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "epoch_2.pt"
    path.write_bytes(lzma.decompress(FIXTURE.read_bytes()))
    return path


OPTIM = OptimConfig(lr=5e-4, beta1=0.9, beta2=0.999, eps=1e-8, fused_optimizer="off")


def state_of(optim: OptimConfig = OPTIM, **values) -> TrainState:
    model = CLIP(**MODEL, output_dict=True)
    optimizer = create_optimizer(model, optim, CPU)
    return TrainState(model=model, device=CPU, name="recorded", parts={"optimizer": optimizer}, **values)


def test_weights_optimizer_and_position_are_taken_over(recorded):
    theirs = load_checkpoint(recorded)
    state = state_of(steps_per_epoch=4, samples_per_epoch=16)
    state.load_state_dict(theirs)
    assert (state.epoch, state.step, state.samples_seen) == (2, 8, 32)
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, theirs["state_dict"][name]), name
    moments = state.parts["optimizer"].state_dict()["state"]
    assert moments.keys() == theirs["optimizer"]["state"].keys()
    for index, moment in theirs["optimizer"]["state"].items():
        assert torch.equal(moments[index]["exp_avg"], moment["exp_avg"])
        assert moments[index]["step"] == 8


def test_what_we_save_of_it_has_their_form(recorded):
    theirs = load_checkpoint(recorded)
    state = state_of()
    state.load_state_dict(theirs)
    ours = state.state_dict()
    assert ours.keys() - {"train_state"} == theirs.keys()
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for mine, other in zip(ours["optimizer"]["param_groups"], theirs["optimizer"]["param_groups"], strict=True):
        assert mine["params"] == other["params"]
        assert mine["weight_decay"] == other["weight_decay"]
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()


def next_losses(model: CLIP, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        output = model(torch.randn(4, 3, 16, 16), torch.randint(1, 49408, (4, 8)))
        logits = output["logit_scale"] * output["image_features"] @ output["text_features"].T
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_next_losses_are_those_of_torch_with_their_groups(recorded):
    """Also if the groups of this run are others, as long as rates and decay of each parameter are the same."""
    theirs = load_checkpoint(recorded)
    model = CLIP(**MODEL, output_dict=True)
    model.load_state_dict(theirs["state_dict"])
    words = ("bn", "ln", "bias", "logit_scale")
    named = list(model.named_parameters())
    without = [p for name, p in named if p.ndim < 2 or any(word in name for word in words)]
    rest = [p for _, p in named if not any(p is other for other in without)]
    optimizer = torch.optim.AdamW([{"params": without}, {"params": rest}], lr=1.0)
    saved = theirs["optimizer"]
    optimizer.load_state_dict(copy.deepcopy(saved))  # torch does not copy the moments
    lr = saved["param_groups"][1]["lr"]
    for group in optimizer.param_groups:
        group["lr"] = lr
    expected = next_losses(model, optimizer)

    same = state_of()
    same.load_state_dict(copy.deepcopy(theirs))
    for group in same.parts["optimizer"].param_groups:
        group["lr"] = lr
    assert next_losses(same.model, same.parts["optimizer"]) == pytest.approx(expected)

    other = state_of(dataclasses.replace(OPTIM, lr=lr, decay_rule="3.3", image_layer_decay=1.0))
    other.load_state_dict(copy.deepcopy(theirs))
    assert next_losses(other.model, other.parts["optimizer"]) == pytest.approx(expected)

    layered = state_of(OptimConfig(lr=lr, image_layer_decay=0.5))
    layered.load_state_dict(theirs)
    name_of = {id(p): name for name, p in named}
    parameters = dict(layered.model.named_parameters())
    for index, p in enumerate([*without, *rest]):
        kept = layered.parts["optimizer"].state[parameters[name_of[id(p)]]]
        assert torch.equal(kept["exp_avg"], saved["state"][index]["exp_avg"]), name_of[id(p)]
