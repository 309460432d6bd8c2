"""Names of open_clip.task of open_clip's main branch, for programs. Its task classes are not supported yet."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import aliases

__all__ = ["get_model_from_task", "unwrap_model"]
__getattr__ = aliases.of(__name__)  # says what to use instead of the task classes


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of DDP and torch.compile, or the model itself."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def get_model_from_task(task_or_model: nn.Module) -> nn.Module:
    """Return the model without wrappers, see `unwrap_model`."""
    return unwrap_model(task_or_model)
