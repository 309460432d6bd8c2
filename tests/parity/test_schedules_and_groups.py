"""Learning rates and AdamW's groups, as open_clip_torch 3.3.0 has them (recorded by record/schedules_and_groups.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from training import scheduler
from training.optim import create_optimizer
from training.params import parse_args, sections

FIXTURES = Path(__file__).parent / "fixtures"
SCHEDULES = json.loads(FIXTURES.joinpath("schedules_3.3.0.json").read_text(encoding="utf-8"))
GROUPS = json.loads(FIXTURES.joinpath("adamw_groups_3.3.0.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", SCHEDULES, ids=lambda row: row["name"])
def test_learning_rates(row):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = getattr(scheduler, row["name"])(optimizer, **row["arguments"])
    assert len(row["rates"]) == row["arguments"]["steps"]
    assert [schedule(step) for step in range(len(row["rates"]))] == pytest.approx(row["rates"], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", GROUPS)
def test_adamw_groups(name):
    """The same parameters in the same order: an optimizer's state from there fits here, and back."""
    from open_clip.model import CLIP, CustomTextCLIP

    recorded = GROUPS[name]
    cfg = dict(recorded["config"])
    model = (CustomTextCLIP if cfg.pop("custom_text", False) else CLIP)(**cfg)
    config = sections(parse_args(recorded["options"]))
    if config.model.lock_image:
        model.lock_image_tower(config.model.lock_image_unlocked_groups)
    optimizer = create_optimizer(model, config.optim, "cpu")
    names = {id(p): name for name, p in model.named_parameters()}
    ours = [
        {"weight_decay": group["weight_decay"], "names": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    assert ours == recorded["groups"]
