"""Layers against PyTorch's own and against formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from open_clip import blocks, layers


def randomize(module: nn.Module) -> nn.Module:
    """Values that differ everywhere, so that nothing is hidden by ones and zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return module.eval()


def pair(**kwargs: int) -> tuple[layers.MultiheadAttention, nn.MultiheadAttention]:
    """Ours and PyTorch's with the same weights."""
    ours = layers.MultiheadAttention(16, 4, **kwargs)
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


def test_self_attention_is_pytorchs() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])
    allowed = causal(5)
    expected = theirs(x, x, x, attn_mask=~allowed)[0]  # PyTorch's bool masks say what is hidden
    torch.testing.assert_close(ours(x, is_causal=True), expected)
    torch.testing.assert_close(ours(x, attn_mask=allowed), expected)
    additive = torch.zeros(5, 5).masked_fill(~allowed, -math.inf)
    torch.testing.assert_close(ours(x, attn_mask=additive), expected)


def test_a_mask_may_differ_between_the_batch() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = theirs(x, x, x, key_padding_mask=padding)[0]
    torch.testing.assert_close(ours(x, attn_mask=~padding[:, None, None, :]), expected)


@pytest.mark.parametrize("kwargs", [{}, {"kdim": 12, "vdim": 12}])
def test_cross_attention_is_pytorchs(kwargs: dict[str, int]) -> None:
    ours, theirs = pair(**kwargs)
    width = kwargs.get("kdim", 16)
    query, key, value = torch.randn(2, 3, 16), torch.randn(2, 7, width), torch.randn(2, 7, width)
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0])
    torch.testing.assert_close(ours(query, key), theirs(query, key, key)[0])
    shared = query[:1]
    expected = theirs(shared.expand(2, -1, -1), key, key)[0]
    torch.testing.assert_close(ours(shared, key), expected)


def test_attention_has_parameters_and_initial_weights_of_pytorchs() -> None:
    for kwargs in ({}, {"kdim": 12, "vdim": 12}):
        torch.manual_seed(0)
        ours = layers.MultiheadAttention(16, 4, **kwargs).state_dict()
        torch.manual_seed(0)
        theirs = nn.MultiheadAttention(16, 4, **kwargs).state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_sequence_first_attention() -> None:
    ours, _ = pair()
    flipped = layers.MultiheadAttention(16, 4, batch_first=False)
    flipped.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(flipped(x.transpose(0, 1)).transpose(0, 1), ours(x))


@pytest.mark.parametrize("cls", [layers.MultiheadAttention, layers.Attention])
def test_heads_that_do_not_divide_the_width_raise(cls: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="width of 16 cannot be divided into 3 heads"):
        cls(16, 3)


def manual_attention(attention: layers.Attention, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention's options, written out on explicit weights."""
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
def test_attention_options_are_their_formulas(kwargs: dict[str, bool], masked: bool) -> None:
    attention = randomize(layers.Attention(16, 4, **kwargs))
    x = torch.randn(2, 5, 16)
    mask = causal(5) if masked else None
    torch.testing.assert_close(attention(x, attn_mask=mask), manual_attention(attention, x, mask), rtol=1e-4, atol=1e-5)


def test_scaled_cosine_temperature_has_a_ceiling() -> None:
    attention = randomize(layers.Attention(8, 2, scaled_cosine=True))
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        attention.logit_scale.fill_(math.log(100.0))
        expected = attention(x)
        attention.logit_scale.fill_(50.0)
    torch.testing.assert_close(attention(x), expected)


def test_contradicting_attention_options_raise() -> None:
    with pytest.raises(ValueError, match="switch off qk_norm"):
        layers.Attention(16, 4, qk_norm=True, scaled_cosine=True)


def test_attention_dropout_only_in_training() -> None:
    attention = randomize(layers.Attention(16, 4, attn_drop=0.5, proj_drop=0.5))
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


def test_patch_dropout_leaves_at_least_one_and_refuses_nonsense() -> None:
    assert layers.PatchDropout(0.99).train()(torch.randn(2, 5, 3)).shape == (2, 2, 3)
    for prob in (1.0, -0.1):
        with pytest.raises(ValueError, match="0 <= prob < 1"):
            layers.PatchDropout(prob)


def test_attentional_pooler_is_attention_of_its_queries() -> None:
    pooler = randomize(layers.AttentionalPooler(16, 12, n_head=4, n_queries=3))
    theirs = nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True)
    theirs.load_state_dict(pooler.attn.state_dict())
    x = torch.randn(2, 7, 12)
    context = pooler.ln_k(x)
    expected = theirs(pooler.ln_q(pooler.query).expand(2, -1, -1), context, context)[0]
    torch.testing.assert_close(pooler(x), expected)


def test_residual_block_is_its_formula() -> None:
    block = randomize(blocks.ResidualAttentionBlock(16, 4, mlp_ratio=2.5, ls_init_value=0.1))
    x = torch.randn(2, 5, 16)
    middle = x + block.ls_1(block.attn(block.ln_1(x), is_causal=True))
    hidden = F.gelu(block.mlp.c_fc(block.ln_2(middle)))
    assert hidden.shape[-1] == 40
    torch.testing.assert_close(block(x, is_causal=True), middle + block.ls_2(block.mlp.c_proj(hidden)))


def test_cross_attention_block_normalises_what_it_looks_at() -> None:
    block = randomize(blocks.ResidualAttentionBlock(16, 4, is_cross_attention=True))
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    normed = block.ln_1_kv(context)
    middle = x + block.attn(block.ln_1(x), normed, normed)
    torch.testing.assert_close(block(x, context, context), middle + block.mlp(block.ln_2(middle)))


def test_custom_block_is_its_formula() -> None:
    block = randomize(
        blocks.CustomResidualAttentionBlock(16, 4, scale_attn=True, scale_fc=True, qk_norm=True, ls_init_value=0.1)
    )
    x = torch.randn(2, 5, 16)
    middle = x + block.ls_1(block.ln_attn(block.attn(block.ln_1(x))))
    hidden = block.mlp.ln(F.gelu(block.mlp.c_fc(block.ln_2(middle))))
    torch.testing.assert_close(block(x), middle + block.ls_2(block.mlp.c_proj(hidden)))
    with pytest.raises(ValueError, match="leave batch_first=True"):
        blocks.CustomResidualAttentionBlock(16, 4, batch_first=False)
