"""Layers against PyTorch's and against explicit formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from open_clip.transformer import blocks, layers
from open_clip.transformer.attention import Attention, AttentionalPooler, MultiheadAttention
from open_clip.transformer.masks import KernelMask, causal_mask


def randomize(module: nn.Module) -> nn.Module:
    """Set parameters to different values, because ones and zeros could hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return module.eval()


def pair(**kwargs: int) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Return our layer and PyTorch's with the same weights."""
    ours = MultiheadAttention(16, 4, **kwargs)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True, **kwargs)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("cls", [layers.LayerNorm, layers.LayerNormFp32])
def test_layer_norm_returns_its_inputs_dtype(cls: type[nn.LayerNorm]) -> None:
    norm = randomize(cls(8))
    x = torch.randn(3, 8)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (8,), norm.weight, norm.bias))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_layer_norm_fp32_computes_in_float32_with_half_weights() -> None:
    norm = layers.LayerNormFp32(64).to(torch.bfloat16)
    x = (1000 + torch.arange(64.0)).bfloat16()[None]
    torch.testing.assert_close(norm(x), F.layer_norm(x.float(), (64,)).bfloat16(), rtol=0, atol=0)


def test_activations() -> None:
    x = torch.linspace(-4, 4, 41)
    torch.testing.assert_close(layers.QuickGELU()(x), x * torch.sigmoid(1.702 * x))
    torch.testing.assert_close(layers.GELU()(x), F.gelu(x))
    torch.testing.assert_close(layers.GELU(approximate="tanh")(x), F.gelu(x, approximate="tanh"))
    with pytest.raises(ValueError, match="got 'cubic'"):
        layers.GELU("cubic")


@pytest.mark.parametrize("inplace", [False, True])
def test_layer_scale_keeps_half_precision(inplace: bool) -> None:
    scale = layers.LayerScale(4, 0.5, inplace=inplace)
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    out = scale(x).detach()
    assert out.dtype == torch.bfloat16
    assert out.tolist() == [[0.5] * 4] * 2
    assert (out.data_ptr() == x.data_ptr()) is inplace


MASKS = {
    "none": {},
    "bool": {"attn_mask": ~causal(5)},
    "added": {"attn_mask": torch.randn(5, 5).masked_fill(~causal(5), -math.inf)},
    "bool per head": {"attn_mask": torch.stack([~causal(5), torch.eye(5) > 0] * 4)},
    "added per head": {"attn_mask": torch.randn(8, 5, 5)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "added padding": {"key_padding_mask": torch.tensor([[0.0] * 5, [0.0] * 3 + [-1.0, -math.inf]])},
    "bool and padding": {
        "attn_mask": ~causal(5),
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 4 + [True]]),
    },
    "causal": {"attn_mask": causal_mask(5), "is_causal": True},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_attention_equals_pytorchs(masks: str, need_weights: bool, average: bool) -> None:
    ours, theirs = pair()
    assert isinstance(ours, nn.MultiheadAttention)
    x = torch.randn(2, 5, 16)
    options = MASKS[masks] | {"need_weights": need_weights, "average_attn_weights": average}
    out, weights = ours(x, x, x, **options)
    expected, expected_weights = theirs(x, x, x, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)
    assert (weights is None) == (not need_weights)


def test_attention_weights_have_the_dropout_of_training() -> None:
    ours, _ = pair()
    ours.train().dropout = 0.5
    x = torch.randn(2, 5, 16)
    assert (ours(x, x, x, average_attn_weights=False)[1] == 0).any()
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_without_a_batch_equals_pytorchs(need_weights: bool) -> None:
    ours, theirs = pair()
    x, context = torch.randn(5, 16), torch.randn(7, 16)
    for inputs, masks in (((x, x, x), {"attn_mask": torch.randn(4, 5, 5)}), ((x, context, context), {})):
        for found, expected in zip(
            ours(*inputs, need_weights=need_weights, **masks),
            theirs(*inputs, need_weights=need_weights, **masks),
            strict=True,
        ):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kwargs", [{}, {"kdim": 12, "vdim": 12}])
def test_cross_attention_equals_pytorchs(kwargs: dict[str, int]) -> None:
    ours, theirs = pair(**kwargs)
    width = kwargs.get("kdim", 16)
    query, key, value = torch.randn(2, 3, 16), torch.randn(2, 7, width), torch.randn(2, 7, width)
    for need_weights in (True, False):
        torch.testing.assert_close(ours(query, key, value, need_weights=need_weights)[0], theirs(query, key, value)[0])
    shared = query[:1]
    expected = theirs(shared.expand(2, -1, -1), key, key)[0]
    torch.testing.assert_close(ours(shared, key, key)[0], expected)


