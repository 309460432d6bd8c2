"""Attention and blocks of the modern text tower."""

from __future__ import annotations

import torch
from torch import nn

from .. import device
from ..transformer.attention import KeyValueCache, check_heads
from ..transformer.blocks import LentWeights, with_lent_weights
from ..transformer.layers import LayerScale, ModuleFactory
from ..utils import NotScriptable, expect
from .layers import RMSNorm, build_mlp
from .layouts import AttentionContext

NORM_PLACEMENTS = ("pre", "sandwich")


class ModernTextAttention(NotScriptable, nn.Module):
    """Self-attention with rotary positions.

    Args:
        dim: width.
        heads: a divisor of `dim`.
        qk_norm: normalize queries and keys of each head, before they are rotated.
        norm_layer: of `qk_norm`; called with a width.
        gated: multiply the output, before the projection, by the sigmoid of a linear function of the input
            (https://arxiv.org/abs/2505.06708).
        value_residual: mix the values with those of the first block (ResFormer, https://arxiv.org/abs/2410.17897).
        vr_first: this is the first block, which provides the values.
        bias: add biases to the projections.
        gate_bias: add a bias to the gate; `bias` if None.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        qk_norm: bool = False,
        norm_layer: ModuleFactory = RMSNorm,
        gated: bool = False,
        value_residual: bool = False,
        vr_first: bool = False,
        bias: bool = False,
        gate_bias: bool | None = None,
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.gives_values = value_residual and vr_first
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.q_norm = norm_layer(dim // heads) if qk_norm else None
        self.k_norm = norm_layer(dim // heads) if qk_norm else None
        self.gate = nn.Linear(dim, dim, bias=bias if gate_bias is None else gate_bias) if gated else None
        if value_residual and not vr_first:
            self.vr_lambda = nn.Parameter(torch.full((1,), 0.5))
        else:
            self.register_parameter("vr_lambda", None)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        context: AttentionContext,
        first_values: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute attention.

        Args:
            x: [batch, tokens, dim], or packed [tokens, dim].
            context: positions and masks.
            first_values: values of the first block, for `value_residual`.
            cache: keys and values of earlier calls, which `x` does not contain.

        Returns:
            The output, and the values [..., tokens, heads, head_dim].
        """
        qk, value = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).split((2 * self.heads, self.heads), dim=-2)
        if self.vr_lambda is not None and first_values is not None:
            value = torch.lerp(first_values, value, self.vr_lambda.to(value.dtype))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = qk.chunk(2, dim=-2)
            query, key = (
                device.rotary(normed, context.cos, context.sin) for normed in (self.q_norm(query), self.k_norm(key))
            )
        else:
            query, key = device.rotary(qk, context.cos, context.sin).chunk(2, dim=-2)
        values = value
        if cache is not None:
            key, values = _extend(cache, key, value)
        out = context.attention(query, key, values)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj(out), value


def _extend(cache: KeyValueCache, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Append [batch, tokens, heads, head_dim] to a cache, whose tokens are the second to last dimension."""
    heads = key.shape[-2]
    keys, values = cache.extend(key.flatten(-2), value.flatten(-2))
    return keys.unflatten(-1, (heads, -1)), values.unflatten(-1, (heads, -1))


class ModernTextBlock(NotScriptable, nn.Module):
    """Transformer block: x += ls1(post1(attn(norm1(x)))), then x += ls2(post2(mlp(norm2(x)))).

    Args:
        dim: width.
        heads: a divisor of `dim`.
        mlp_ratio: hidden width of the MLP, divided by `dim`.
        norm_layer: called with a width.
        mlp_type: "swiglu", "mlp" or "relu2".
        norm_placement: "pre", or "sandwich" for norms after attention and MLP, too (post1, post2).
        ls_init_value: initial value of the layer scales; None for no layer scales.
        attn_bias, mlp_bias: add biases to the layers of attention and MLP.
        qk_norm, attn_gated, value_residual, vr_first, gate_bias: as in ModernTextAttention.
    """

    lent_weights: LentWeights | None = None  # see training.half_weights

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        norm_layer: ModuleFactory = RMSNorm,
        qk_norm: bool = False,
        attn_gated: bool = False,
        mlp_type: str = "swiglu",
        norm_placement: str = "pre",
        ls_init_value: float | None = None,
        value_residual: bool = False,
        vr_first: bool = False,
        attn_bias: bool = False,
        gate_bias: bool | None = None,
        mlp_bias: bool = False,
    ) -> None:
        super().__init__()
        expect("norm_placement", norm_placement, NORM_PLACEMENTS)
        has_post = norm_placement == "sandwich"
        self.norm1 = norm_layer(dim)
        self.attn = ModernTextAttention(
            dim, heads, qk_norm, norm_layer, attn_gated, value_residual, vr_first, attn_bias, gate_bias
        )
        self.norm1_post = norm_layer(dim) if has_post else nn.Identity()
        self.ls1 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)
        self.norm2 = norm_layer(dim)
        self.mlp = build_mlp(mlp_type, dim, mlp_ratio, mlp_bias)
        self.norm2_post = norm_layer(dim) if has_post else nn.Identity()
        self.ls2 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)

    @property
    def gives_values(self) -> bool:
        """Whether forward also returns the values of its attention, for the blocks after it."""
        return self.attn.gives_values

    @with_lent_weights
    def forward(
        self,
        x: torch.Tensor,
        context: AttentionContext,
        first_values: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Map [batch, tokens, dim], or packed [tokens, dim], to the same shape. See ModernTextAttention.forward.

        Returns:
            The output; with value residuals, the first block returns (output, values).
        """
        attended, values = self.attn(self.norm1(x), context, first_values, cache)
        x = x + self.ls1(self.norm1_post(attended))
        x = x + self.ls2(self.norm2_post(self.mlp(self.norm2(x))))
        return (x, values) if self.gives_values else x
