"""Attention on an NPU: the fused operator against the formula, its arguments, and when it is not used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from emulated import run_script
from npu_training import NPU, Calls, make_batch, make_model, move

import open_clip
from open_clip import device as devices
from open_clip.device import npu_attention
from open_clip.transformer.attention import MultiheadAttention

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
B, H, D = 2, 2, 16
FUSED, FUSED_GRAD = "npu::npu_fusion_attention", "npu::npu_fusion_attention_grad"
# Operators that torch's function adds on an NPU: to create and invert masks, and to copy for another dimension order.
EXTRA = {"aten::clone", "aten::ones", "aten::triu", "aten::tril", "aten::logical_not", "aten::copy_", "aten::cat"}


def projected(queries: int = 5, keys: int = 7, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return query, key and value as an input projection gives them: leaves [B, T, H * D]."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(B, tokens, H * D, generator=generator) for tokens in (queries, keys, keys)]
    return [leaf.to(NPU, dtype).requires_grad_() for leaf in leaves]


def heads_of(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def closed_form(
    leaves: list[torch.Tensor], allowed: torch.Tensor | None, scale: float = D**-0.5
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return (output [B, T, H * D], leaves) in fp64 on the CPU. A query whose keys are all hidden gets zeros."""
    plain = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    query, key, value = map(heads_of, plain)
    scores = scale * query @ key.transpose(-1, -2)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
        weights = scores.softmax(-1).masked_fill(~allowed.any(-1, keepdim=True), 0)
    else:
        weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2), plain


def compare(
    leaves: list[torch.Tensor], allowed: torch.Tensor | None = None, merged: bool = False, **options
) -> Counter[str]:
    """Run forward and backward on the NPU, compare both with the formula, and return the counts of operators.

    Args:
        merged: call with [B, T, H * D] and the number of heads instead of views [B, H, T, D].
    """
    with Calls() as calls:
        if merged:
            output = devices.attention(*leaves, num_heads=H, **options)
        else:
            output = devices.attention(*map(heads_of, leaves), **options).transpose(1, 2).flatten(2)
        weight = torch.linspace(-1, 1, output.numel()).view(output.shape)
        found = torch.autograd.grad(output, leaves, weight.to(output))
    expected, plain = closed_form(leaves, allowed, options.get("scale") or D**-0.5)
    gradients = torch.autograd.grad(expected, plain, weight.to(output.dtype).double())
    tolerance = TOLERANCE[leaves[0].dtype]
    torch.testing.assert_close(output.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    for ours, reference in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.cpu().double(), reference, rtol=5 * tolerance, atol=5 * tolerance)
    return calls.counts


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.7}], ids=["plain", "causal", "scale"])
def test_it_equals_the_formula_in_two_launches(options: dict, dtype: torch.dtype, merged: bool) -> None:
    devices.attention(*map(heads_of, projected()), is_causal=True)  # creates the mask that all causal calls share
    allowed = torch.ones(5, 7, dtype=torch.bool).tril() if options.get("is_causal") else None
    counts = compare(projected(dtype=dtype), allowed, merged, **options)
    assert (counts[FUSED], counts[FUSED_GRAD]) == (1, 1)
    assert not EXTRA & counts.keys()
    if merged:
        assert sum(counts.values()) - counts["aten::detach"] <= 6, counts  # the two, and those of the test itself


MASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "[S, S]": lambda m: m[0, 0],
    "[H, S, S]": lambda m: m[0],
    "[1, 1, S, S]": lambda m: m[:1, :1],
    "[B, 1, S, S]": lambda m: m[:, :1],
    "[B, H, S, S]": lambda m: m,
    "[1, H, S, S]": lambda m: m[:1],
    "[B, 1, 1, S]": lambda m: m[:, :1, :1],
    "[B, 1, S, 1]": lambda m: m[:, :1, :, :1],
    "[S]": lambda m: m[0, 0, 0],
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_shape(name: str, merged: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    allowed = MASKS[name](torch.rand(B, H, 5, 7, generator=generator) > 0.4)
    counts = compare(projected(), allowed.expand(B, H, 5, 7), merged, attn_mask=allowed.to(NPU))
    assert (counts[FUSED], counts[FUSED_GRAD]) == (1, 1)


def test_padding_of_whole_rows_gives_zeros_and_no_gradient() -> None:
    allowed = torch.ones(B, 1, 5, 7, dtype=torch.bool)
    allowed[0, :, 2] = False
    allowed[1] = False
    leaves = projected()
    compare(leaves, allowed.expand(B, H, 5, 7), attn_mask=allowed.to(NPU))
    output = devices.attention(*map(heads_of, leaves), attn_mask=allowed.to(NPU))
    assert output[0].any()
    assert not output[1].any()
    torchs = F.scaled_dot_product_attention(*(heads_of(leaf.detach().cpu()) for leaf in leaves), attn_mask=allowed)
    torch.testing.assert_close(output.detach().cpu(), torchs, rtol=1e-5, atol=1e-5)


def test_a_query_for_the_whole_batch_and_a_query_of_one_token() -> None:
    """As in attention pooling, and in generation with a cache, whose keys have heads before tokens in memory."""
    _, key, value = (heads_of(leaf) for leaf in projected())
    query = torch.randn(1, 3, H * D).to(NPU)
    pooled = devices.attention(heads_of(query).expand(B, -1, -1, -1), key, value)
    expected, _ = closed_form([query.expand(B, -1, -1), *(x.transpose(1, 2).flatten(2) for x in (key, value))], None)
    torch.testing.assert_close(pooled.transpose(1, 2).flatten(2).cpu().double(), expected, rtol=1e-5, atol=1e-5)
    cached = torch.cat([key, key], dim=2), torch.cat([value, value], dim=2)
    assert cached[0].is_contiguous()
    one = heads_of(torch.randn(B, 1, H * D).to(NPU))
    torch.testing.assert_close(
        devices.attention(one, *cached).cpu(), F.scaled_dot_product_attention(one.cpu(), *(x.cpu() for x in cached)),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_dropout_uses_the_npus_generator_and_is_the_same_in_the_backward_pass() -> None:
    leaves = projected()

    def draw() -> torch.Tensor:
        return devices.attention(*map(heads_of, leaves), dropout_p=0.5)

    torch.npu.manual_seed(3)
    first, second = draw(), draw()
    torch.npu.manual_seed(3)
    again = draw()
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    weight = torch.randn_like(first)
    (gradient,) = torch.autograd.grad(again, leaves[2], weight)  # the output is linear in the values
    torch.testing.assert_close((gradient * leaves[2]).sum(), (weight * again).sum(), rtol=1e-4, atol=1e-4)
    before = torch.npu.get_rng_state()
    devices.attention(*map(heads_of, leaves))
    assert torch.equal(torch.npu.get_rng_state(), before)


def test_a_mask_is_inverted_once_for_all_layers() -> None:
    query, key, value = map(heads_of, projected())
    allowed = torch.ones(B, 1, 5, 7, dtype=torch.bool).tril(2).to(NPU)
    with Calls() as calls:
        first = devices.attention(query, key, value, attn_mask=allowed)
        for _ in range(3):
            devices.attention(query, key, value, attn_mask=allowed)
        assert calls.counts["aten::logical_not"] == 1
        allowed[:, :, :, 0] = False  # an in-place change is detected
        second = devices.attention(query, key, value, attn_mask=allowed)
        assert calls.counts["aten::logical_not"] == 2
    assert not torch.allclose(first, second)
    del allowed
    compare(projected(), torch.ones(B, H, 5, 7, dtype=torch.bool), attn_mask=torch.ones(5, 7, dtype=torch.bool).to(NPU))


def test_masks_cached_in_inference_mode_can_be_used_in_training() -> None:
    npu_attention._causal_masks.clear()
    allowed = torch.ones(5, 7, dtype=torch.bool).tril(2).to(NPU)
    with torch.inference_mode():
        query, key, value = (heads_of(leaf.detach()) for leaf in projected())
        devices.attention(query, key, value, is_causal=True)
        devices.attention(query, key, value, attn_mask=allowed)
        devices.attention(query, key, value, attn_mask=torch.ones(5, 7, dtype=torch.bool, device=NPU))
    compare(projected(), torch.ones(5, 7, dtype=torch.bool).tril(), is_causal=True)
    compare(projected(), allowed.cpu(), attn_mask=allowed)


def test_autocast_computes_in_half_precision() -> None:
    leaves = projected()
    with torch.autocast("npu", dtype=torch.bfloat16):
        output = devices.attention(*map(heads_of, leaves))
    assert output.dtype == torch.bfloat16
    expected, _ = closed_form(leaves, None)
    torch.testing.assert_close(output.transpose(1, 2).flatten(2).cpu().double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "make",
    [
        lambda q, k, v: (q, k, v, {"attn_mask": torch.zeros(5, 7, device=NPU)}),
        lambda q, k, v: (q[0], k[0], v[0], {}),
        lambda q, k, v: (q.double(), k.double(), v.double(), {}),
        lambda q, k, v: (*(x.repeat(1, 1, 1, 33) for x in (q, k, v)), {}),
        lambda q, k, v: (*(x.repeat(1, 129, 1, 1) for x in (q, k, v)), {}),
        lambda q, k, v: (q, k, v[..., :8], {}),
        lambda q, k, v: (q[:0], k[:0], v[:0], {}),
    ],
    ids=["added mask", "three dimensions", "float64", "head dim", "heads", "narrow values", "empty"],
)
def test_torchs_function_is_used_for_unsupported_arguments(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANN_EMULATOR_STRICT", "0")
    query, key, value, options = make(*(heads_of(leaf.detach()) for leaf in projected()))
    with Calls() as calls:
        found = devices.attention(query, key, value, **options)
    assert not calls.counts[FUSED]
    options = {name: option.cpu() for name, option in options.items()}
    expected = F.scaled_dot_product_attention(query.cpu(), key.cpu(), value.cpu(), **options)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_the_attention_layer_copies_nothing(causal: bool) -> None:
    layer = MultiheadAttention(32, 2).to(NPU)
    x = torch.randn(2, 6, 32).to(NPU).requires_grad_()
    layer(x, x, x, need_weights=False, is_causal=causal)
    with Calls() as calls:
        layer(x, x, x, need_weights=False, is_causal=causal)[0].square().mean().backward()
    assert (calls.counts[FUSED], calls.counts[FUSED_GRAD]) == (1, 1)
    assert calls.counts.pop("aten::cat") == 1  # the gradients of query, key and value, for the input projection
    assert not EXTRA & calls.counts.keys()


def test_a_model_uses_the_fused_operator_in_every_layer_also_with_checkpointing() -> None:
    batch = move(make_batch(0), NPU)
    gradients = []
    for checkpointing in (False, True):
        model = make_model(text={"embed_cls": True, "pad_id": 0}).to(NPU)
        model.set_grad_checkpointing(checkpointing)
        layers = sum(isinstance(module, MultiheadAttention) for module in model.modules())
        with Calls() as calls:
            outputs = model(batch["image"], batch["text"])
            open_clip.ClipLoss()(*list(outputs.values())[:3]).backward()
        assert calls.counts[FUSED] == layers * (1 + checkpointing)
        assert not calls.counts["aten::_safe_softmax"]
        gradients.append([parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients)


FALLBACK = """
    import logging, torch
    logging.basicConfig(format="%(message)s")
    import torch.nn.functional as F
    from npu_training import Calls
    from open_clip import device as devices

    inputs = [torch.randn(2, 2, 5, 16) for _ in range(3)]
    with Calls() as calls:
        for _ in range(2):
            leaves = [x.to("npu").requires_grad_() for x in inputs]
            output = devices.attention(*leaves, is_causal=True)
            output.square().sum().backward()
    plain = [x.clone().requires_grad_() for x in inputs]
    expected = F.scaled_dot_product_attention(*plain, is_causal=True)
    expected.square().sum().backward()
    same = torch.allclose(output.cpu(), expected, atol=1e-5)
    print(same, all(torch.allclose(x.grad.cpu(), y.grad, atol=1e-4) for x, y in zip(leaves, plain)))
    print("npu::npu_fusion_attention" in calls.counts)
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"chip": "Ascend910A"},
        {"chip": "Ascend310P3"},
        {"broken_ops": "npu_fusion_attention:error"},
        {"broken_ops": "npu_fusion_attention:wrong"},
        {"broken_ops": "npu_fusion_attention_grad:error"},
        {"broken_ops": "npu_fusion_attention_grad:wrong"},
        {},
    ],
    ids=str,
)
def test_torchs_function_is_used_if_the_kernel_does_not_work(settings: dict) -> None:
    same, is_fused = run_script(FALLBACK, **settings)[-2:]
    assert same == "True True"
    assert is_fused == str(not settings)
