"""Training steps of one model per family on NPU: the losses equal the CPU's, and the host never waits."""

from __future__ import annotations

import pytest
import torch
from npu_training import CPU, NPU, Calls, move

import families
from training import precision
from training.objective import create_objective
from training.optim import create_optimizer
from training.params import ObjectiveConfig, OptimConfig
from training.trainer import Trainer

STEPS = 2


def train(name: str, device: torch.device) -> tuple[list[float], Calls]:
    """Return the losses of STEPS steps, and the calls of the last step. The second loss depends on the gradients."""
    model = families.create(name).to(device).train()
    trainer = Trainer(
        model=model,
        objective=create_objective(ObjectiveConfig(siglip=model.logit_bias is not None), model),
        optimizer=create_optimizer(model, OptimConfig(lr=1e-3, eps=1e-3), device),
        precision=precision.create("fp32", device),
    )
    batches = [move(families.batch(model, step), device) for step in range(STEPS)]
    losses = [trainer.step([batch], step)["loss"].detach().clone() for step, batch in enumerate(batches[:-1])]
    with Calls() as calls:
        losses.append(trainer.step([batches[-1]], STEPS - 1)["loss"].detach())
    return torch.stack(losses).tolist(), calls


@pytest.mark.parametrize("name", families.FAMILIES)
def test_losses_of_two_steps_equal_the_cpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "relpos" in name:  # it adds a bias to its scores, which the fused operator does not support
        monkeypatch.setenv("CANN_EMULATOR_STRICT", "0")
    (ours, calls), (reference, _) = train(name, NPU), train(name, CPU)
    assert ours == pytest.approx(reference, rel=2e-3)
    assert reference[0] != reference[1]
    assert calls.waits == 0
    assert not calls.counts["aten::gelu"], "aten::gelu is always the tanh form on NPU"
