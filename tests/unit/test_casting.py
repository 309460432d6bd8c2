"""Casting of a model's weights by the name of a precision."""

from __future__ import annotations

import pytest
import torch

from checkpoint_cases import (
    clip,
)
from open_clip.precision import set_precision


@pytest.mark.parametrize(
    ("precision", "proj", "norm"),
    [
        ("fp32", torch.float32, torch.float32),
        ("amp", torch.float32, torch.float32),
        ("amp_bfloat16", torch.float32, torch.float32),
        ("fp16", torch.float16, torch.float32),
        ("pure_bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_precisions(precision, proj, norm):
    model = clip()
    set_precision(model, precision)
    assert (model.visual.proj.dtype, model.visual.ln_post.weight.dtype) == (proj, norm)


def test_an_unknown_precision_raises():
    with pytest.raises(ValueError, match=r"'fp8' is unknown\. Choose from amp"):
        set_precision(clip(), "fp8")
