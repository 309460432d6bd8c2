"""Attention on Ascend NPUs by `torch_npu.npu_fusion_attention`, without the operators that torch's function adds there.

F.scaled_dot_product_attention ends in the same kernel. On the way there op-plugin makes a mask of 2048 x 2048 for every
causal call and inverts a bool mask in every layer (ScaledDotProductAttentionKernelNpuOpApi.cpp), and the result has
heads before tokens, which must be copied for the output projection. The limits below are those of op-plugin's page
torch_npu-npu_fusion_attention.md and of CANN's aclnn_flash_attention_score.cpp.
"""
from __future__ import annotations

import weakref
from typing import Any

import torch

from .base import AttentionInputs

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEADS = 256
_MAX_HEAD_DIM = 512  # 768 in newer versions of CANN
_MAX_TOKENS = 2**20
_COMPRESSED = 2048  # side of the mask that stands for a causal one of any size
_LEFT_UP_CAUSAL = 2  # sparse_mode: each token sees itself and those before it, counted from the upper left corner
_ROWS_MAY_BE_HIDDEN = 2  # inner_precise: a query that may look nowhere gets zeros, as on other devices

_causal_masks: dict[torch.device, torch.Tensor] = {}


def _shape(x: torch.Tensor, num_heads: int | None) -> tuple[int, int, int, int]:
    """(batch, heads, tokens, head_dim) of [batch, heads, tokens, head_dim] or [batch, tokens, heads * head_dim]."""
    if num_heads is None:
        return (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    return (x.shape[0], num_heads, x.shape[1], x.shape[2] // num_heads)


def takes(inputs: AttentionInputs) -> bool:
    """Whether the kernel computes this."""
    query, key, value, attn_mask, num_heads = inputs.query, inputs.key, inputs.value, inputs.attn_mask, inputs.num_heads
    if key.shape != value.shape or any(x.dim() != (4 if num_heads is None else 3) for x in (query, key)):
        return False
    batch, heads, queries, head_dim = _shape(query, num_heads)
    key_batch, key_heads, keys, key_dim = _shape(key, num_heads)
    return (
        query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and (batch, heads, head_dim) == (key_batch, key_heads, key_dim)
        and batch > 0
        and 0 < heads <= _MAX_HEADS
        and 0 < head_dim <= _MAX_HEAD_DIM
        and 0 < queries <= _MAX_TOKENS
        and 0 < keys <= _MAX_TOKENS
        and (attn_mask is None or attn_mask.dtype == torch.bool)
    )


def fails_in_torch(inputs: AttentionInputs) -> bool:
    """Whether F.scaled_dot_product_attention of torch_npu 2.13 passes this to the kernel, which refuses it."""
    query, num_heads = inputs.query, inputs.num_heads
    if query.dim() != (4 if num_heads is None else 3):
        return False
    heads = query.shape[1] if num_heads is None else num_heads
    return heads > _MAX_HEADS or inputs.key.shape != inputs.value.shape


def attend(library: Any, inputs: AttentionInputs) -> torch.Tensor:
    """As `ops.attention`, for what the kernel `takes`. `library`: torch_npu."""
    query, key, value, attn_mask, dropout_p, is_causal, scale, num_heads = inputs
    batch, heads, queries, head_dim = _shape(query, num_heads)
    keys = _shape(key, num_heads)[2]
    layout = "BSH"
    if num_heads is None:
        # Views of projections have tokens first in memory: the kernel takes them so, and returns heads merged.
        layout = "BNSD" if key.is_contiguous() else "BSND"
        if layout == "BSND":
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    options: dict[str, Any] = {}
    if is_causal:
        options = {"atten_mask": _causal_mask(query.device), "next_tockens": 0, "sparse_mode": _LEFT_UP_CAUSAL}
    elif attn_mask is not None:
        options = {"atten_mask": _hidden.of(attn_mask, (batch, heads, queries, keys))}
        if queries > 1:  # as op-plugin's function does it
            options["inner_precise"] = _ROWS_MAY_BE_HIDDEN
    scale = head_dim**-0.5 if scale is None else scale
    keep_prob = 1.0 - dropout_p
    output = library.npu_fusion_attention(query, key, value, heads, layout, scale=scale, keep_prob=keep_prob, **options)
    return output[0].transpose(1, 2) if layout == "BSND" else output[0]


def _causal_mask(device: torch.device) -> torch.Tensor:
    """bool [2048, 2048], True above the diagonal; one for each device."""
    if device not in _causal_masks:
        with torch.inference_mode(False):  # backward passes keep it
            _causal_masks[device] = torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu_(1)
    return _causal_masks[device]


class _HiddenMasks:
    """Bool masks as the kernel wants them: True is hidden. Keeps the last one, which all layers of a tower share."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[torch.Tensor], int, tuple[int, ...], torch.Tensor] | None = None

    def of(self, allowed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Invert a mask that broadcasts to `shape` (batch, heads, queries, keys)."""
        if allowed.is_inference():  # such a tensor does not count its changes
            return _hidden_mask(allowed, shape)
        if self._last is not None:
            mask, version, for_shape, hidden = self._last
            if mask() is allowed and version == allowed._version and for_shape == shape:
                return hidden
        with torch.inference_mode(False):
            hidden = _hidden_mask(allowed, shape)
        self._last = weakref.ref(allowed), allowed._version, shape, hidden
        return hidden


_hidden = _HiddenMasks()


def _hidden_mask(allowed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """~allowed in one of the shapes that the kernel takes: [B, N, S, S], [B, 1, S, S], [1, 1, S, S] or [S, S]."""
    hidden = allowed.logical_not()
    hidden = hidden[(None,) * (4 - hidden.dim())]
    batch, heads, queries, keys = shape
    per_head = hidden.shape[1] > 1
    per_sequence = per_head or hidden.shape[0] > 1
    return hidden.expand(batch if per_sequence else 1, heads if per_head else 1, queries, keys).contiguous()
