"""Precisions of a run (--precision): dtypes, support by devices, autocast and gradient scaler.

amp*: weights in fp32, autocast to half precision. bf16, fp16: weights in half precision, normalization in fp32 (done by
the model). pure_*: everything in half precision.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

import open_clip
from open_clip import device as devices
from open_clip.precision import PRECISIONS

logger = logging.getLogger(__name__)


def dtype_of(precision: str, device: str | torch.device) -> torch.dtype:
    """Return the dtype of matrix products. That of "amp" depends on the device."""
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}. Use one of {', '.join(PRECISIONS)}.")
    if precision == "amp":
        return devices.get(device).amp_dtype
    if precision == "fp32":
        return torch.float32
    return torch.float16 if precision.endswith("fp16") else torch.bfloat16


def weights_dtype(precision: str | None) -> torch.dtype:
    """Return the dtype of most weights. None, the default of the device, means float32."""
    return open_clip.get_input_dtype(precision or "fp32") or torch.float32


def available(device: str | torch.device) -> list[str]:
    """Return the precisions that the device supports."""
    kind = devices.get(device)
    return [precision for precision in PRECISIONS if kind.supports(dtype_of(precision, device))]


def resolve(precision: str | None, device: str | torch.device) -> str:
    """Return the given precision after checking it, or the default of the device.

    Raises:
        ValueError: the precision is unknown, or the device does not support it.
    """
    kind = devices.get(device)
    if precision is None:
        return kind.default_precision
    dtype = dtype_of(precision, device)
    if not kind.supports(dtype):
        raise ValueError(
            f"Precision {precision!r} needs {dtype}, which {device} does not support. "
            f"Use one of {', '.join(available(device))}."
        )
    if precision == "amp" and dtype is torch.bfloat16:
        logger.info("Precision amp on %s is autocast to bfloat16, without a gradient scaler.", kind.type)
    return precision


def get_autocast(
    precision: str, device_type: str | torch.device = "auto"
) -> Callable[[], contextlib.AbstractContextManager]:
    """Return a function that makes a context for forward passes: autocast for amp*, else one without effect."""
    if device_type == "auto":
        device_type = devices.best()
    dtype = dtype_of(precision, device_type)
    if not precision.startswith("amp"):
        return contextlib.nullcontext
    return functools.partial(devices.get(device_type).autocast, dtype)


def grad_scaler(precision: str, device: str | torch.device, **kwargs: Any) -> Any:
    """Create a gradient scaler for the precision "amp"; None for other precisions."""
    return devices.get(device).grad_scaler(**kwargs) if precision == "amp" else None
