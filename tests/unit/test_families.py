"""A training step of one model per family with the Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import families
from training.objective import create_objective
from training.optim import create_optimizer
from training.params import ObjectiveConfig, OptimConfig
from training.precision import create
from training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "make"),
    [*((name, families.batch) for name in families.FAMILIES), *((name, families.packed) for name in families.PACKED)],
)
def test_a_step_trains_every_parameter(name: str, make: Callable[..., dict[str, Any]]) -> None:
    model = families.create(name).train()
    trainer = Trainer(
        model=model,
        objective=create_objective(ObjectiveConfig(siglip=model.logit_bias is not None), model),
        optimizer=create_optimizer(model, OptimConfig(lr=1e-3, wd=0.0), CPU),
        precision=create("fp32", CPU),
    )
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    loss = trainer.step([make(model, 0)], 0)["loss"].item()
    assert math.isfinite(loss)
    assert loss > 0.1
    still = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    assert still == []
