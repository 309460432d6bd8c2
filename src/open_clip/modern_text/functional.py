"""Operators of the modern text tower that have a fused kernel on some devices."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import device, packing
from ..packing import Segments


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute the RMS norm of the last dimension (https://arxiv.org/abs/1910.07467) in float32.

    Returns:
        The dtype of `x`.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs (2i, 2i + 1) of the last dimension (https://arxiv.org/abs/2104.09864) in float32.

    Args:
        x: [..., tokens, heads, head_dim].
        cos, sin: of the angles, float32 [tokens, head_dim], each value repeated for its pair.

    Returns:
        The shape and dtype of `x`.
    """
    wide = x.float()
    turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
    return (wide * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(x.dtype)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Return a * silu(g), where [a, g] are the halves of the last dimension (https://arxiv.org/abs/2002.05202)."""
    values, gates = x.chunk(2, dim=-1)
    return values * F.silu(gates)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None = None,
    is_causal: bool = False,
    segments: Segments | None = None,
    kv_segments: Segments | None = None,
) -> torch.Tensor:
    """Compute attention of padded or packed sequences.

    Args:
        query, key, value: [batch, tokens, heads, head_dim], or packed [tokens, heads, head_dim].
        allowed: bool [batch, 1, query tokens, key tokens] of padded sequences, True where a query may attend.
        is_causal: each query attends to keys up to its position.
        segments, kv_segments: of packed queries and keys, as in `packing.attention`.

    Returns:
        [batch, tokens, heads * head_dim], or packed [tokens, heads * head_dim].
    """
    if segments is not None:
        return packing.attention(query, key, value, segments, kv_segments, is_causal).flatten(-2)
    query, key, value, heads = query.flatten(-2), key.flatten(-2), value.flatten(-2), query.shape[-2]
    return device.attention(query, key, value, attn_mask=allowed, is_causal=is_causal, num_heads=heads)
