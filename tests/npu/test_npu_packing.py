"""Packed sequences on an NPU, and the operators of modern towers: values, number of launches, limits and fallbacks."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from emulated import run_script
from npu_training import NPU, Calls
from torch import nn

from open_clip import device as devices
from open_clip import packing
from open_clip.device import npu_attention, npu_ops, packed

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
H, D = 2, 16
FUSED, FUSED_GRAD = "npu::npu_fusion_attention", "npu::npu_fusion_attention_grad"
LENGTHS = (5, 1, 9, 3, 3)


def make_leaves(*tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, H, D, generator=generator).to(NPU, dtype).requires_grad_() for count in tokens]


def run(function: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the output of a function and the gradients of a weighted sum of it."""
    output = function(*leaves)
    weight = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)
    return output, list(torch.autograd.grad(output, leaves, weight))


def compare(
    function: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor], leaves: list[torch.Tensor]
) -> Calls:
    """Compare a function on the NPU with the reference in float64 on the CPU, and return the calls of the function."""
    with Calls() as calls:
        output, gradients = run(function, leaves)
    expected, references = run(reference, [leaf.detach().cpu().double().requires_grad_() for leaf in leaves])
    tolerance = TOLERANCE[leaves[0].dtype]
    assert output.dtype == leaves[0].dtype
    torch.testing.assert_close(output.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients, references, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=5 * tolerance, atol=5 * tolerance)
    return calls


def compare_packed(segments: packing.Segments, queries: packing.Segments | None = None, **options) -> Calls:
    dtype = options.pop("dtype", torch.float32)
    first, rest = (queries or segments), ((segments,) if queries else ())
    on_npu, on_cpu = ([found.to(place) for found in (first, *rest)] for place in (NPU, "cpu"))
    leaves = make_leaves(first.total, segments.total, segments.total, dtype=dtype)
    return compare(
        lambda q, k, v: packing.attention(q, k, v, *on_npu, **options),
        lambda q, k, v: packing.attention(q, k, v, *on_cpu, **options),
        leaves,
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.7}], ids=["plain", "causal", "scale"])
@pytest.mark.parametrize("lengths", [LENGTHS, (7,), (1, 1)], ids=str)
def test_packed_attention_is_two_launches(lengths: tuple[int, ...], options: dict, dtype: torch.dtype) -> None:
    compare_packed(packing.Segments.of(lengths), is_causal=True, dtype=dtype)  # tests the operator, creates the mask
    calls = compare_packed(packing.Segments.of(lengths), **options, dtype=dtype)
    assert (calls.counts[FUSED], calls.counts[FUSED_GRAD]) == (1, 1)
    assert calls.waits == 0
    others = calls.counts - Counter({FUSED: 1, FUSED_GRAD: 1})
    assert set(others) <= {"aten::detach", "aten::linspace", "aten::view", "aten::_to_copy"}, others
    assert others["aten::_to_copy"] <= 1, others  # of the test


def test_pooling_queries() -> None:
    segments = packing.Segments.of(LENGTHS)
    calls = compare_packed(segments, segments.single())
    assert (calls.counts[FUSED], calls.counts[FUSED_GRAD]) == (1, 1)


