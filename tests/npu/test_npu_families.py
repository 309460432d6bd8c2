"""Training steps of one model per family on NPU: the losses equal the CPU's, and the host does not wait.

Families with images of any shape or texts of any length are trained on padded and on packed batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from npu_training import CPU, NPU, Calls
from torch.utils._python_dispatch import TorchDispatchMode

import families
from training import batches, precision
from training.objective import create_objective
from training.optim import create_optimizer
from training.params import ObjectiveConfig, OptimConfig
from training.trainer import Trainer

STEPS = 2
MAX_PREFIX = 3  # most class and register tokens before a sequence


class Squares(TorchDispatchMode):
    """Collects the sizes of square matrices among the results of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[-1] == value.shape[-2]:
                self.sizes.add(value.shape[-1])
        return result


def train(
    name: str, device: torch.device, make_batch: Callable[[Any, int], dict[str, Any]] = families.batch
) -> tuple[list[float], Calls, Squares]:
    """Return the losses of STEPS steps, and the calls of the last step. The second loss depends on the gradients."""
    model = families.create(name)
    made = [make_batch(model, step) for step in range(STEPS)]
    model.to(device).train()
    trainer = Trainer(
        model=model,
        objective=create_objective(ObjectiveConfig(siglip=model.logit_bias is not None), model),
        optimizer=create_optimizer(model, OptimConfig(lr=1e-3, eps=1e-3), device),
        precision=precision.create("fp32", device),
    )
    moved = [batches.to_device(batch, device) for batch in made]
    losses = [trainer.step([batch], step)["loss"].detach().clone() for step, batch in enumerate(moved[:-1])]
    with Squares() as squares, Calls() as calls:
        losses.append(trainer.step([moved[-1]], STEPS - 1)["loss"].detach())
    return torch.stack(losses).tolist(), calls, squares


@pytest.mark.parametrize("name", families.FAMILIES)
def test_losses_of_two_steps_equal_the_cpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "relpos" in name:  # it adds a bias to its scores, which the fused operator does not support
        monkeypatch.setenv("CANN_EMULATOR_STRICT", "0")
    (ours, calls, _), (reference, _, _) = train(name, NPU), train(name, CPU)
    assert ours == pytest.approx(reference, rel=2e-3)
    assert reference[0] != reference[1]
    assert calls.waits == (1 if "naflex" in name else 0), "NaFlex towers read the grids of padded images"
    assert not calls.counts["aten::gelu"], "aten::gelu is always the tanh form on NPU"


@pytest.mark.parametrize("name", families.PACKED)
def test_losses_of_packed_batches_equal_the_cpus_of_padded_ones(name: str) -> None:
    (ours, calls, squares), (reference, _, _) = train(name, NPU, families.packed), train(name, CPU)
    assert ours == pytest.approx(reference, rel=2e-3)
    assert calls.waits == 0
    assert not calls.counts["aten::gelu"]
    totals = (sum(families.LENGTHS), sum(rows * columns for rows, columns in families.GRIDS))
    with_prefix = {total + families.BATCH * count for total in totals for count in range(MAX_PREFIX + 1)}
    assert not squares.sizes & with_prefix, "a mask or scores of all tokens with all tokens"
