"""Parameter groups and locks as open_clip 4 (main at 4.2.0.dev0) has them.

fixtures/groups_and_locks_4.2.0.dev0.json was recorded by running it. Its license is MIT.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from open_clip import CLIP
from open_clip.timm_model import TimmModel
from training.optim import create_optimizer
from training.params import OptimConfig

FIXTURE = Path(__file__).parent / "fixtures" / "groups_and_locks_4.2.0.dev0.json"
RECORDED = json.loads(FIXTURE.read_text(encoding="utf-8"))
MISSING = {"moderntext_causal_eos": "the text tower text_arch=modern does not exist here"}
GROUPS = [(case, run) for case, runs in RECORDED["optimizer_groups"].items() for run in runs]
LOCKS = [(*case.split(), int(number)) for case, runs in RECORDED["locks"].items() for number in runs]


def build(case: str) -> Any:
    if case in MISSING:
        pytest.skip(MISSING[case])
    config = RECORDED["configs"][case]
    if "timm_model_name" not in config["vision_cfg"]:
        return CLIP(**config)
    model = CLIP(**{**config, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}})
    model.visual = naflex_tower(config["vision_cfg"], config["embed_dim"])
    return model


def naflex_tower(config: dict[str, Any], embed_dim: int) -> nn.Module:
    """A tower around timm's model, which configurations here cannot name: its options are those of NaFlex."""
    import timm

    with torch.device("meta"):
        tower = TimmModel("vit_tiny_patch16_224", embed_dim, 224)
    tower.trunk = timm.create_model(config["timm_model_name"], num_classes=0, **config["timm_model_kwargs"])
    tower.head = nn.Sequential()
    tower.head.add_module("proj", nn.Linear(tower.trunk.num_features, embed_dim, bias=False))
    return tower


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
