"""Parameter groups and locks as open_clip 4 (main at 4.2.0.dev0) has them.

fixtures/groups_and_locks_4.2.0.dev0.json was recorded by running it. Its license is MIT.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from open_clip import CLIP, CustomTextCLIP
from training.checkpoint.state import TrainState
from training.optim import create_optimizer
from training.params import OptimConfig

FIXTURE = Path(__file__).parent / "fixtures" / "groups_and_locks_4.2.0.dev0.json"
RECORDED = json.loads(FIXTURE.read_text(encoding="utf-8"))
GROUPS = [(case, run) for case, runs in RECORDED["optimizer_groups"].items() for run in runs]
LOCKS = [(*case.split(), int(number)) for case, runs in RECORDED["locks"].items() for number in runs]


def build(case: str) -> Any:
    config = RECORDED["configs"][case]
    is_modern = config["text_cfg"].get("text_arch") == "modern"
    return (CustomTextCLIP if is_modern else CLIP)(**config)


@pytest.mark.parametrize(("case", "run"), GROUPS, ids=[f"{case}-{len(run['arguments'])}" for case, run in GROUPS])
def test_groups(case, run):
    """The same parameters in the same order, so that its optimizer states fit here, and ours there."""
    model = build(case)
    config = OptimConfig(lr=1e-3, wd=0.2, decay_rule=None if run["arguments"] else "4", **run["arguments"])
    optimizer = create_optimizer(model, config, "cpu")
    names = {id(p): name for name, p in model.named_parameters()}
    ours = [
        {
            "name": group["group_name"],
            "lr": group["lr"],
            "lr_scale": group.get("lr_scale"),
            "weight_decay": group["weight_decay"],
            "params": [names[id(p)] for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    assert ours == run["groups"]


@pytest.mark.parametrize(("case", "tower", "unlocked"), LOCKS)
def test_locks(case, tower, unlocked):
    model = build(case)
    getattr(model, f"lock_{tower}_tower")(unlocked)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == RECORDED["locks"][f"{case} {tower}"][str(unlocked)]


NATIVE = [run for case, run in GROUPS if case == "native_vit_for_conversion"]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        torch.manual_seed(seed)
        image, text, scale = model(torch.randn(4, 3, 32, 32), torch.randint(1, 512, (4, 16)))
        logits = scale * image @ text.T
        loss = nn.functional.cross_entropy(logits, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("run", NATIVE, ids=["plain", "layer decay"])
@pytest.mark.parametrize("as_3_3", [False, True], ids=["same groups", "groups of 3.3.0"])
def test_an_optimizer_state_of_open_clip_4_resumes_with_equal_losses(run, prefix, as_3_3):
    torch.manual_seed(0)
    theirs = build("native_vit_for_conversion")
    named = dict(theirs.named_parameters())
    groups = [
        {
            key: value
            for key, value in {**group, "group_name": group["name"]}.items()
            if key != "name" and value is not None
        }
        | {"params": [named[name] for name in group["params"]]}
        for group in run["groups"]
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-4)
    train(theirs, optimizer, range(3))
    checkpoint = {
        "epoch": 1,
        "name": "theirs",
        "state_dict": {prefix + name: value.clone() for name, value in theirs.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "global_step": 3,
        "samples_seen": 12,
    }

    ours = build("native_vit_for_conversion")
    arguments = {} if as_3_3 else {"decay_rule": "4", **run["arguments"]}
    config = OptimConfig(lr=1e-3, wd=0.2, eps=1e-4, **arguments)
    state = TrainState(ours, torch.device("cpu"), parts={"optimizer": create_optimizer(ours, config, "cpu")})
    state.load_state_dict(copy.deepcopy(checkpoint))
    moments = state.parts["optimizer"].state
    for name, p in ours.named_parameters():
        assert torch.equal(moments[p]["exp_avg"], optimizer.state[named[name]]["exp_avg"]), name
    if not as_3_3:
        assert train(ours, state.parts["optimizer"], range(3, 6)) == pytest.approx(
            train(theirs, optimizer, range(3, 6))
        )
