"""Batches on their way to the device: dicts of tensors and of names, whatever loader they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(
    batch: Mapping[str, Any] | Sequence[Any],
    device: torch.device,
    input_dtype: torch.dtype | None = None,
    names: Sequence[str] = ("image", "text"),
) -> dict[str, Any]:
    """The batch on `device`, its floating point tensors in `input_dtype` (None: as they come); the host does not wait.

    What is no tensor, as the samples' names, stays what it is.

    names: of the members of a tuple, which loaders of scripts written for open_clip_train give.
    """
    named = batch if isinstance(batch, Mapping) else dict(zip(names, batch, strict=False))
    return {
        name: value.to(device, input_dtype if value.is_floating_point() else None, non_blocking=True)
        if isinstance(value, Tensor)
        else value
        for name, value in named.items()
    }
