"""Operators for which some devices have a fused kernel."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch

from .base import AttentionInputs, Device, elementary_attention, exact_gelu
from .table import DEVICES

_PLAIN = DEVICES["cpu"]
_FUSED_OPS = "OPEN_CLIP_FUSED_OPS"
_fused_ops = os.environ.get(_FUSED_OPS, "1") != "0"


def use_fused_ops(enabled: bool) -> None:
    """Whether activations and attention go through the devices' fused operators, or are made of elementary ones.

    For comparing the two, and for a fused operator that fails. OPEN_CLIP_FUSED_OPS=0 switches them off from the start.
    """
    global _fused_ops
    _fused_ops = enabled


@contextlib.contextmanager
def elementary_ops() -> Iterator[None]:
    """Within it, fused operators are switched off: for graphs that others are to read."""
    before = _fused_ops
    use_fused_ops(False)
    try:
        yield
    finally:
        use_fused_ops(before)


def _device_of(x: torch.Tensor) -> Device:
    return DEVICES.get(x.device.type, _PLAIN) if _fused_ops else _PLAIN


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), OpenAI CLIP's activation (Hendrycks and Gimpel, arXiv:1606.08415), any shape and device."""
    return _device_of(x).quick_gelu(x)


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """GELU, exact (erf) or approximate="tanh", as asked on every device."""
    if not _fused_ops and approximate == "none":
        return exact_gelu(x)  # F.gelu is not this on every device
    return _device_of(x).gelu(x, approximate)


def layer_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """F.layer_norm that returns the dtype of `x` under autocast, too; some devices need no casts for it."""
    return _device_of(x).layer_norm(x, normalized_shape, weight, bias, eps)


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
    """F.scaled_dot_product_attention on [batch, heads, tokens, head_dim], which has a fused kernel on most devices.

    With `num_heads`, inputs and result are [batch, tokens, heads * head_dim], which some kernels take as they are.

    Args:
        attn_mask: broadcastable to [batch, heads, query tokens, key tokens], True where a query may look. An additive
            float mask is accepted, too, and has no fused kernel on NPU. Excludes `is_causal`.
        dropout_p: of the weights.
        scale: of the scores; 1 / sqrt(head_dim) where None.
    """
    inputs = AttentionInputs(query, key, value, attn_mask, dropout_p, is_causal, scale, num_heads)
    return _device_of(query).attention(inputs) if _fused_ops else elementary_attention(inputs)
