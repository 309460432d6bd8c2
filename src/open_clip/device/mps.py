"""Apple GPUs, through Metal Performance Shaders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .base import Device


class MpsDevice(Device):
    type = "mps"
    backend = "gloo"
    pin_memory = False  # CPU and GPU share memory
    indexed = False

    def why_missing(self) -> str | None:
        if self.is_available():
            return None
        if not torch.backends.mps.is_built():
            return f"torch {torch.__version__} is built without MPS: install torch for macOS on Apple silicon."
        return "MPS is not available: it needs macOS 12.3 or later on Apple silicon."

    def is_available(self) -> bool:
        return torch.backends.mps.is_available()

    def name(self, index: int | None = None) -> str:
        return "Apple GPU (MPS)"

    def why_not_compile(self) -> str | None:
        return None  # Metal compiles the kernels

    def set_device(self, index: int) -> None:
        pass  # there is only one

    def mark(self) -> Callable[[], None]:
        self.synchronize()  # copies are synchronous, so an event would gain nothing
        return lambda: None

    def manual_seed(self, seed: int) -> None:
        self.module.manual_seed(seed)

    def memory(self, index: int | None = None) -> dict[str, int]:
        allocated = int(self.module.current_allocated_memory())
        return {
            "allocated": allocated,
            "reserved": int(self.module.driver_allocated_memory()),
            "peak": allocated,  # Metal does not record the peak
            "total": int(self.module.recommended_max_memory()),
        }

    def reset_peak_memory(self, index: int | None = None) -> None:
        pass

    def supports(self, dtype: torch.dtype) -> bool:
        if dtype == torch.bfloat16:
            return self.is_available() and torch.backends.mps.is_macos_or_newer(14, 0)
        return super().supports(dtype)

    @property
    def amp_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.supports(torch.bfloat16) else torch.float16

    def grad_scaler(self, **kwargs: Any) -> Any:
        return None if self.amp_dtype == torch.bfloat16 else super().grad_scaler(**kwargs)
