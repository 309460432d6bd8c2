"""Norm and clipping of gradients: on the optimizer's flat buffers, on the shards of --fsdp, or tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from training.flat_adamw import FlatAdamW


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Compute the global 2-norm of the gradients of the optimizer's parameters: a scalar on the device."""
    if isinstance(optimizer, FlatAdamW):
        return optimizer.gradient_norm()
    shards: Any = getattr(optimizer, "shards", None)
    if shards is not None:
        return shards.norm()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clip the gradients of `parameters` to a global 2-norm of at most `max_norm` and return the norm before clipping.

    The formula is that of torch.nn.utils.clip_grad_norm_.
    """
    holder: Any = optimizer if isinstance(optimizer, FlatAdamW) else getattr(optimizer, "shards", None)
    if holder is None:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=2.0)
    norm = gradient_norm(optimizer)
    holder.scale_gradients((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
