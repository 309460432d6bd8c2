"""Operators that have a fused kernel on some devices."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..utils import has_hooks
from . import packed, packed_graph
from .base import AttentionInputs, Device, elementary_attend, elementary_attention, elementary_rms_norm, exact_gelu
from .segments import Segments
from .table import DEVICES

_PLAIN = DEVICES["cpu"]
_FUSED_OPS = "OPEN_CLIP_FUSED_OPS"
_fused_ops = os.environ.get(_FUSED_OPS, "1") != "0"


def use_fused_ops(enabled: bool) -> None:
    """Choose between the devices' fused operators and elementary ones, for activations, norms and attention.

    Use it to compare the two, or if a fused operator fails. OPEN_CLIP_FUSED_OPS=0 switches fused operators off at
    import.
    """
    global _fused_ops
    _fused_ops = enabled


@contextlib.contextmanager
def elementary_ops() -> Iterator[None]:
    """Switch fused operators off in a context, for graphs that other programs read."""
    before = _fused_ops
    use_fused_ops(False)
    try:
        yield
    finally:
        use_fused_ops(before)


def _device_of(x: torch.Tensor) -> Device:
    return DEVICES.get(x.device.type, _PLAIN) if _fused_ops else _PLAIN


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Compute x * sigmoid(1.702 * x), the activation of OpenAI's CLIP (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return _device_of(x).quick_gelu(x)


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """Compute GELU. On every device it is exact (with erf), or with approximate="tanh" the tanh form."""
    if not _fused_ops and approximate == "none":
        return exact_gelu(x)  # F.gelu is an approximation on some devices
    return _device_of(x).gelu(x, approximate)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """Compute log(1 + exp(x)), without gradient, in the form that is fast on the device."""
    return _device_of(x).softplus(x)


def layer_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Compute F.layer_norm and return the dtype of `x`, also under autocast. Some devices need no casts for it."""
    return _device_of(x).layer_norm(x, normalized_shape, weight, bias, eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    It is computed in float32 for half precision. The result has the dtype of `x`, also under autocast.
    """
    return _device_of(x).rms_norm(x, weight, eps) if _fused_ops else elementary_rms_norm(x, weight, eps)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the adjacent pairs (2i, 2i+1) of each head: rotary position embedding (RoFormer, arXiv 2104.09864).

    It is computed in float32 for half precision. Queries and keys can be rotated in one call, as additional heads.

    Args:
        x: [..., tokens, heads, head_dim].
        cos, sin: float32 [tokens, head_dim], or [..., tokens, head_dim] if they differ between sequences. Each value is
            there twice, for the two numbers of its pair.

    Returns:
        The rotated `x`, in its dtype.
    """
    return _device_of(x).rotary(x, cos, sin)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Compute a * silu(g) with [a, g] = x.chunk(2, -1) (arXiv 2002.05202)."""
    return _device_of(x).swiglu(x)


def swiglu_linear(x: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    """Compute swiglu(linear(x)). If `linear` is a plain nn.Linear, NPUs need fewer operators than for the two calls."""
    if type(linear) is nn.Linear and not has_hooks(linear):
        return _device_of(x).swiglu_linear(x, linear.weight, linear.bias)
    return swiglu(linear(x))


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    num_heads: int | None = None,
) -> torch.Tensor:
    """Compute F.scaled_dot_product_attention, with a fused kernel on most devices.

    Args:
        query, key, value: [batch, heads, tokens, head_dim], or with `num_heads` [batch, tokens, heads * head_dim],
            which some kernels support without a copy.
        attn_mask: broadcastable to [batch, heads, query tokens, key tokens], True where a query may attend. A float
            mask is added to the scores; for it, NPUs have no fused kernel. Excludes `is_causal`.
        dropout_p: dropout rate of the attention weights.
        is_causal: each query attends to keys up to its position.
        scale: factor of the scores; 1 / sqrt(head_dim) if None.
        num_heads: number of heads, if they are merged in the inputs.

    Returns:
        The output, in the same layout as `query`.
    """
    inputs = AttentionInputs(query, key, value, attn_mask, dropout_p, is_causal, scale, num_heads)
    return _device_of(query).attention(inputs) if _fused_ops else elementary_attention(inputs)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    kv_segments: Segments | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute attention within each of several sequences that are stored one after another.

    `open_clip.packing.attention` explains the arguments.
    """
    query, key, value = (_autocast(x) for x in (query, key, value))
    inputs = packed.PackedInputs(query, key, value, segments, kv_segments or segments, is_causal, scale)
    if not _fused_ops:
        return packed.by_sequence(inputs, elementary_attend)
    if torch.compiler.is_compiling():
        return packed_graph.packed_attention(inputs)
    return _device_of(query).packed_attention(inputs)


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """Cast to the dtype of autocast, for operators that autocast does not know."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
