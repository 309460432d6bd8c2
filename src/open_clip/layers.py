"""Names of open_clip.layers of open_clip's main branch, for programs. Here the layers are in `transformer.layers`."""

from __future__ import annotations

from .transformer.layers import LayerNorm, LayerNormFp32, LayerScale, QuickGELU

__all__ = ["LayerNorm", "LayerNormFp32", "LayerScale", "QuickGELU"]
