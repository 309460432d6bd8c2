"""Layers of the modern text tower: RMS norm, rotary positions, MLPs."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from .. import device
from ..transformer.layers import GELU, LayerNormFp32, ModuleFactory
from ..utils import expect

MLP_TYPES = ("swiglu", "mlp", "relu2")
NORM_TYPES = ("rmsnorm", "layernorm")


class RMSNorm(nn.RMSNorm):
    """RMS norm that computes in float32 and returns the dtype of its input."""

    eps: float
    weight: nn.Parameter

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return device.rms_norm(x, self.weight, self.eps)


def norm_factory(norm_type: str | None, eps: float) -> ModuleFactory:
    """Return a function that builds a norm of a given width. Both types compute in float32."""
    norm_type = norm_type or "rmsnorm"
    expect("norm_type", norm_type, NORM_TYPES)
    return functools.partial(RMSNorm if norm_type == "rmsnorm" else LayerNormFp32, eps=eps)


class RotaryEmbedding1D(nn.Module):
    """Angles of rotary position embeddings (RoFormer, https://arxiv.org/abs/2104.09864).

    Positions, frequencies and angles are float32 in every precision: bfloat16 has only 8 significant bits, so positions
    above 256 would coincide. They are computed in each forward pass. Buffers would be cast with the model.

    Args:
        dim: width of a head, even.
        temperature: the slowest of the dim / 2 frequencies is temperature ** (2 / dim - 1).
    """

    def __init__(self, dim: int, temperature: float = 10000.0) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"Rotary positions need heads with an even width, got {dim}. Change width or heads.")
        self.dim = dim
        self.temperature = temperature

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin for `positions` int64 [tokens]: float32 [tokens, dim], equal for each pair 2i, 2i + 1."""
        pairs = torch.arange(0, self.dim, 2, device=positions.device, dtype=torch.float32)
        frequencies = torch.exp(pairs * (-math.log(self.temperature) / self.dim))
        angles = positions.to(torch.float32)[:, None] * frequencies
        return angles.cos().repeat_interleave(2, dim=-1), angles.sin().repeat_interleave(2, dim=-1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, temperature={self.temperature}"


class SwiGLU(nn.Module):
    """w3(a * silu(g)) with [a, g] = w12(x) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim, bias=bias)
        self.w3 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w3(device.swiglu_linear(x, self.w12))


class ReLUSquared(nn.Module):
    """relu(x) ** 2 (Primer, https://arxiv.org/abs/2109.08668). Arguments are accepted as by other activations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu().square()


def build_mlp(mlp_type: str, width: int, mlp_ratio: float, bias: bool) -> nn.Module:
    """Build the feed-forward half of a block: SwiGLU, or two layers with GELU ("mlp") or ReLUSquared ("relu2")."""
    expect("mlp_type", mlp_type, MLP_TYPES)
    hidden = int(width * mlp_ratio)
    if mlp_type == "swiglu":
        return SwiGLU(width, hidden, bias=bias)
    layers: list[tuple[str, nn.Module]] = [
        ("c_fc", nn.Linear(width, hidden, bias=bias)),
        ("act", GELU() if mlp_type == "mlp" else ReLUSquared()),
        ("c_proj", nn.Linear(hidden, width, bias=bias)),
    ]
    return nn.Sequential(OrderedDict(layers))
