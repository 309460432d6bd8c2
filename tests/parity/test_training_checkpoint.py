"""A training checkpoint that open_clip_torch 3.3.0 wrote (tests/parity/record/training_checkpoint.py) resumes here."""

from __future__ import annotations

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


def state_of(**values) -> TrainState:
    model = CLIP(**MODEL, output_dict=True)
    optimizer = create_optimizer(model, OptimConfig(lr=5e-4, beta1=0.9, beta2=0.999, eps=1e-8), CPU)
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
