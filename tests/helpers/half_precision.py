"""Thirty steps of a tiny CLIP in any precision, as training.main sets it up: whether it learns as in float32."""

from __future__ import annotations

from typing import Any

import torch

import open_clip
import tiny_clip
from open_clip import device as devices
from training import precision
from training.objective import ContrastiveObjective
from training.optim import create_optimizer
from training.params import OptimConfig
from training.step_guard import StepGuard
from training.trainer import Trainer

BATCH = 8


def make_batch(step: int, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    kind = torch.randperm(12, generator=generator)[:BATCH, None]
    texts = (kind + torch.arange(12)).remainder(60)
    texts[:, -1] = 63
    noise = torch.randn(BATCH, 3, 32, 32, generator=generator)
    images = 0.3 * noise + (kind.float() * 0.4 + torch.arange(3)).sin()[:, :, None, None]
    return {"image": images.to(device, dtype), "text": texts.to(device)}


def make_trainer(chosen: str, device: torch.device, form: str = "auto") -> Trainer:
    torch.manual_seed(0)
    model: Any = open_clip.CLIP(**tiny_clip.config(), output_dict=True)
    kind = precision.create(chosen, device)
    weights = kind.weights_dtype
    if chosen.startswith("pure_"):
        model = model.to(weights)
    elif weights != torch.float32:
        open_clip.convert_weights_to_lp(model, weights)
    model = model.to(device).train()
    optimizer = create_optimizer(model, OptimConfig(lr=1e-3, eps=1e-8, wd=0.1, fused_optimizer=form), device)
    return Trainer(
        model=model,
        objective=ContrastiveObjective(),
        optimizer=optimizer,
        precision=kind,
        scaler=kind.grad_scaler(),
        guard=StepGuard(model, optimizer, device),
    )


def train(chosen: str, device: torch.device, form: str = "auto", steps: int = 30) -> list[float]:
    trainer = make_trainer(chosen, device, form)
    losses = []
    for step in range(steps):
        batch = make_batch(step, device, trainer.precision.input_dtype)
        losses.append(trainer.step([batch], step)["loss"].float())
    trainer.guard.check_run()
    assert devices.get(device).supports(torch.float32)
    return torch.stack(losses).tolist()


def assert_learns_alike(losses: list[float], reference: list[float]) -> None:
    def end(values: list[float]) -> float:
        return sum(values[-5:]) / 5

    assert end(reference) < 0.8 * reference[0], "the reference learns"
    assert abs(losses[0] - reference[0]) < 0.05
    fallen, expected = losses[0] - end(losses), reference[0] - end(reference)
    assert abs(fallen - expected) < 0.15 * expected, (losses, reference)
