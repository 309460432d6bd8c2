"""The cost of a training step with autocast on one NPU: operators, casts, and layer norms of half precision."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from npu_training import NPU, make_batch, make_model, make_trainer, move
from torch.utils._python_dispatch import TorchDispatchMode

import open_clip
from open_clip import device
from open_clip.device import npu_ops
from open_clip.transformer.layers import LayerNorm

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import npu_step

# Upper limits for a step in bf16 of a model with as many layers as ViT-B-32.
OPERATORS, CASTS = 1_824, 267
BLOCKS = 24


def make_deep_model() -> open_clip.CLIP:
    """Build a narrow model with as many layers as ViT-B-32."""
    return make_model(vision={"layers": 12}, text={"layers": 12})


def count_step(chosen: str) -> npu_step.StepCounter:
    """Count the operators of the third step. All phases are counted as "forward"."""
    trainer = make_trainer(NPU, chosen, model=make_deep_model())
    for step in range(2):
        trainer.step([move(make_batch(step), NPU)], step)
    batch = move(make_batch(2), NPU)
    counter = npu_step.StepCounter("npu")
    counter.phase = "forward"
    with counter:
        trainer.step([batch], 2)
    return counter


@pytest.mark.parametrize("chosen", ["amp_bf16", "amp"])
def test_operators_and_casts_of_a_step(chosen: str) -> None:
    counter = count_step(chosen)
    casts = counter.kinds["forward"]["aten::_to_copy"]
    assert counter.totals["forward"]["operators"] <= OPERATORS
    assert BLOCKS < casts <= CASTS


class Casts(TorchDispatchMode):
    """Counts casts by (dtype before, dtype after, number of dimensions)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[torch.dtype, torch.dtype, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().startswith("aten::_to_copy") and result.dtype != args[0].dtype:
            self.counts[args[0].dtype, result.dtype, args[0].dim()] += 1
        return result


def test_weights_and_their_gradients_are_not_cast_one_by_one() -> None:
    trainer = make_trainer(NPU, "amp_bf16", model=make_deep_model())
    trainer.step([move(make_batch(0), NPU)], 0)
    with Casts() as casts:
        trainer.step([move(make_batch(1), NPU)], 1)
    assert casts.counts[torch.bfloat16, torch.float32, 1] == BLOCKS + 1, "once per block, and the class embedding's"
    weights = casts.counts[torch.float32, torch.bfloat16, 2]
    assert weights <= 16, "the two projections and pooled features, but none of the 96 weights of blocks"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("usable", [True, False])
def test_layer_norm_of_half_precision(dtype: torch.dtype, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It equals the formula, forward and backward. Chips that support fp32 weights need no cast."""
    if not usable:
        monkeypatch.setitem(npu_ops._usable, ("native_layer_norm", NPU, dtype), False)
    torch.manual_seed(0)
    norm = LayerNorm(48)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 7, 48).to(dtype)
    slope = torch.randn(3, 7, 48).to(dtype)
    exact, wanted = x.double().requires_grad_(), norm.double()
    expected = wanted(exact)
    expected_gradients = torch.autograd.grad(expected, (exact, wanted.weight, wanted.bias), slope.double())

    norm, x = norm.float().to(NPU), x.to(NPU).requires_grad_()
    with torch.autocast("npu", dtype=dtype), Casts() as casts:
        found = norm(x)
        gradients = torch.autograd.grad(found, (x, norm.weight, norm.bias), slope.to(NPU))
    assert found.dtype == gradients[0].dtype == dtype
    assert gradients[1].dtype == gradients[2].dtype == torch.float32
    assert bool(casts.counts) == (not usable)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    for ours, reference in zip(gradients, expected_gradients, strict=True):
        scale = reference.abs().max()
        torch.testing.assert_close(ours.cpu().double() / scale, reference / scale, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradients[2].cpu(), slope.float().sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_layer_norm_of_other_dtypes_is_torchs() -> None:
    """fp32, and norms whose weights have half precision, too."""
    x = torch.randn(2, 5, 16)
    for dtype in (torch.float32, torch.bfloat16):
        norm = LayerNorm(16).to(dtype)
        found = norm.to(NPU)(x.to(NPU, dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.cpu(), norm.to("cpu")(x.to(dtype)), rtol=1e-2, atol=1e-2)
    assert device.layer_norm(x.to(NPU), (16,)).dtype == torch.float32


def test_losses_equal_those_of_autocast() -> None:
    """Half precision copies of the weights do not change the losses."""
    import contextlib

    losses = []
    for converts in (True, False):
        trainer = make_trainer(NPU, "amp_bf16")
        if not converts:
            trainer.half_weights = contextlib.nullcontext
        losses.append([trainer.step([move(make_batch(step), NPU)], step)["loss"].item() for step in range(5)])
    assert losses[0] == losses[1]
