"""The CPU."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from . import packed
from .base import Device


class CpuDevice(Device):
    type = "cpu"
    backend = "gloo"
    default_precision = "fp32"  # bf16 autocast halves the speed of a CPU without AMX
    pin_memory = False
    fused_adamw_skips = True
    text_group_cost = 64
    packs_sequences = True
    packed_launch_cost = 2**18
    indexed = False

    def is_available(self) -> bool:
        return True

    def count(self) -> int:
        return 1

    def name(self, index: int | None = None) -> str:
        return f"CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"

    def why_not_compile(self) -> str | None:
        # The command in torch._inductor.config.cpp.cxx.
        default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        compiler = os.environ.get("CXX", default)
        if shutil.which(compiler) is None:
            return f"torch.compile on CPU needs a C++ compiler, and {compiler!r} is not installed: install {default}."
        return None

    def why_not_shard(self) -> str | None:
        if hasattr(torch.cpu.Stream, "record_event"):
            return None
        return f"torch {torch.__version__} cannot run --fsdp on the CPU. Install a newer torch."

    def set_device(self, index: int) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def rng_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def memory(self, index: int | None = None) -> dict[str, int]:
        """Return the bytes used by this process, or {} if the system does not report them."""
        if not os.path.exists("/proc/self/statm"):
            return {}
        import resource

        page = os.sysconf("SC_PAGE_SIZE")
        with open("/proc/self/statm", encoding="ascii") as statm:
            resident = int(statm.read().split()[1]) * page
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        total = os.sysconf("SC_PHYS_PAGES") * page
        return {"allocated": resident, "reserved": resident, "peak": max(peak, resident), "total": total}

    def reset_peak_memory(self, index: int | None = None) -> None:
        pass  # the system's peak of a process cannot be reset

    def tile_elements(self, index: int | None = None) -> int:
        return 2**19  # 2 MiB in float32: three fit the cache. Smaller ones spend more time in starting threads

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)

    @property
    def amp_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def grad_scaler(self, **kwargs: Any) -> None:
        return None

    def softplus(self, x: torch.Tensor) -> torch.Tensor:
        # F.softplus uses log1p, which torch does not vectorize on CPUs: four times as slow as this. Here,
        # log1p(y) = log(1 + y) + (y - ((1 + y) - 1)) / (1 + y): the second term corrects the rounding of 1 + y.
        exponential = x.abs().neg_().exp_()
        above_one = exponential + 1
        correction = exponential.sub_(above_one - 1).div_(above_one)
        return x.clamp_min(0).add_(above_one.log_()).add_(correction)

    def packed_attention(self, inputs: packed.PackedInputs) -> torch.Tensor:
        plan = packed.make_plan(inputs, self.packed_launch_cost)
        if plan.in_buckets < plan.alone:
            return packed.in_buckets(inputs, self.packed_launch_cost)
        return packed.by_sequence(inputs)