def test_added_keys_equal_pytorchs() -> None:
    ours, _ = pair()
    theirs = nn.MultiheadAttention(16, 4, add_bias_kv=True, add_zero_attn=True, batch_first=True).eval()
    ours.bias_k, ours.bias_v, ours.add_zero_attn = theirs.bias_k, theirs.bias_v, True
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x, x, x)[0], theirs(x, x, x)[0])


def test_a_mask_for_a_wrong_number_of_heads_raises() -> None:
    x = torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match="attn_mask has 2 masks, and 2 sequences with 4 heads need 8"):
        pair()[0](x, x, x, attn_mask=torch.zeros(2, 5, 5))


def test_the_kernel_mask_is_used_with_its_own_mask_only() -> None:
    ours, theirs = pair()
    x, shown = torch.randn(2, 5, 16), torch.randn(5, 5)
    expected = theirs(x, x, x, attn_mask=~causal(5))[0]
    for kernel_mask in (KernelMask(shown), KernelMask(shown, causal(5)[None, None])):
        torch.testing.assert_close(
            ours(x, x, x, need_weights=False, attn_mask=shown, kernel_mask=kernel_mask)[0], expected
        )
        other = shown.clone()
        torch.testing.assert_close(
            ours(x, x, x, need_weights=False, attn_mask=other, kernel_mask=kernel_mask)[0],
            theirs(x, x, x, attn_mask=other)[0],
        )


def test_attention_has_parameters_and_initial_weights_of_pytorchs() -> None:
    for kwargs in ({}, {"kdim": 12, "vdim": 12}):
        torch.manual_seed(0)
        ours = MultiheadAttention(16, 4, **kwargs).state_dict()
        torch.manual_seed(0)
        theirs = nn.MultiheadAttention(16, 4, **kwargs).state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_sequence_first_attention() -> None:
    ours, _ = pair()
    flipped = MultiheadAttention(16, 4, batch_first=False)
    flipped.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 16)
    y = x.transpose(0, 1)
    torch.testing.assert_close(flipped(y, y, y)[0].transpose(0, 1), ours(x, x, x)[0])
    torch.testing.assert_close(flipped(y, y, y)[1], ours(x, x, x)[1])


@pytest.mark.parametrize("cls", [MultiheadAttention, Attention])
def test_heads_that_do_not_divide_the_width_raise(cls: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="width of 16 cannot be divided into 3 heads"):
        cls(16, 3)


