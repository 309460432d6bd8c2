"""NVIDIA and AMD GPUs."""
from __future__ import annotations

import torch

from . import peaks
from .base import Device


class CudaDevice(Device):
    type = "cuda"
    backend = "nccl"
    fused_adamw_skips = True
    peaks = peaks.NVIDIA_PEAKS
    variables = ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME")

    def why_missing(self) -> str | None:
        if self.is_available():
            return None
        if torch.version.cuda is None and torch.version.hip is None:
            return f"torch {torch.__version__} is built without CUDA: install one with it (pytorch.org/get-started)."
        return "No CUDA device is visible: does `nvidia-smi` list one, and does CUDA_VISIBLE_DEVICES hide it?"

    def software(self) -> dict[str, str]:
        return {"CUDA": torch.version.cuda} if torch.version.cuda else {}

    def set_fast_matmul(self, enabled: bool) -> None:
        torch.set_float32_matmul_precision("high" if enabled else "highest")
        torch.backends.cudnn.allow_tf32 = enabled
