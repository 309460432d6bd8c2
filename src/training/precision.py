"""Precisions of a run (--precision): dtypes, support by devices, autocast and gradient scaler.

amp*: weights in fp32, autocast to half precision. bf16, fp16: weights in half precision, normalization in fp32 (done by
the model). pure_*: everything in half precision.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import open_clip
from open_clip import device as devices
from open_clip.precision import PRECISIONS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """The precision of a run on one type of device. `create` makes it; everything that needs a dtype gets the object.

    Attributes:
        name: one of PRECISIONS.
        device: the device of the model.
    """

    name: str
    device: torch.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return dtype_of(self.name, self.device)

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of most weights."""
        return weights_dtype(self.name)

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The dtype of images; None: keep theirs."""
        return open_clip.get_input_dtype(self.name)

    @property
    def is_autocast(self) -> bool:
        return _is_autocast(self.name)

    @property
    def converts_weights_once(self) -> bool:
        """Whether weights are converted once per step instead of by autocast at each use, see `half_weights`."""
        return self.is_autocast and devices.get(self.device).converts_weights_once

    def autocast(self) -> contextlib.AbstractContextManager:
        """Create the context for forward passes and losses. It has no effect unless the precision is amp*."""
        if not self.is_autocast:
            return contextlib.nullcontext()
        return devices.get(self.device).autocast(self.compute_dtype)

    def grad_scaler(self, **kwargs: Any) -> Any:
        """Create a gradient scaler. It is disabled unless the precision is "amp" and the device computes in fp16."""
        scaler = devices.get(self.device).grad_scaler(**kwargs) if self.name == "amp" else None
        return DisabledScaler() if scaler is None else scaler


def create(name: str | None, device: str | torch.device) -> Precision:
    """Create the precision with this name, or the default of the device for None.

    Raises:
        ValueError: the precision is unknown, or the device does not support it.
    """
    device = torch.device(device)
    kind = devices.get(device)
    if name is None:
        return Precision(kind.default_precision, device)
    dtype = dtype_of(name, device)
    if not kind.supports(dtype):
        raise ValueError(
            f"Precision {name!r} needs {dtype}, which {device} does not support. "
            f"Use one of {', '.join(available(device))}."
        )
    if name == "amp" and dtype is torch.bfloat16:
        logger.info("Precision amp on %s is autocast to bfloat16, without a gradient scaler.", kind.type)
    return Precision(name, device)


class DisabledScaler:
    """A gradient scaler that does not scale. torch.compile can trace it, unlike a disabled one of torch."""

    def is_enabled(self) -> bool:
        return False

    def get_scale(self) -> float:
        return 1.0

    def scale(self, outputs: Any) -> Any:
        return outputs

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        return optimizer.step(*args, **kwargs)

    def update(self, new_scale: Any = None) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


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


def get_autocast(
    precision: str, device_type: str | torch.device = "auto"
) -> Callable[[], contextlib.AbstractContextManager]:
    """Return a function that makes a context for forward passes: autocast for amp*, else one without effect."""
    if device_type == "auto":
        device_type = devices.best()
    dtype = dtype_of(precision, device_type)
    if not _is_autocast(precision):
        return contextlib.nullcontext
    return functools.partial(devices.get(device_type).autocast, dtype)


def _is_autocast(precision: str) -> bool:
    return precision.startswith("amp")
