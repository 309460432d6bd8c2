"""Poolers of Hugging Face text towers: one vector per text from the tokens of the encoder."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

POOLERS: dict[str, type[nn.Module]] = {}


def register_pooler(cls: type[nn.Module]) -> type[nn.Module]:
    """Register a pooler class under its name in snake case ("MeanPooler" is "mean_pooler"). A class decorator.

    A pooler is called with the encoder's output, whose `last_hidden_state` is [batch, tokens, width], and a bool mask
    [batch, tokens], False for padding. It returns [batch, width].
    """
    POOLERS[re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()] = cls
    return cls


@register_pooler
class MeanPooler(nn.Module):
    """The mean of the tokens."""

    def forward(self, x: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask[..., None].to(x.last_hidden_state.dtype)
        return (x.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


@register_pooler
class MaxPooler(nn.Module):
    """The maximum over the tokens, per channel."""

    def forward(self, x: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        padding = attention_mask[..., None] == 0
        return x.last_hidden_state.masked_fill(padding, torch.finfo(x.last_hidden_state.dtype).min).amax(dim=1)


@register_pooler
class ClsPooler(nn.Module):
    """The encoder's `pooler_output` if it has one, else the first token.

    Args:
        use_pooler_output: False always takes the first token of `last_hidden_state`.
    """

    def __init__(self, use_pooler_output: bool = True) -> None:
        super().__init__()
        self.cls_token_position = 0
        self.use_pooler_output = use_pooler_output

    def forward(self, x: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        pooled = getattr(x, "pooler_output", None) if self.use_pooler_output else None
        return x.last_hidden_state[:, self.cls_token_position] if pooled is None else pooled


@register_pooler
class ClsLastHiddenStatePooler(nn.Module):
    """The first token of `last_hidden_state`."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token_position = 0

    def forward(self, x: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        return x.last_hidden_state[:, self.cls_token_position]
