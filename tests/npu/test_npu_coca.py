"""CoCa on one NPU: a training step and captions equal to the CPU's, and how often the host waits for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated import run_script
from npu_training import CPU, NPU, Calls, make_trainer, move

import coca_cases
import native_cases
from open_clip import coca_model
from open_clip.generation import LOOK_EVERY

IDS = {"sot_token_id": coca_cases.START, "eos_token_id": coca_cases.END, "pad_token_id": 0, "min_seq_len": 0}


def batch(step: int) -> dict[str, torch.Tensor]:
    image = native_cases.formula(f"image {step}", (4, 3, 16, 16), scale=2.0)
    return {"image": image, "text": coca_cases.texts().repeat(2, 1).roll(step, dims=0)}


def losses(device: torch.device, precision: str, checkpointing: bool) -> list[dict[str, float]]:
    model = coca_cases.filled(coca_model)
    model.set_grad_checkpointing(checkpointing)
    trainer = make_trainer(device, precision, model=model)
    found = [trainer.step([move(batch(step), device)], step) for step in range(3)]
    return [{name: loss.item() for name, loss in named.items()} for named in found]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("amp_bf16", 0.05)])
def test_losses_equal_the_cpus(precision: str, tolerance: float, checkpointing: bool) -> None:
    ours, reference = losses(NPU, precision, checkpointing), losses(CPU, "fp32", False)
    assert reference[-1]["caption_loss"] < reference[0]["caption_loss"], "it learns"
    for one, other in zip(ours, reference, strict=True):
        assert one == pytest.approx(other, rel=tolerance)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_does_not_wait_for_the_device(accumulate: int) -> None:
    trainer = make_trainer(NPU, model=coca_cases.filled(coca_model))
    trainer.accum_freq = accumulate
    steps = [[move(batch(step + part), NPU) for part in range(accumulate)] for step in range(2)]
    trainer.step(steps[0], 0)
    with Calls() as calls:
        trainer.step(steps[1], 1)
    assert calls.counts["aten::mm"] + calls.counts["aten::addmm"] > 4
    assert calls.waits == 0


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"generation_type": "greedy"},
    "beams": {"num_beams": 3, "num_beam_groups": 1},
    "diverse beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "penalty": {"generation_type": "greedy", "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [7, 37, coca_cases.END])
def test_captions_equal_the_cpus(kind: str, end: int) -> None:
    model, image = coca_cases.filled(coca_model), coca_cases.images(3)
    options = IDS | KINDS[kind] | {"seq_len": 9, "eos_token_id": end}
    expected = model.generate(image, **options)
    found = model.to(NPU).generate(image.to(NPU), **options)
    assert found.device.type == "npu"
    assert found.cpu().tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["top_k", "top_p"])
def test_sampling_follows_the_seed(kind: str) -> None:
    model, image = coca_cases.filled(coca_model).to(NPU), coca_cases.images(3).to(NPU)
    options = IDS | {"seq_len": 9, "generation_type": kind, "top_k": 5, "top_p": 0.9}
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(model.generate(image, **options).cpu().tolist())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("kind", ["greedy", "top_k", "beam_search"])
def test_the_host_checks_captions_only_every_few_steps(kind: str) -> None:
    cfg = {"context_length": 30}
    model = coca_model.CoCa(coca_cases.WIDTH, coca_cases.DECODER | cfg, coca_cases.TEXT | cfg, coca_cases.VISION)
    model = model.eval().to(NPU)
    with torch.no_grad():  # so that no caption ends early
        model.text_decoder.text_projection[:, [0, coca_cases.END]] = 0
        model.text_decoder.ln_final.bias.add_(1)
    image, seq_len = coca_cases.images(2).to(NPU), 2 * LOOK_EVERY + 3
    with Calls() as calls:
        found = model.generate(image, **IDS | {"seq_len": seq_len, "generation_type": kind, "top_k": 3})
    assert calls.counts["aten::mm"] + calls.counts["aten::addmm"] > seq_len, "the counter sees the operators"
    assert found.shape == (2, seq_len)
    assert calls.waits <= seq_len / LOOK_EVERY + 2


EVERYTHING = """
    from test_npu_coca import *

    print(losses(NPU, "fp32", True), losses(NPU, "amp_bf16", False))
    model = coca_cases.filled(coca_model).to(NPU)
    for options in (*KINDS.values(), {"generation_type": "top_p", "top_p": 0.9}):
        torch.manual_seed(0)
        print(model.generate(coca_cases.images(3).to(NPU), seq_len=9, **IDS, **options).cpu().tolist())
"""


def test_strict_mode_and_delayed_copies_change_nothing() -> None:
    """There is no float64, no additive attention mask, and no read before a copy is complete."""
    plain = run_script(EVERYTHING, strict=0)
    assert len(plain) == len(KINDS) + 2
    assert run_script(EVERYTHING, strict=1, delay_copies=1, poison=1) == plain
