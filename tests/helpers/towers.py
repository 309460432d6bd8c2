"""A model of two tiny towers, batches for it, and an epoch of batches, for tests of training steps."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from training import precision
from training.checkpoint.state import TrainState
from training.epoch import run_epoch
from training.progress import Progress

CPU = torch.device("cpu")
FP32 = precision.create("fp32", CPU)
SIZE = 4  # samples per batch


class Towers(nn.Module):
    """Two small towers with dropout, in float64, so that rounding cannot hide or cause a difference."""

    def __init__(self, dropout: float = 0.0, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.text = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-1.0)) if bias else None
        self.double()
        self.grad_forwards = self.forwards = 0

    def forward(self, image=None, text=None):
        self.forwards += 1
        self.grad_forwards += torch.is_grad_enabled()
        outputs = {
            "image_features": F.normalize(self.visual(image), dim=-1),
            "text_features": F.normalize(self.text(text), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }
        return outputs if self.logit_bias is None else {**outputs, "logit_bias": self.logit_bias}


def batches_of(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "image": torch.randn(SIZE, 6, generator=generator, dtype=torch.float64),
            "text": torch.randn(SIZE, 5, generator=generator, dtype=torch.float64),
        }
        for _ in range(count)
    ]


class Loader(list):
    num_samples = 0

    @property
    def num_batches(self) -> int:
        return len(self)


def data_of(count: int) -> SimpleNamespace:
    epochs: list[int] = []
    loader = Loader(batches_of(count))
    loader.num_samples = count * SIZE
    return SimpleNamespace(dataloader=loader, set_epoch=epochs.append, epochs=epochs, skipped=None)


class Writer(list):
    def write(self, metrics, step, prefix):
        self.append((step, prefix, dict(metrics)))


def state_of(model: nn.Module, count: int, accum_freq: int = 1, **values) -> TrainState:
    return TrainState(
        model=model, device=CPU, steps_per_epoch=count // accum_freq, samples_per_epoch=count * SIZE, **values
    )


def train_epoch(trainer, data, state, every: int = 100, writer=None, **options) -> None:
    """Train an epoch that reports to `writer` every few steps. `options`: of run_epoch."""
    progress = state.parts.setdefault("progress", Progress(CPU, every, writer))
    run_epoch(trainer, data, state, progress, **options)
