"""The operators of modern towers in their plain forms: rms_norm, rotary, swiglu."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from open_clip import device as devices

HALF = [torch.float16, torch.bfloat16]
ANGLES = torch.linspace(0, 400, 6 * 4).reshape(6, 4).repeat_interleave(2, dim=-1)


@pytest.fixture(params=[True, False], ids=["fused", "elementary"])
def fused_ops(request: pytest.FixtureRequest):
    devices.use_fused_ops(request.param)
    yield
    devices.use_fused_ops(True)


def rotate_by_complex_numbers(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Multiply pairs as complex numbers by e^(i angle), in float64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turn = torch.polar(torch.ones_like(angles[..., ::2]).double(), angles[..., ::2].double())
    return torch.view_as_real(pairs * turn[..., None, :]).flatten(-2)


@pytest.mark.usefixtures("fused_ops")
@pytest.mark.parametrize("shape", [(6, 3, 8), (2, 6, 3, 8)], ids=["packed", "padded"])
def test_rotary_turns_adjacent_pairs(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = devices.rotary(x, ANGLES.cos(), ANGLES.sin())
    torch.testing.assert_close(found.double(), rotate_by_complex_numbers(x, ANGLES), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fused_ops")
def test_rotary_with_tables_of_each_sequence() -> None:
    angles = torch.stack((ANGLES, 2 * ANGLES))
    x = torch.randn(2, 6, 3, 8)
    found = devices.rotary(x, angles.cos(), angles.sin())
    torch.testing.assert_close(found.double(), rotate_by_complex_numbers(x, angles), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fused_ops")
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, weight = torch.randn(6, 3, 8).to(dtype), torch.linspace(0.9, 1.1, 8)
    tables = ANGLES.cos(), ANGLES.sin()
    for found, expected in (
        (devices.rotary(x, *tables), devices.rotary(x.float(), *tables)),
        (devices.rms_norm(x, weight, 1e-6), devices.rms_norm(x.float(), weight, 1e-6)),
    ):
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype)), "the only rounding is that of the result"
    large = torch.full((2, 8), 300.0, dtype=torch.float16)  # the square of it overflows in fp16
    torch.testing.assert_close(devices.rms_norm(large, torch.ones(8), 1e-6), torch.ones(2, 8, dtype=torch.float16))


@pytest.mark.usefixtures("fused_ops")
def test_autocast_keeps_the_dtype_of_the_input() -> None:
    x, weight = torch.randn(6, 3, 8), torch.linspace(0.5, 2, 8)
    tables = ANGLES.cos(), ANGLES.sin()
    expected = devices.rms_norm(x, weight, 1e-6), devices.rotary(x, *tables), devices.swiglu(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = devices.rms_norm(x, weight, 1e-6), devices.rotary(x, *tables), devices.swiglu(x)
        half = devices.rms_norm(x.bfloat16(), weight, 1e-6)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert half.dtype == torch.bfloat16


@pytest.mark.usefixtures("fused_ops")
def test_rms_norm_equals_its_formula() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(0.5, 2, 8, dtype=torch.float64, requires_grad=True)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(devices.rms_norm(x, weight, 1e-6), expected)
    assert torch.autograd.gradcheck(lambda *inputs: devices.rms_norm(*inputs, 1e-6), (x, weight))


@pytest.mark.usefixtures("fused_ops")
def test_swiglu_gates_with_the_second_half() -> None:
    x = torch.randn(5, 8)
    torch.testing.assert_close(devices.swiglu(x), x[:, :4] * x[:, 4:] / (1 + (-x[:, 4:]).exp()))
    linear = nn.Linear(8, 6)
    torch.testing.assert_close(devices.swiglu_linear(x, linear), devices.swiglu(linear(x)))


def test_swiglu_linear_calls_modules_that_are_not_plain() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    x, linear = torch.randn(5, 8), Doubled(8, 6)
    torch.testing.assert_close(
        devices.swiglu_linear(x, linear), devices.swiglu(2 * nn.functional.linear(x, *linear.parameters()))
    )
    hooked = nn.Linear(8, 6)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(devices.swiglu_linear(x, hooked), devices.swiglu(hooked(x)))


def test_graphs_for_other_programs_have_plain_operators() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.linear = nn.Parameter(torch.ones(8)), nn.Linear(8, 16)
            self.register_buffer("angles", ANGLES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = devices.rotary(devices.rms_norm(x, self.weight, 1e-6), self.angles.cos(), self.angles.sin())
            return devices.swiglu_linear(x, self.linear)

    x = torch.randn(6, 3, 8)
    layer = Layer()
    with devices.elementary_ops():
        exported = torch.export.export(layer, (x,))
        with FlopCounterMode(display=False) as counter:
            layer(x)
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not any("rms_norm" in name for name in names), names
    torch.testing.assert_close(exported.module()(x), layer(x))
    assert counter.get_total_flops() == 2 * 18 * 8 * 16
