"""Huawei Ascend NPUs, through torch_npu."""
from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from . import npu_loading, npu_ops, peaks
from .base import Device, exact_gelu


class NpuDevice(Device):
    """Huawei Ascend through torch_npu; the sources of what is here are torch_npu's and op-plugin's own code."""

    type = "npu"
    backend = "hccl"
    # Seconds (120 by default): the first collective may wait for a rank that downloads weights.
    collective_env: ClassVar[dict[str, str]] = {"HCCL_CONNECT_TIMEOUT": "1800"}
    fused_adamw = False  # runs, but nobody has measured it against the foreach form yet: --fused-optimizer chooses it
    peaks = peaks.ASCEND_PEAKS
    variables = (
        "ASCEND_RT_VISIBLE_DEVICES", "PYTORCH_NPU_ALLOC_CONF", "TASK_QUEUE_ENABLE", "CPU_AFFINITY_CONF",
        "HCCL_BUFFSIZE", "HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT",
    )

    @property
    def library(self) -> Any:
        return npu_loading.torch_npu

    def is_available(self) -> bool:
        return self.library is not None and super().is_available()

    def why_missing(self) -> str | None:
        if self.is_available():
            return None
        if npu_loading.failure is not None:
            return f"torch_npu is installed but cannot load ({npu_loading.failure}). {npu_loading.HOW_TO_FIX}"
        if self.library is None:
            return "torch_npu is not installed: `pip install torch_npu` in the version of torch, on a host with CANN."
        return "No NPU is visible: does `npu-smi info` list one, and does ASCEND_RT_VISIBLE_DEVICES hide it?"

    def software(self) -> dict[str, str]:
        found = {}
        if self.library is not None:
            found["torch_npu"] = str(self.library.__version__)
        elif npu_loading.failure is not None:
            found["torch_npu"] = "installed, cannot load"
        home = os.environ.get("ASCEND_TOOLKIT_HOME") or os.environ.get("ASCEND_HOME_PATH")
        if home:
            found["CANN"] = _cann_version(home)
        return found

    def problems(self) -> list[str]:
        found = []
        if npu_loading.failure is not None:
            found.append(self.why_missing() or "")
        if self.library is not None:
            own, wanted = str(self.library.__version__), str(torch.__version__)
            if own.split(".")[:2] != wanted.split(".")[:2]:
                found.append(
                    f"torch_npu {own} does not match torch {wanted}: the first two numbers must agree "
                    f"(pip install torch_npu=={'.'.join(wanted.split('.')[:2])}.*)."
                )
        if self.is_available() and self.name(0).startswith("Ascend310"):
            found.append(
                f"{self.name(0)} is an inference chip: torch_npu lists its fused optimizers for training chips only. "
                "Train on an Ascend 910."
            )
        return found

    @property
    def saturates(self) -> bool:
        return self.is_available() and not self.module.utils.is_support_inf_nan()

    def grad_scaler(self, **kwargs: Any) -> Any:
        # torch.amp.GradScaler("npu") has been reported to fail in update() on some stacks; torch_npu's own is at home.
        return self.module.amp.GradScaler(**kwargs)

    def adamw(self, groups: Iterable[Any], form: str = "auto", **options: Any) -> torch.optim.Optimizer:
        if form == "npu":
            return self.library.optim.NpuFusedAdamW(groups, **options)
        optimizer = super().adamw(groups, form, **options)
        # torch_npu's scaler hands itself to the step() of an optimizer that says it can unscale, as AdamW(fused=True)
        # does; but that takes no such argument. So it says no, and the scaler unscales before the step.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        return optimizer

    def set_fast_matmul(self, enabled: bool) -> None:
        # Out of the box the two differ: convolutions in HF32, products in full fp32.
        self.module.matmul.allow_hf32 = enabled
        self.module.conv.allow_hf32 = enabled

    def fused_ops(self, index: int | None = None) -> dict[str, str | None]:
        device = torch.device(self.type, index or 0)
        return {name: npu_ops.find_failure(name, device, torch.float16) for name in npu_ops.FUSED_OPS}

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        if not npu_ops.is_usable("npu_fast_gelu", x.device, x.dtype):
            return super().quick_gelu(x)
        return self.library.npu_fast_gelu(x)  # x * sigmoid(1.702 x) in one kernel

    def gelu(self, x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        # F.gelu computes the tanh form on an NPU, whatever is asked; npu_gelu computes the form that is asked for.
        if not npu_ops.is_usable("npu_gelu", x.device, x.dtype):
            return exact_gelu(x) if approximate == "none" else super().gelu(x, approximate)
        return self.library.npu_gelu(x, approximate=approximate)

    def profiler(self, folder: str, wait: int = 1, warmup: int = 1, active: int = 3) -> Any:
        npu_profiler = self.library.profiler
        return npu_profiler.profile(
            activities=[npu_profiler.ProfilerActivity.CPU, npu_profiler.ProfilerActivity.NPU],
            schedule=npu_profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=npu_profiler.tensorboard_trace_handler(folder),
            profile_memory=True,
        )


def _cann_version(home: str) -> str:
    """The version that CANN's own files tell, or its folder where they tell none."""
    for relative in ("version.cfg", "compiler/version.info", "runtime/version.info", "opp/version.info"):
        path = os.path.join(home, relative)
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                match = re.search(r"\b\d+\.\d+[\w.]*", file.read())
            if match:
                return match[0]
    return f"at {home}, version unknown"