class Sizes(Calls):
    """Records the number of elements of the largest tensor that an operator returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        found = result if isinstance(result, (tuple, list)) else [result]
        self.largest = max([self.largest, *(x.numel() for x in found if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("causal", [False, True])
def test_no_mask_of_all_tokens_is_made(causal: bool) -> None:
    segments = packing.Segments.of([40] * 10).to(NPU)
    leaves = make_leaves(400, 400, 400)
    packing.attention(*leaves, segments, is_causal=causal)
    with Sizes() as sizes:
        run(lambda *qkv: packing.attention(*qkv, segments, is_causal=causal), leaves)
    assert sizes.largest <= 400 * H * D < 400 * 400


def test_more_sequences_than_a_launch_takes() -> None:
    calls = compare_packed(packing.Segments.of([2, 1] * 600), is_causal=True)
    assert (calls.counts[FUSED], calls.counts[FUSED_GRAD]) == (2, 2)


def test_launches_are_split_at_the_limit_of_tokens() -> None:
    limit = npu_attention._MAX_TOKENS
    ends = (limit - 1, limit, limit + 5, limit + 6)
    assert list(npu_attention._launches(ends, ends)) == [(0, 2), (2, 4)]
    assert npu_attention._ends_of(ends, [(0, 2), (2, 4)]) == [[limit - 1, limit], [5, 6]]


def test_autocast_and_inference_mode() -> None:
    segments = packing.Segments.of(LENGTHS)
    leaves = make_leaves(*(segments.total,) * 3)
    with torch.autocast("npu", dtype=torch.bfloat16), torch.inference_mode(), Calls() as calls:
        output = packing.attention(*leaves, segments.to(NPU))
    assert output.dtype == torch.bfloat16
    assert calls.counts[FUSED] == 1
    expected = packing.attention(*(leaf.detach().cpu() for leaf in leaves), segments)
    torch.testing.assert_close(output.cpu().float(), expected, rtol=2e-2, atol=2e-2)


def test_unsupported_inputs_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANN_EMULATOR_STRICT", "0")
    segments = packing.Segments.of(LENGTHS)
    leaves = [torch.randn(segments.total, 1, 520).to(NPU).requires_grad_() for _ in range(3)]
    on_npu = segments.to(NPU)
    calls = compare(
        lambda *qkv: packing.attention(*qkv, on_npu), lambda *qkv: packing.attention(*qkv, segments), leaves
    )
    assert not calls.counts[FUSED]
    double = [leaf.detach().cpu().double() for leaf in leaves]
    assert not npu_attention.takes_packed(packed.PackedInputs(*double, segments, segments))


def test_packing_and_pooling_helpers_wait_for_nothing() -> None:
    segments = packing.Segments.of(LENGTHS)
    x = torch.randn(segments.total, 4)
    expected = [packing.unpack(x, segments), *(f(x, segments) for f in (packing.mean, packing.first, packing.last))]
    on_npu, ours = segments.to(NPU), x.to(NPU)
    with Calls() as calls:
        found = [packing.unpack(ours, on_npu), *(f(ours, on_npu) for f in (packing.mean, packing.first, packing.last))]
    assert calls.waits == 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other)


# Operators of modern towers

ANGLES = torch.linspace(0, 9, 5 * 8).reshape(5, 8).repeat_interleave(2, dim=-1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("is_half", [False, True])
def test_rms_norm(dtype: torch.dtype, is_half: bool) -> None:
    x = torch.randn(3, 7, 16).to(NPU, dtype).requires_grad_()
    weight = torch.linspace(0.5, 2, 16).to(NPU, dtype if is_half else torch.float32).requires_grad_()
    devices.rms_norm(x, weight, 1e-6)  # tests the operator
    calls = compare(lambda *t: devices.rms_norm(*t, 1e-6), lambda *t: devices.rms_norm(*t, 1e-6), [x, weight])
    assert (calls.counts["npu::npu_rms_norm"], calls.counts["npu::npu_rms_norm_backward"]) == (1, 1)
    assert calls.counts["aten::_to_copy"] <= 2  # the test's weights, and the gradient of half precision weights


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(5, 3, 16), (4, 5, 3, 16), (2, 3, 5, 4, 16), (400, 5, 3, 16)], ids=str)
def test_rotary(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tables = ANGLES.cos(), ANGLES.sin()
    on_npu = [table.to(NPU) for table in tables]
    x = torch.randn(shape).to(NPU, dtype).requires_grad_()
    devices.rotary(x, *on_npu)
    calls = compare(lambda y: devices.rotary(y, *on_npu), lambda y: devices.rotary(y, *tables), [x])
    assert (calls.counts["npu::npu_rotary_mul"], calls.counts["npu::npu_rotary_mul_backward"]) == (1, 1)
    casts = calls.counts["aten::_to_copy"]
    assert casts <= (1 if dtype == torch.float32 else 5), calls.counts  # one of the test; two in each direction


def test_rotary_with_tables_of_each_sequence() -> None:
    tables = [torch.stack((table, -table)) for table in (ANGLES.cos(), ANGLES.sin())]
    on_npu = [table.to(NPU) for table in tables]
    x = torch.randn(2, 5, 3, 16).to(NPU).requires_grad_()
    calls = compare(lambda y: devices.rotary(y, *on_npu), lambda y: devices.rotary(y, *tables), [x])
    assert calls.counts["npu::npu_rotary_mul"] == 1


@pytest.mark.parametrize("shape", [(5, 1000, 16), (5, 2, 896)], ids=str)
def test_rotary_beyond_the_limits_of_the_kernel(shape: tuple[int, ...]) -> None:
    angles = torch.linspace(0, 9, 5 * shape[-1] // 2).reshape(5, -1).repeat_interleave(2, dim=-1)
    x = torch.randn(shape).to(NPU).requires_grad_()
    tables = angles.cos(), angles.sin()
    calls = compare(
        lambda y: devices.rotary(y, *(table.to(NPU) for table in tables)), lambda y: devices.rotary(y, *tables), [x]
    )
    assert not calls.counts["npu::npu_rotary_mul"]


def count_launches(calls: Calls) -> int:
    """Return the number of operators other than views and those of the comparison."""
    views = {"detach", "view", "linspace", "t", "transpose", "split", "alias", "slice", "unsqueeze", "_unsafe_view"}
    return sum(count for name, count in calls.counts.items() if name.partition("::")[2] not in views)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_swiglu(dtype: torch.dtype) -> None:
    x = torch.randn(6, 32).to(NPU, dtype).requires_grad_()
    devices.swiglu(x)
    calls = compare(devices.swiglu, devices.swiglu, [x])
    assert (calls.counts["npu::npu_swiglu"], calls.counts["npu::npu_swiglu_backward"]) == (1, 1)
    devices.use_fused_ops(False)
    try:
        plain = compare(devices.swiglu, devices.swiglu, [x])
    finally:
        devices.use_fused_ops(True)
    assert count_launches(calls) < count_launches(plain)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_of_a_linear_layer_swaps_the_weights(dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(8, 32, bias=bias)
    reference = [parameter.detach().double().clone() for parameter in linear.parameters()]
    linear.to(NPU, dtype)
    x = torch.randn(500, 8).to(NPU, dtype).requires_grad_()
    devices.swiglu_linear(x, linear)
    with Sizes() as calls:
        output, gradients = run(lambda y, *_: devices.swiglu_linear(y, linear), [x, *linear.parameters()])
    assert calls.counts["aten::roll"] == 2 * len(reference)  # of weight and bias, and of their gradients
    assert calls.counts["npu::npu_swiglu"] == calls.counts["npu::npu_swiglu_backward"] == 1
    plain = [x.detach().cpu().double(), *reference]
    expected = run(
        lambda *t: devices.swiglu(nn.functional.linear(*t)), [t.requires_grad_() for t in plain]
    )  # fmt: skip
    tolerance = 10 * TOLERANCE[dtype]
    for ours, theirs in zip((output, *gradients), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours.detach().cpu().double(), theirs.detach(), rtol=tolerance, atol=tolerance * 10)


def test_swiglu_of_a_replaced_linear_layer_calls_it() -> None:
    linear = nn.Linear(8, 32).to(NPU)
    x = torch.randn(5, 8).to(NPU)
    plain = devices.swiglu_linear(x, linear)
    seen = []
    linear.register_forward_hook(lambda *arguments: seen.append(1))
    torch.testing.assert_close(devices.swiglu_linear(x, linear), plain)
    assert seen == [1]


def test_autocast_of_swiglu_of_a_linear_layer() -> None:
    linear = nn.Linear(8, 32).to(NPU)
    x = torch.randn(5, 8).to(NPU)
    with torch.autocast("npu", dtype=torch.bfloat16), Calls() as calls:
        output = devices.swiglu_linear(x, linear)
    assert output.dtype == torch.bfloat16
    assert calls.counts["npu::npu_swiglu"] == 1


def test_weights_are_rounded_where_the_norm_takes_one_dtype_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(4, 16).to(NPU, torch.bfloat16), torch.linspace(0.5, 2, 16).to(NPU)
    monkeypatch.setitem(npu_ops._usable, ("npu_rms_norm with float32 weights", x.device, x.dtype), False)
    with Calls() as calls:
        output = devices.rms_norm(x, weight, 1e-6)
    assert calls.counts["npu::npu_rms_norm"] == calls.counts["aten::_to_copy"] == 1
    torch.testing.assert_close(output, devices.rms_norm(x, weight.bfloat16(), 1e-6))


ALL = ["fusion_attention", "rms_norm", "rotary_mul", "swiglu"]
FALLBACK = """
    import torch
    from npu_training import Calls
    from open_clip import device as devices, packing

    segments = packing.Segments.of([3, 1, 6])
    tables = [torch.linspace(0, 3, 10 * 4).reshape(10, 4).repeat_interleave(2, -1).cos()] * 2
    weight = torch.linspace(0.5, 2, 8)

    def compute(q, k, v, place):
        q, k = (devices.rotary(x, *(table.to(place) for table in tables)) for x in (q, k))
        q = devices.rms_norm(q, weight.to(place), 1e-6)
        attended = packing.attention(q, k, v, segments.to(place))
        causal = packing.attention(q, k, v, segments.to(place), is_causal=True)
        return devices.swiglu(attended + causal)

    torch.manual_seed(0)
    inputs = [torch.randn(10, 2, 8) for _ in range(3)]
    found = []
    for place in ("cpu", "npu"):
        leaves = [x.to(place, copy=True).requires_grad_() for x in inputs]
        with Calls() as calls:
            output = compute(*leaves, place)
            output.square().sum().backward()
        found.append([x.detach().cpu() for x in (output, *(leaf.grad for leaf in leaves))])
    print(all(torch.allclose(x, y, atol=1e-4) for x, y in zip(*found)))
    print([name for name in ALL if f"npu::npu_{name}" in calls.counts])
