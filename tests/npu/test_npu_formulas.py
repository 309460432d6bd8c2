"""The emulator's `npu_*` operators against their formulas in float64, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
import torch_npu

NPU = "npu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def gradient(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of a weighted sum of the output, so that rows have different gradients."""
    weights = torch.linspace(-1, 2, output.numel()).reshape(output.shape).to(output)
    return [found.detach().double().cpu() for found in torch.autograd.grad((output * weights).sum(), inputs)]


def check(ours: torch.Tensor, x: torch.Tensor, expected: torch.Tensor, slope: torch.Tensor) -> None:
    """Compare an output and its gradient with the function `expected` and its derivative `slope` in float64."""
    tolerance = TOLERANCE[x.dtype]
    assert ours.dtype == x.dtype
    torch.testing.assert_close(ours.detach().double().cpu(), expected, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 2, x.numel()).reshape(x.shape).to(x.dtype).double()
    torch.testing.assert_close(gradient(ours, x)[0], weights * slope, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_npu_fast_gelu(dtype: torch.dtype) -> None:
    x = torch.linspace(-6, 6, 240).reshape(3, 80).to(NPU, dtype).requires_grad_()
    at = x.detach().cpu().double()
    sigmoid = 1 / (1 + (-1.702 * at).exp())
    check(torch_npu.npu_fast_gelu(x), x, at * sigmoid, sigmoid + 1.702 * at * sigmoid * (1 - sigmoid))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_npu_gelu(dtype: torch.dtype, approximate: str) -> None:
    x = torch.linspace(-6, 6, 240).reshape(3, 80).to(NPU, dtype).requires_grad_()
    at = x.detach().cpu().double()
    if approximate == "none":
        normal = 0.5 * (1 + torch.erf(at / math.sqrt(2)))
        expected, slope = at * normal, normal + at * (-at * at / 2).exp() / math.sqrt(2 * math.pi)
    else:
        inner = math.sqrt(2 / math.pi) * (at + 0.044715 * at**3)
        tanh, inner_slope = inner.tanh(), math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * at**2)
        expected, slope = 0.5 * at * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * at * (1 - tanh**2) * inner_slope
    check(torch_npu.npu_gelu(x, approximate=approximate), x, expected, slope)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Compute softmax(q k' / sqrt(d)) v for [batch, heads, tokens, head_dim]. Keys where `out` is True are hidden."""
    scores = torch.einsum("bnid,bnjd->bnij", q, k) / math.sqrt(q.shape[-1])
    weights = scores.exp() if out is None else scores.exp().masked_fill(out, 0.0)
    return torch.einsum("bnij,bnjd->bnid", weights / weights.sum(-1, keepdim=True), v)


def tensors(queries: int = 5, keys: int = 7, heads: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = [(2, heads, tokens, 16) for tokens in (queries, keys, keys)]
    return [torch.randn(size, generator=generator).to(NPU, dtype).requires_grad_() for size in sizes]


def compare_attention(ours: torch.Tensor, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
    plain = [x.detach().cpu().double().requires_grad_() for x in inputs]
    expected = attention(*plain, out)
    tolerance = TOLERANCE[inputs[0].dtype]
    torch.testing.assert_close(ours.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    for found, reference in zip(gradient(ours, *inputs), gradient(expected, *plain), strict=True):
        torch.testing.assert_close(found, reference, rtol=5 * tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_fusion_attention_without_mask(dtype: torch.dtype) -> None:
    inputs = tensors(dtype=dtype)
    output, maximum, total, *_ = torch_npu.npu_fusion_attention(*inputs, 2, "BNSD", scale=0.25)
    compare_attention(output, inputs, None)
    scores = 0.25 * inputs[0] @ inputs[1].transpose(-1, -2)
    assert maximum.shape == total.shape == (2, 2, 5, 8)
    torch.testing.assert_close(maximum[..., 0], scores.amax(-1).float(), rtol=1e-2, atol=1e-2)


def test_fusion_attentions_mask_is_the_opposite_of_pytorchs() -> None:
    inputs = tensors()
    allowed = torch.ones(5, 7, dtype=torch.bool).tril(2)
    output = torch_npu.npu_fusion_attention(*inputs, 2, "BNSD", scale=0.25, atten_mask=~allowed.to(NPU))[0]
    compare_attention(output, inputs, ~allowed)
    torchs = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=allowed.to(NPU))
    torch.testing.assert_close(output, torchs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mode", "diagonal"), [(2, 1), (3, 3)])
def test_fusion_attentions_sparse_modes_are_causal(mode: int, diagonal: int) -> None:
    """With 5 queries and 7 keys, mode 2 is aligned with the upper left corner, and mode 3 with the lower right one."""
    inputs = tensors()
    compressed = torch.ones(2048, 2048, dtype=torch.bool, device=NPU).triu(1)  # these modes need this mask
    found = torch_npu.npu_fusion_attention(*inputs, 2, "BNSD", scale=0.25, atten_mask=compressed, sparse_mode=mode)
    compare_attention(found[0], inputs, torch.ones(5, 7, dtype=torch.bool).triu(diagonal))


@pytest.mark.parametrize("layout", ["BSND", "BSH", "SBH"])
def test_fusion_attentions_layouts(layout: str) -> None:
    inputs = tensors()
    order = {"BSND": "b s n d", "BSH": "b s n d", "SBH": "s b n d"}[layout].split()
    places = ["bnsd".index(letter) for letter in order]
    moved = [x.permute(places) for x in inputs]
    if layout != "BSND":
        moved = [x.flatten(2) for x in moved]
    output = torch_npu.npu_fusion_attention(*[x.contiguous() for x in moved], 2, layout, scale=0.25)[0]
    back = output if layout == "BSND" else output.unflatten(2, (2, 16))
    compare_attention(back.permute([order.index(letter) for letter in "bnsd"]), inputs, None)


def test_fusion_attention_with_fewer_heads_of_keys() -> None:
    query, _, _ = tensors(heads=4)
    _, key, value = tensors(heads=2)
    output = torch_npu.npu_fusion_attention(query, key, value, 4, "BNSD", scale=0.25)[0]
    repeated = [x.repeat_interleave(2, 1) for x in (key, value)]
    expected = attention(*(x.detach().cpu().double() for x in (query, *repeated)))
    torch.testing.assert_close(output.detach().cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("mode", [None, 2, 3])
def test_fusion_attention_of_packed_sequences(mode: int | None, dtype: torch.dtype) -> None:
    """Sequence i of the queries sees sequence i of the keys only. The lengths are given as ends."""
    lengths, key_lengths = (2, 1, 3), (2, 4, 3)
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(sum(found), 2, 16, generator=generator) for found in (lengths, key_lengths, key_lengths)]
    inputs = [x.to(NPU, dtype).requires_grad_() for x in made]
    compressed = torch.ones(2048, 2048, dtype=torch.bool, device=NPU).triu(1)
    options = {} if mode is None else {"atten_mask": compressed, "sparse_mode": mode}
    ours = torch_npu.npu_fusion_attention(
        *inputs, 2, "TND", scale=0.25, actual_seq_qlen=[2, 3, 6], actual_seq_kvlen=[2, 6, 9], **options
    )[0]
    out = torch.ones(6, 9, dtype=torch.bool)
    for start, key_start, rows, columns in ((0, 0, 2, 2), (2, 2, 1, 4), (3, 6, 3, 3)):
        visible = torch.ones(rows, columns, dtype=torch.bool)
        if mode is not None:
            visible = visible.tril(0 if mode == 2 else columns - rows)
        out[start : start + rows, key_start : key_start + columns] = ~visible
    plain = [x.detach().cpu().double().requires_grad_() for x in inputs]
    expected = attention(*(x.transpose(0, 1)[None] for x in plain), out)[0].transpose(0, 1)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(ours.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    for found, reference in zip(gradient(ours, *inputs), gradient(expected, *plain), strict=True):
        torch.testing.assert_close(found, reference, rtol=5 * tolerance, atol=5 * tolerance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actual_seq_qlen": [3, 3], "actual_seq_kvlen": [3, 3]}, "with ends 3 and 3"),
        ({"actual_seq_qlen": [6], "actual_seq_kvlen": [3, 6]}, "of one length"),
        ({}, "needs actual_seq_qlen"),
        ({"actual_seq_qlen": [3, 6], "actual_seq_kvlen": [3, 6], "sparse_mode": 2, "mask": (6, 6)}, "2048 x 2048"),
    ],
)
def test_fusion_attention_refuses_wrong_packed_sequences(options: dict, message: str) -> None:
    if "mask" in options:
        options = {**options, "atten_mask": torch.ones(options["mask"], dtype=torch.bool, device=NPU)}
        del options["mask"]
    inputs = [torch.ones(6, 2, 16, device=NPU) for _ in range(3)]
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_fusion_attention(*inputs, 2, "TND", **options)


def compare(ours: torch.Tensor, inputs: list[torch.Tensor], expected: torch.Tensor, plain: list[torch.Tensor]) -> None:
    """Compare an output and its gradients with those of a formula in float64."""
    tolerance = TOLERANCE[inputs[0].dtype]
    assert ours.dtype == inputs[0].dtype
    torch.testing.assert_close(ours.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    for found, reference in zip(gradient(ours, *inputs), gradient(expected, *plain), strict=True):
        torch.testing.assert_close(found, reference, rtol=5 * tolerance, atol=5 * tolerance)


def leaves_of(*made: torch.Tensor, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return leaves on the NPU, and the same numbers in float64 on the CPU."""
    ours = [x.to(NPU, dtype).requires_grad_() for x in made]
    return ours, [x.detach().cpu().double().requires_grad_() for x in ours]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_npu_rms_norm(dtype: torch.dtype) -> None:
    inputs, plain = leaves_of(torch.linspace(-3, 5, 80).reshape(5, 16).sin(), torch.linspace(0.5, 2, 16), dtype=dtype)
    x, weight = plain
    expected = x / (x * x).mean(-1, keepdim=True).add(1e-3).sqrt() * weight
    output, rstd = torch_npu.npu_rms_norm(*inputs, 1e-3)
    assert (rstd.dtype, rstd.shape) == (torch.float32, (5, 1))
    compare(output, inputs, expected, plain)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_npu_swiglus_gate_is_the_first_half(dtype: torch.dtype) -> None:
    inputs, plain = leaves_of(torch.linspace(-6, 6, 96).reshape(3, 32), dtype=dtype)
    gate, value = plain[0].chunk(2, -1)
    compare(torch_npu.npu_swiglu(inputs[0], dim=-1), inputs, gate / (1 + (-gate).exp()) * value, plain)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_npu_rotary_mul(mode: str, dtype: torch.dtype) -> None:
    angles = torch.linspace(0, 3, 4 * 8).reshape(1, 4, 1, 8)
    inputs, plain = leaves_of(
        torch.linspace(-3, 5, 2 * 4 * 3 * 8).reshape(2, 4, 3, 8), angles.cos(), angles.sin(), dtype=dtype
    )
    x, cos, sin = plain
    if mode == "half":
        turned = torch.cat((-x[..., 4:], x[..., :4]), -1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    compare(torch_npu.npu_rotary_mul(*inputs, mode), inputs, x * cos + turned * sin, plain)


@pytest.mark.parametrize(
    ("shape", "tables"),
    [
        ((1, 4, 2, 896), (1, 4, 1, 896)),
        ((500, 4, 2, 8), (1, 4, 1, 8)),
        ((2, 4, 2, 8), (2, 4, 1, 8)),
        ((4, 2, 8), (4, 1, 8)),
    ],
    ids=["head dim", "sequences * heads", "tables of each sequence", "three dimensions"],
)
def test_npu_rotary_mul_refuses_what_its_page_excludes(shape: tuple[int, ...], tables: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="npu_rotary_mul"):
        torch_npu.npu_rotary_mul(
            torch.ones(shape, device=NPU), *(torch.ones(tables, device=NPU) for _ in range(2)), "interleave"
        )


def test_an_operator_without_a_formula_raises() -> None:
    with pytest.raises(RuntimeError, match="npu_interleave_rope has no formula"):
        torch_npu.npu_interleave_rope(*(torch.ones(1, 1, 4, 64, device=NPU) for _ in range(3)))


def test_half_precision_products_are_summed_in_float32() -> None:
    """Summed in fp16, 4096 ones would give 2048, because 2048 + 1 is rounded to 2048."""
    ones = torch.ones(1, 4096, dtype=torch.float16, device=NPU)
    found = ones @ ones.t()
    assert found.dtype == torch.float16
    assert found.item() == 4096


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_unmodified_npu_fused_adamw_equals_torchs(weight_decay: float) -> None:
    """NpuFusedAdamW uses aten operators on flat tensors, of which the parameters are views."""

    def train(make: object) -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).to(NPU)
        inputs = torch.randn(32, 8).to(NPU)
        optimizer = make(network.parameters(), lr=1e-2, weight_decay=weight_decay)
        for _ in range(5):
            optimizer.zero_grad()
            network(inputs).square().mean().backward()
            optimizer.step()
        return [parameter.detach().cpu() for parameter in network.parameters()]

    for ours, reference in zip(train(torch_npu.optim.NpuFusedAdamW), train(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
