"""Intel GPUs."""

from __future__ import annotations

import torch

from .base import Device


class XpuDevice(Device):
    type = "xpu"
    backend = "xccl"
    fused_adamw_skips = True

    def why_missing(self) -> str | None:
        if self.is_available():
            return None
        if getattr(torch.version, "xpu", None) is None:
            return f"torch {torch.__version__} is built without XPU: install an XPU build (pytorch.org/get-started)."
        return "No XPU is visible: does `sycl-ls` list one, and does ZE_AFFINITY_MASK hide it?"

    def software(self) -> dict[str, str]:
        version = getattr(torch.version, "xpu", None)
        return {"SYCL": str(version)} if version else {}
