"""Layers of the native towers: norms, activations, layer scale, patch dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import device
from ..utils import has_hooks, has_method

ModuleFactory = Callable[..., nn.Module]


class LayerNorm(nn.LayerNorm):
    """Layer norm that returns the dtype of its input. Under autocast, F.layer_norm returns float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return device.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerNormFp32(nn.LayerNorm):
    """Layer norm that computes in float32 and returns the dtype of its input, for half precision models."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return device.quick_gelu(x)


class GELU(nn.Module):
    """GELU that computes the form `approximate` ("none" or "tanh") on every device. On NPU, nn.GELU does not."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}.")
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return device.gelu(x, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class LayerScale(nn.Module):
    """A learned factor per channel (CaiT, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gamma = self.gamma.to(x.dtype)  # half precision weights leave gamma in float32
        return x.mul_(gamma) if self.inplace else x * gamma


class PatchDropout(nn.Module):
    """Drop a random fraction of the patches of each image, in training only (https://arxiv.org/abs/2212.00794).

    Args:
        prob: fraction of the patches to drop, 0 <= prob < 1. At least one patch is kept.
        exclude_first_token: always keep the first token, the class token.
    """

    def __init__(self, prob: float = 0.5, exclude_first_token: bool = True) -> None:
        super().__init__()
        if not 0.0 <= prob < 1.0:
            raise ValueError(f"The fraction of patches to drop must be 0 <= prob < 1, got {prob}.")
        self.prob = prob
        self.exclude_first_token = exclude_first_token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [batch, tokens, width] to [batch, kept tokens, width]."""
        if not self.training or self.prob == 0.0:
            return x
        num_prefix = 1 if self.exclude_first_token else 0
        batch, num_tokens, width = x.shape
        num_patches = num_tokens - num_prefix
        num_keep = max(1, int(num_patches * (1 - self.prob)))
        # Drawn on the device of x: indices from the host would need a copy in every step.
        order = torch.randn(batch, num_patches, device=x.device)
        keep = order.topk(num_keep, dim=-1).indices + num_prefix
        if num_prefix:
            keep = torch.cat([keep.new_zeros(batch, num_prefix), keep], dim=1)
        return x.gather(1, keep.unsqueeze(-1).expand(-1, -1, width))

    def extra_repr(self) -> str:
        return f"prob={self.prob}, exclude_first_token={self.exclude_first_token}"


def drop_none(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


_NORM_FORWARDS = (LayerNorm.forward, LayerNormFp32.forward, nn.LayerNorm.forward, nn.Identity.forward)


def can_follow_pooling(norm: nn.Module, x: torch.Tensor) -> bool:
    """Return whether `norm` can be applied to the pooled token alone.

    It can if it acts on each token separately, no hook may need the other tokens, and torch.fx is not tracing.
    """
    return (
        any(has_method(norm, forward) for forward in _NORM_FORWARDS)
        and not has_hooks(norm)
        and not isinstance(x, torch.fx.Proxy)
    )