"""


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({}, ALL),
        ({"broken_ops": ",".join(f"npu_{name}:error" for name in ALL)}, []),
        ({"broken_ops": ",".join(f"npu_{name}:wrong" for name in ALL)}, []),
        ({"broken_ops": "npu_fusion_attention_grad:wrong"}, ALL[1:]),
        ({"broken_ops": "npu_rms_norm_backward:error,npu_swiglu_backward:wrong"}, ["fusion_attention", "rotary_mul"]),
        ({"broken_ops": "npu_rotary_mul_backward:wrong"}, ["fusion_attention", "rms_norm", "swiglu"]),
        ({"chip": "Ascend910A"}, ALL[1:]),
    ],
    ids=str,
)
def test_elementary_operators_are_used_if_a_kernel_does_not_work(settings: dict, used: list[str]) -> None:
    is_same, names = run_script(f"ALL = {ALL}\n" + textwrap.dedent(FALLBACK), **settings)[-2:]
    assert is_same == "True"
    assert names == str(used)


COMPILED = """
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend
    from open_clip import device as devices, packing

    def compute(x, segments, weight):
        return packing.attention(devices.rms_norm(x, weight, 1e-6), x, x * 2, segments, is_causal=True)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(compute, backend=counter, fullgraph=True)
    weight = torch.linspace(0.5, 2, 16).npu()
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        segments = packing.Segments.of(torch.randint(1, 20, (6,), generator=generator)).to("npu")
        x = torch.randn(segments.total, 2, 16).npu().requires_grad_()
        outputs = [function(x, segments, weight) for function in (compute, compiled)]
        gradients = [torch.autograd.grad(output.square().sum(), x)[0] for output in outputs]
        print(torch.allclose(*outputs, atol=1e-5), torch.allclose(*gradients, atol=1e-4))
    print(counter.frame_count)
"""


def test_compiled_without_a_graph_per_batch() -> None:
    *same, graphs = run_script(COMPILED)[-5:]
    assert same == ["True True"] * 4
    assert int(graphs) <= 2
