"""Pooling of a text's tokens."""

from __future__ import annotations

import torch
from torch import nn

from ..transformer.attention import check_heads
from ..transformer.layers import ModuleFactory
from ..utils import NotScriptable, expect
from .layers import RMSNorm
from .layouts import Layout

POOL_TYPES = ("eos", "last", "mean", "map")


class ModernTextPool(NotScriptable, nn.Module):
    """Pool the tokens of each text to one vector. Only "map" has parameters.

    Args:
        width: of the tokens.
        pool_type: "eos" for the first end of text, and the last token of a text without one; "last" for the last token;
            "mean"; "map" for attention of a learned query (Set Transformer, https://arxiv.org/abs/1810.00825) without
            output projection.
        heads: of "map"; a divisor of `width`.
        norm_layer: called with a width.
        bias: add biases to the projections of "map".
        qk_norm: normalize queries and keys of each head of "map".
        eos_id: id of the end of text, for "eos".
    """

    def __init__(
        self,
        width: int,
        pool_type: str = "eos",
        heads: int = 8,
        norm_layer: ModuleFactory = RMSNorm,
        bias: bool = False,
        qk_norm: bool = False,
        eos_id: int | None = None,
    ) -> None:
        super().__init__()
        expect("pool_type", pool_type, POOL_TYPES)
        self.pool_type = pool_type
        self.eos_id = eos_id
        self.heads = heads
        if pool_type == "map":
            check_heads(width, heads)
            self.query = nn.Parameter(torch.empty(1, 1, width))
            self.q = nn.Linear(width, width, bias=bias)
            self.kv = nn.Linear(width, 2 * width, bias=bias)
            self.q_norm = norm_layer(width // heads) if qk_norm else nn.Identity()
            self.k_norm = norm_layer(width // heads) if qk_norm else nn.Identity()
            if not self.query.is_meta:
                nn.init.normal_(self.query, std=0.02)

    @property
    def takes_one_token(self) -> bool:
        """Whether the result is one of the tokens, so that a norm can be applied after pooling."""
        return self.pool_type in ("eos", "last")

    def no_weight_decay(self) -> set[str]:
        return {"query"} if self.pool_type == "map" else set()

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Pool the tokens of a batch of texts, without registers, to [batch, width]."""
        if self.pool_type == "mean":
            return layout.mean(x)
        if self.pool_type == "map":
            return self._attend(x, layout)
        if self.pool_type == "last" or self.eos_id is None:
            return layout.take(x, layout.lengths - 1)
        return layout.take(x, layout.eos_places(self.eos_id))

    def _attend(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        query = self.q(self.query[0].to(x.dtype)).unflatten(-1, (self.heads, -1))
        key, value = self.kv(x).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return layout.pooling_attention(self.q_norm(query), self.k_norm(key), value)

    def extra_repr(self) -> str:
        return f"pool_type={self.pool_type!r}"
