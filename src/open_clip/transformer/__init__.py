"""The native transformers: image tower, text tower, decoder, and the blocks and layers they are made of."""

from __future__ import annotations

from .. import aliases
from .attention import Attention, AttentionalPooler, MultiheadAttention
from .blocks import CustomResidualAttentionBlock, ResidualAttentionBlock
from .decoder import MultimodalTransformer
from .layers import GELU, LayerNorm, LayerNormFp32, LayerScale, PatchDropout, QuickGELU
from .stack import CustomTransformer, Transformer
from .text import TextTransformer, lock_text_tower
from .text_encoder import text_global_pool
from .vision import VisionTransformer

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

__all__ = [
    "GELU",
    "Attention",
    "AttentionalPooler",
    "CustomResidualAttentionBlock",
    "CustomTransformer",
    "LayerNorm",
    "LayerNormFp32",
    "LayerScale",
    "MultiheadAttention",
    "MultimodalTransformer",
    "PatchDropout",
    "QuickGELU",
    "ResidualAttentionBlock",
    "TextTransformer",
    "Transformer",
    "VisionTransformer",
    "lock_text_tower",
    "text_global_pool",
]