def manual_attention(attention: Attention, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Compute attention with its options from explicit weights."""
    batch, length, width = x.shape
    heads = attention.num_heads
    qkv = (x @ attention.in_proj_weight.T + attention.in_proj_bias).reshape(batch, length, 3, heads, width // heads)
    q, k, v = (qkv[:, :, i].permute(0, 2, 1, 3) for i in range(3))
    if attention.logit_scale is not None:
        temperature = attention.logit_scale.clamp(max=attention.logit_scale_max).exp()
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        logits = q @ k.transpose(-1, -2) * temperature
    else:
        q, k = attention.ln_q(q), attention.ln_k(k)
        logits = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    out = logits.softmax(dim=-1) @ v
    if attention.head_scale is not None:
        out = out * attention.head_scale
    out = attention.ln_inner(out.permute(0, 2, 1, 3).reshape(batch, length, width))
    return out @ attention.out_proj.weight.T + attention.out_proj.bias


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"qk_norm": True}, {"scaled_cosine": True}, {"scale_heads": True}, {"inner_norm": True, "scale_heads": True}],
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_options_equal_their_formulas(kwargs: dict[str, bool], masked: bool) -> None:
    attention = randomize(Attention(16, 4, **kwargs))
    x = torch.randn(2, 5, 16)
    mask = causal(5) if masked else None
    expected = manual_attention(attention, x, mask)
    hidden = None if mask is None else ~mask
    torch.testing.assert_close(attention(x, attn_mask=hidden), expected, rtol=1e-4, atol=1e-5)
    per_head = None if hidden is None else causal_mask(5).expand(8, -1, -1)
    torch.testing.assert_close(attention(x, attn_mask=per_head), expected, rtol=1e-4, atol=1e-5)


def test_the_scale_of_scaled_cosine_has_a_maximum() -> None:
    attention = randomize(Attention(8, 2, scaled_cosine=True))
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        attention.logit_scale.fill_(math.log(100.0))
        expected = attention(x)
        attention.logit_scale.fill_(50.0)
    torch.testing.assert_close(attention(x), expected)


def test_contradictory_attention_options_raise() -> None:
    with pytest.raises(ValueError, match="switch off qk_norm"):
        Attention(16, 4, qk_norm=True, scaled_cosine=True)


def test_attention_dropout_only_in_training() -> None:
    attention = randomize(Attention(16, 4, attn_drop=0.5, proj_drop=0.5))
    x = torch.randn(2, 5, 16)
    assert torch.equal(attention(x), attention(x))
    attention.train()
    assert not torch.equal(attention(x), attention(x))


def test_patch_dropout_keeps_whole_tokens_and_the_class_token() -> None:
    drop = layers.PatchDropout(0.75).train()
    x = torch.arange(9.0).expand(5, 9)[..., None] * torch.ones(4)
    out = drop(x)
    assert out.shape == (5, 1 + 2, 4)
    assert (out[:, 0] == 0).all()
    assert (out == out[..., :1]).all()
    kept = out[:, 1:, 0]
    assert all(len(set(row.tolist())) == 2 and min(row) >= 1 for row in kept)
    assert drop.eval()(x) is x


def test_patch_dropout_draws_for_each_image_from_the_seed() -> None:
    drop = layers.PatchDropout(0.5, exclude_first_token=False).train()
    x = torch.arange(64.0).expand(6, 64)[..., None]
    torch.manual_seed(3)
    first = drop(x)
    torch.manual_seed(3)
    assert torch.equal(drop(x), first)
    assert first.shape == (6, 32, 1)
    assert len({tuple(row.flatten().tolist()) for row in first}) == 6
    assert first.min() == 0


def test_patch_dropout_keeps_at_least_one_patch_and_invalid_fractions_raise() -> None:
    assert layers.PatchDropout(0.99).train()(torch.randn(2, 5, 3)).shape == (2, 2, 3)
    for prob in (1.0, -0.1):
        with pytest.raises(ValueError, match="0 <= prob < 1"):
            layers.PatchDropout(prob)


def test_attentional_pooler_equals_attention_of_its_queries() -> None:
    pooler = randomize(AttentionalPooler(16, 12, n_head=4, n_queries=3))
    theirs = nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True)
    theirs.load_state_dict(pooler.attn.state_dict())
    x = torch.randn(2, 7, 12)
    context = pooler.ln_k(x)
    expected = theirs(pooler.ln_q(pooler.query).expand(2, -1, -1), context, context)[0]
    torch.testing.assert_close(pooler(x), expected)


def test_residual_block_equals_its_formula() -> None:
    block = randomize(blocks.ResidualAttentionBlock(16, 4, mlp_ratio=2.5, ls_init_value=0.1))
    x = torch.randn(2, 5, 16)
    mask, normed = causal_mask(5), block.ln_1(x)
    middle = x + block.ls_1(block.attn(normed, normed, normed, attn_mask=mask)[0])
    hidden = F.gelu(block.mlp.c_fc(block.ln_2(middle)))
    assert hidden.shape[-1] == 40
    torch.testing.assert_close(block(x, attn_mask=mask), middle + block.ls_2(block.mlp.c_proj(hidden)))


def test_cross_attention_block_normalizes_keys_and_values() -> None:
    block = randomize(blocks.ResidualAttentionBlock(16, 4, is_cross_attention=True))
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    normed = block.ln_1_kv(context)
    middle = x + block.attn(block.ln_1(x), normed, normed)[0]
    torch.testing.assert_close(block(x, context, context), middle + block.mlp(block.ln_2(middle)))


def test_custom_block_equals_its_formula() -> None:
    block = randomize(
        blocks.CustomResidualAttentionBlock(16, 4, scale_attn=True, scale_fc=True, qk_norm=True, ls_init_value=0.1)
    )
    x = torch.randn(2, 5, 16)
    middle = x + block.ls_1(block.ln_attn(block.attn(block.ln_1(x))))
    hidden = block.mlp.ln(F.gelu(block.mlp.c_fc(block.ln_2(middle))))
    torch.testing.assert_close(block(x), middle + block.ls_2(block.mlp.c_proj(hidden)))
    with pytest.raises(ValueError, match="leave batch_first=True"):
        blocks.CustomResidualAttentionBlock(16, 4, batch_first=False)
