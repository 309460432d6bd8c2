"""Contrastive losses."""

from __future__ import annotations

from .. import aliases
from .modules import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss, gather_features

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss", "gather_features"]
