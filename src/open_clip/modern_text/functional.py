"""Attention of padded and of packed texts."""

from __future__ import annotations

import torch

from .. import device, packing
from ..packing import Segments


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
