"""Attention on Ascend NPUs by `torch_npu.npu_fusion_attention`, without the operators that torch's function adds there.

F.scaled_dot_product_attention ends in the same kernel, but op-plugin (ScaledDotProductAttentionKernelNpuOpApi.cpp) makes
a mask of 2048 x 2048 for every causal call, inverts a bool mask in every layer, and returns heads before tokens, which
the output projection has to copy. The limits below are those of op-plugin's page torch_npu-npu_fusion_attention.md and
of CANN's aclnn_flash_attention_score.cpp.
"""
from __future__ import annotations

import weakref
from typing import Any

import torch

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEADS = 256
_MAX_HEAD_DIM = 512  # 768 in newer versions of CANN
_MAX_TOKENS = 2**20
_COMPRESSED = 2048  # side of the mask that stands for a causal one of any size
_LEFT_UP_CAUSAL = 2  # sparse_mode: each token sees itself and those before it, counted from the upper left corner
_ROWS_MAY_BE_HIDDEN = 2  # inner_precise: a query that may look nowhere gets zeros, as on other devices

_causal_masks: dict[torch.device, torch.Tensor] = {}


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None) -> bool:
    """Whether the kernel computes this: [batch, heads, tokens, head_dim] each, and no mask or a bool mask."""
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        return False
    batch, heads, queries, head_dim = query.shape
    return (
        query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and key.shape[:2] == (batch, heads)
        and key.shape[3] == head_dim
        and 0 < heads <= _MAX_HEADS
        and 0 < head_dim <= _MAX_HEAD_DIM
        and batch > 0
        and 0 < queries <= _MAX_TOKENS
        and 0 < key.shape[2] <= _MAX_TOKENS
        and (attn_mask is None or attn_mask.dtype == torch.bool)
    )


def attend(
    library: Any,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """As F.scaled_dot_product_attention, for what the kernel `takes`.

    Args:
        library: torch_npu.
        tensors: query, key and value. If they are views of [batch, tokens, heads * head_dim], the result is one, too.
    """
    query, key, value = tensors
    # Views: the kernel takes both orders, and the one of the input projection's output is that of the output projection.
    swapped = not key.is_contiguous()
    if swapped:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    options: dict[str, Any] = {}
    if is_causal:
        options = {"atten_mask": _causal_mask(query.device), "next_tockens": 0, "sparse_mode": _LEFT_UP_CAUSAL}
    elif attn_mask is not None:
        shape = (*tensors[0].shape[:3], tensors[1].shape[2])
        options = {"atten_mask": _hidden.of(attn_mask, shape)}
        if shape[2] > 1:  # as op-plugin's function does it
            options["inner_precise"] = _ROWS_MAY_BE_HIDDEN
    output = library.npu_fusion_attention(
        query,
        key,
        value,
        tensors[0].shape[1],
        "BSND" if swapped else "BNSD",
        scale=tensors[0].shape[3] ** -0.5 if scale is None else scale,
        keep_prob=1.0 - dropout_p,
        **options,
    )[0]
    return output.transpose(1, 2) if swapped else output


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
