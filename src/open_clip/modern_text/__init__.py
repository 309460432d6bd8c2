"""The modern text tower: rotary positions, RMS norms, gated attention, SwiGLU (`text_arch: "modern"`)."""

from __future__ import annotations

from .blocks import ModernTextAttention, ModernTextBlock
from .layers import ReLUSquared, RMSNorm, RotaryEmbedding1D, SwiGLU
from .pool import ModernTextPool
from .tower import ModernTextTransformer

__all__ = [
    "ModernTextAttention",
    "ModernTextBlock",
    "ModernTextPool",
    "ModernTextTransformer",
    "RMSNorm",
    "ReLUSquared",
    "RotaryEmbedding1D",
    "SwiGLU",
]
