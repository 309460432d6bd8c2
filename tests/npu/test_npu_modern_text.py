"""Training steps with a modern text tower on NPU, padded and packed: the CPU's losses, fused operators, no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from npu_training import CPU, NPU, Calls, make_trainer, move

import modern_text_cases as cases
from open_clip.text_groups import pack_text

STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": cases.EVERYTHING,
    "map": {**cases.MAP, "reg_tokens": 1},
    "mean": {"pool_type": "mean", "attention_mode": "bidirectional", "norm_type": "layernorm", "mlp_type": "relu2"},
}
TRAINED = ("npu::npu_rms_norm", "npu::npu_rotary_mul", "npu::npu_swiglu")


def train(
    options: dict[str, Any], packs: bool, device: torch.device, precision: str = "fp32"
) -> tuple[list[float], Calls]:
    """Return the losses of STEPS steps, and the calls of the last one."""
    model = cases.build(**options)
    batch: dict[str, Any] = cases.batch(3, 12, 8, 1, 5)
    if packs:
        batch["text"] = pack_text(batch["text"], model.text_lengths(batch["text"]))
    trainer = make_trainer(device, precision, model=model)
    moved = move(batch, device)
    losses = [trainer.step([moved], step)["loss"].detach().clone() for step in range(STEPS - 1)]
    with Calls() as calls:
        losses.append(trainer.step([moved], STEPS - 1)["loss"].detach())
    return torch.stack(losses).tolist(), calls


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_losses_equal_the_cpus(name: str, packs: bool) -> None:
    (ours, calls), (reference, _) = train(CASES[name], packs, NPU), train(CASES[name], False, CPU)
    assert reference[-1] < reference[0], "it learns"
    assert ours == pytest.approx(reference, rel=1e-3)
    assert calls.waits == 0
    assert bool(calls.counts["npu::npu_rms_norm"]) == (name != "mean")


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_half_precision_uses_the_fused_operators(packs: bool) -> None:
    (ours, calls), (reference, _) = train({}, packs, NPU, "amp_bf16"), train({}, False, CPU)
    assert ours == pytest.approx(reference, rel=0.05)
    assert calls.waits == 0
    for operator in (*TRAINED, "npu::npu_fusion_attention"):
        assert calls.counts[operator], operator
