"""Attention on Ascend NPUs with `torch_npu.npu_fusion_attention`.

F.scaled_dot_product_attention calls the same kernel with additional operators: op-plugin creates a 2048 x 2048 mask for
each causal call and inverts bool masks in each layer (ScaledDotProductAttentionKernelNpuOpApi.cpp), and the output has
heads before tokens, so it must be copied for the output projection. This module avoids them. Its limits are from
op-plugin's page torch_npu-npu_fusion_attention.md and CANN's aclnn_flash_attention_score.cpp; those of packed sequences
(layout TND) also from CANN's page aclnnFlashAttentionVarLenScore.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .base import AttentionInputs
from .packed import PackedInputs

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEADS = 256
_MAX_HEAD_DIM = 512  # 768 in newer versions of CANN
_MAX_TOKENS = 2**20
_MAX_SEQUENCES = 1024  # packed sequences per launch
_COMPRESSED = 2048  # side of the mask that the kernel needs for causal attention of any length
_LEFT_UP_CAUSAL = 2  # sparse_mode: causal, aligned with the upper left corner of the scores
_ROWS_MAY_BE_HIDDEN = 2  # inner_precise: a query whose keys are all hidden gets zeros, as on other devices

_causal_masks: dict[torch.device, torch.Tensor] = {}


def _shape(x: torch.Tensor, num_heads: int | None) -> tuple[int, int, int, int]:
    """Return (batch, heads, tokens, head_dim) of a tensor in that shape or [batch, tokens, heads * head_dim]."""
    if num_heads is None:
        return (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    return (x.shape[0], num_heads, x.shape[1], x.shape[2] // num_heads)


def takes(inputs: AttentionInputs) -> bool:
    """Return whether the kernel supports these inputs."""
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
    """Return whether F.scaled_dot_product_attention of torch_npu 2.13 calls the kernel, which refuses these inputs."""
    query, num_heads = inputs.query, inputs.num_heads
    if query.dim() != (4 if num_heads is None else 3):
        return False
    heads = query.shape[1] if num_heads is None else num_heads
    return heads > _MAX_HEADS or inputs.key.shape != inputs.value.shape


def attend(library: Any, inputs: AttentionInputs) -> torch.Tensor:
    """Compute F.scaled_dot_product_attention for inputs that the kernel `takes`.

    Args:
        library: torch_npu.
        inputs: as in ops.attention.

    Returns:
        The output, in the same layout as the query.
    """
    query, key, value, attn_mask, dropout_p, is_causal, scale, num_heads = inputs
    batch, heads, queries, head_dim = _shape(query, num_heads)
    keys = _shape(key, num_heads)[2]
    layout = "BSH"
    if num_heads is None:
        # Views of projections have tokens before heads in memory. The kernel supports this layout without a copy.
        layout = "BNSD" if key.is_contiguous() else "BSND"
        if layout == "BSND":
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    options: dict[str, Any] = {}
    if is_causal:
        options = {"atten_mask": _causal_mask(query.device), "next_tockens": 0, "sparse_mode": _LEFT_UP_CAUSAL}
    elif attn_mask is not None:
        options = {"atten_mask": _hidden.of(attn_mask, (batch, heads, queries, keys))}
        if queries > 1:  # as op-plugin does
            options["inner_precise"] = _ROWS_MAY_BE_HIDDEN
    scale = head_dim**-0.5 if scale is None else scale
    keep_prob = 1.0 - dropout_p
    output = library.npu_fusion_attention(query, key, value, heads, layout, scale=scale, keep_prob=keep_prob, **options)
    return output[0].transpose(1, 2) if layout == "BSND" else output[0]


def takes_packed(inputs: PackedInputs) -> bool:
    """Return whether the kernel supports these packed sequences."""
    query, key, value, segments, kv_segments = inputs[:5]
    _, heads, head_dim = query.shape
    return (
        query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape
        and key.shape[1:] == query.shape[1:]
        and 0 < heads <= _MAX_HEADS
        and 0 < head_dim <= _MAX_HEAD_DIM
        and segments.max_length <= _MAX_TOKENS
        and kv_segments.max_length <= _MAX_TOKENS
    )


def attend_packed(library: Any, inputs: PackedInputs) -> torch.Tensor:
    """Compute `ops.packed_attention` for inputs that the kernel takes (`takes_packed`).

    The kernel reads the lengths on the host and computes only the blocks on the diagonal. There is no mask, or the
    shared causal one.

    Args:
        library: torch_npu.
        inputs: as in ops.packed_attention.
    """
    query, key, value, segments, kv_segments, is_causal, scale = inputs
    heads, head_dim = query.shape[1:]
    options: dict[str, Any] = {"scale": head_dim**-0.5 if scale is None else scale}
    if is_causal:
        options |= {"atten_mask": _causal_mask(query.device), "next_tockens": 0, "sparse_mode": _LEFT_UP_CAUSAL}
    launches = list(_launches(segments.ends, kv_segments.ends))
    ends, kv_ends = _ends_of(segments.ends, launches), _ends_of(kv_segments.ends, launches)
    queries, keys, values = _split(query, ends), _split(key, kv_ends), _split(value, kv_ends)
    outputs = [
        library.npu_fusion_attention(*qkv, heads, "TND", actual_seq_qlen=q_ends, actual_seq_kvlen=k_ends, **options)[0]
        for *qkv, q_ends, k_ends in zip(queries, keys, values, ends, kv_ends, strict=True)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _launches(ends: tuple[int, ...], kv_ends: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Split sequences into ranges (first, last + 1) within the limits of one launch: 1024 sequences and 2^20 tokens."""
    start, base, kv_base = 0, 0, 0
    for index, (end, kv_end) in enumerate(zip(ends, kv_ends, strict=True)):
        if index - start == _MAX_SEQUENCES or max(end - base, kv_end - kv_base) > _MAX_TOKENS:
            yield start, index
            start, base, kv_base = index, ends[index - 1], kv_ends[index - 1]
    yield start, len(ends)


