"""Numeric precisions of a run: the dtype of each, whether the device has it, autocast and gradient scaler."""
from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

import open_clip
from open_clip import device as devices

logger = logging.getLogger(__name__)

# amp*: weights in fp32, autocast to half precision. bf16, fp16: weights in half precision, normalisation in fp32 (the
# model sees to that). pure_*: everything in half precision.
PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32")


def dtype_of(precision: str, device: str | torch.device) -> torch.dtype:
    """The dtype that matrix products are computed in; "amp" is fp16 where the device has a gradient scaler for it."""
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}: known are {', '.join(PRECISIONS)}.")
    if precision == "amp":
        return devices.get(device).amp_dtype
    if precision == "fp32":
        return torch.float32
    return torch.float16 if precision.endswith("fp16") else torch.bfloat16


def weights_dtype(precision: str | None) -> torch.dtype:
    """The dtype that most weights are kept in; None, a device's default, keeps them in float32."""
    return open_clip.get_input_dtype(precision or "fp32") or torch.float32


def available(device: str | torch.device) -> list[str]:
    """The precisions that the device has."""
    kind = devices.get(device)
    return [precision for precision in PRECISIONS if kind.supports(dtype_of(precision, device))]


def resolve(precision: str | None, device: str | torch.device) -> str:
    """The precision to use: what was asked for, else the device's own default.

    Raises ValueError for a precision that is unknown, or that the device does not have, naming those it has.
    """
    kind = devices.get(device)
    if precision is None:
        return kind.default_precision
    dtype = dtype_of(precision, device)
    if not kind.supports(dtype):
        raise ValueError(
            f"Precision {precision!r} needs {dtype}, which {device} does not have. "
            f"It has: {', '.join(available(device))}."
        )
    if precision == "amp" and dtype is torch.bfloat16:
        logger.info("Precision amp on %s is autocast to bfloat16, without a gradient scaler.", kind.type)
    return precision


def get_autocast(
    precision: str, device_type: str | torch.device = "auto"
) -> Callable[[], contextlib.AbstractContextManager]:
    """A function that makes a context for forward passes: autocast for the amp precisions, else one without effect."""
    if device_type == "auto":
        device_type = devices.best()
    dtype = dtype_of(precision, device_type)
    if not precision.startswith("amp"):
        return contextlib.nullcontext
    return functools.partial(devices.get(device_type).autocast, dtype)


def grad_scaler(precision: str, device: str | torch.device, **kwargs: Any) -> Any:
    """A new gradient scaler for fp16 autocast; None for every other precision."""
    return devices.get(device).grad_scaler(**kwargs) if precision == "amp" else None
