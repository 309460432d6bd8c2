"""Every precision trains like float32 on the CPU with every supported form of AdamW."""

from __future__ import annotations

import pytest
import torch

import half_precision

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference() -> list[float]:
    return half_precision.train("fp32", CPU)


@pytest.mark.parametrize(("chosen", "form"), [
    *((chosen, "auto") for chosen in ("fp32", "amp", "amp_bf16", "bf16", "fp16", "pure_bf16", "pure_fp16")),
    *((chosen, form) for chosen in ("bf16", "pure_bf16") for form in ("torch", "off")),
])  # fmt: skip
def test_training_learns_as_in_float32(chosen, form, reference):
    half_precision.assert_learns_alike(half_precision.train(chosen, CPU, form), reference)