def _ends_of(ends: tuple[int, ...], launches: list[tuple[int, int]]) -> list[list[int]]:
    """Return where each sequence of a launch ends, counted from the first token of the launch."""
    firsts = [ends[start - 1] if start else 0 for start, _ in launches]
    return [[end - first for end in ends[slice(*launch)]] for first, launch in zip(firsts, launches, strict=True)]


def _split(x: torch.Tensor, ends: list[list[int]]) -> Sequence[torch.Tensor]:
    """Split the tokens of all launches. One launch needs no operator, also not in the backward pass."""
    return x.split([found[-1] for found in ends]) if len(ends) > 1 else [x]


def _causal_mask(device: torch.device) -> torch.Tensor:
    """Return bool [2048, 2048], True above the diagonal. It is cached per device."""
    if device not in _causal_masks:
        with torch.inference_mode(False):  # because backward passes save it
            _causal_masks[device] = torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu_(1)
    return _causal_masks[device]


class _HiddenMasks:
    """Converts bool masks to the kernel's form (True: hidden). Caches the last one for the other layers of a tower."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[torch.Tensor], int, tuple[int, ...], torch.Tensor] | None = None

    def of(self, allowed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Invert a mask that broadcasts to `shape` (batch, heads, queries, keys)."""
        if allowed.is_inference():  # inference tensors have no version counter
            return _hidden_mask(allowed, shape)
        if self._last is not None:
            mask, version, last_shape, hidden = self._last
            if mask() is allowed and version == allowed._version and last_shape == shape:
                return hidden
        with torch.inference_mode(False):
            hidden = _hidden_mask(allowed, shape)
        self._last = weakref.ref(allowed), allowed._version, shape, hidden
        return hidden


_hidden = _HiddenMasks()


def _hidden_mask(allowed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return ~allowed in a shape that the kernel supports: [B, N, S, S], [B, 1, S, S] or [1, 1, S, S]."""
    hidden = allowed.logical_not()
    hidden = hidden[(None,) * (4 - hidden.dim())]
    batch, heads, queries, keys = shape
    per_head = hidden.shape[1] > 1
    per_sequence = per_head or hidden.shape[0] > 1
    return hidden.expand(batch if per_sequence else 1, heads if per_head else 1, queries, keys).contiguous()
