"""Contrastive losses."""

from __future__ import annotations

from .. import aliases
from ..collectives import (  # noqa: F401  open_clip 3.3 has them here
    NeighbourExchange,
    NeighbourExchangeBidir,
    neighbour_exchange,
    neighbour_exchange_bidir,
    neighbour_exchange_bidir_with_grad,
    neighbour_exchange_with_grad,
)
from .modules import DIST_IMPLS, ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss, gather_features

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

__all__ = ["DIST_IMPLS", "ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss", "gather_features"]
