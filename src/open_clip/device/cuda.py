"""NVIDIA and AMD GPUs."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import ClassVar

import torch

from . import npu_loading, packed, peaks
from .base import Device

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_CAPABILITY = (8, 0)
_FLASH_HEAD_DIM = 256


class CudaDevice(Device):
    type = "cuda"
    backend = "nccl"
    fused_adamw_skips = True
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

    def packed_attention(self, inputs: packed.PackedInputs) -> torch.Tensor:
        # flex_attention is not used: without torch.compile it builds all scores, and its block masks depend on the
        # lengths, so each batch would need new ones.
        varlen_attention = find_varlen_attention()
        if varlen_attention is None or not self._takes_packed(inputs):
            return super().packed_attention(inputs)
        segments, kv_segments = inputs.segments, inputs.kv_segments
        return varlen_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            segments.offsets,
            kv_segments.offsets,
            segments.max_length,
            kv_segments.max_length,
            scale=inputs.scale,
            window_size=(-1, 0) if inputs.is_causal else (-1, -1),
        )

    def _takes_packed(self, inputs: packed.PackedInputs) -> bool:
        """Return whether flash attention supports these inputs, by its README."""
        head_dim = inputs.query.shape[-1]
        return (
            inputs.query.dtype in _FLASH_DTYPES
            and inputs.query.dtype == inputs.key.dtype == inputs.value.dtype
            and inputs.key.shape == inputs.value.shape
            and head_dim % 8 == 0
            and head_dim <= _FLASH_HEAD_DIM
            and not torch.are_deterministic_algorithms_enabled()
            and self.module.get_device_capability(inputs.query.device) >= _FLASH_CAPABILITY
        )


@functools.cache
def find_varlen_attention() -> Callable[..., torch.Tensor] | None:
    """Return torch.nn.attention.varlen.varlen_attn, or None if this torch lacks it or its needed arguments."""
    try:
        found = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return found if {"scale", "window_size"} <= inspect.signature(found).parameters.keys() else None
