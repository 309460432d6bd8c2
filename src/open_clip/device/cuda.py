"""NVIDIA and AMD GPUs."""

from __future__ import annotations

from typing import ClassVar

import torch

from . import npu_loading, peaks
from .base import Device


class CudaDevice(Device):
    type = "cuda"
    backend = "nccl"
    fused_adamw_skips = True
    packs_sequences = True
    peaks = peaks.NVIDIA_PEAKS
    variables = (
        "CUDA_VISIBLE_DEVICES",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "CUBLAS_WORKSPACE_CONFIG",
        "NCCL_DEBUG",
        "NCCL_SOCKET_IFNAME",
        "NCCL_ALGO",
    )
    # cuBLAS: see "Results reproducibility" in CUDA's documentation. NCCL: NVLink switches reduce in no fixed order
    # (Megatron-LM's --deterministic-mode excludes them, too).
    deterministic_env: ClassVar[dict[str, str]] = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "^NVLS,NVLSTree"}
    deterministic_switches = (*Device.deterministic_switches, "torch.backends.cudnn.deterministic")
    hints = (
        *Device.hints,
        (
            r"Duplicate GPU detected",
            "Two processes use one GPU. Start at most one per GPU, and give --device without an index.",
        ),
        (
            r"Watchdog caught collective operation timeout",
            "Another rank stopped or is late: look for the first error in the logs of the other ranks. If long waits "
            "are expected, raise --dist-timeout.",
        ),
        (
            r"ncclSystemError|ncclRemoteError|unhandled system error",
            "NCCL_DEBUG=INFO logs the reason. If a host has several networks, choose one with NCCL_SOCKET_IFNAME.",
        ),
    )

    def is_available(self) -> bool:
        return not npu_loading.replaces_cuda() and super().is_available()

    def why_missing(self) -> str | None:
        if self.is_available():
            return None
        if npu_loading.replaces_cuda():
            return "torch_npu's transfer_to_npu has replaced CUDA: 'cuda' means npu, and 'nccl' means hccl."
        if torch.version.cuda is None and torch.version.hip is None:
            return f"torch {torch.__version__} is built without CUDA: install a CUDA build (pytorch.org/get-started)."
        return "No CUDA device is visible: does `nvidia-smi` list one, and does CUDA_VISIBLE_DEVICES hide it?"

    def software(self) -> dict[str, str]:
        return {"CUDA": torch.version.cuda} if torch.version.cuda else {}

    def set_deterministic(self) -> None:
        super().set_deterministic()
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False  # it may choose other algorithms in each run, by their time

    def set_fast_matmul(self, enabled: bool) -> None:
        torch.set_float32_matmul_precision("high" if enabled else "highest")
        torch.backends.cudnn.allow_tf32 = enabled
