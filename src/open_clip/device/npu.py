"""Huawei Ascend NPUs, through torch_npu."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from .. import torch_versions
from . import npu_adamw, npu_attention, npu_loading, npu_ops, npu_scaler, packed, peaks
from .base import AttentionInputs, Device, elementary_attention, exact_gelu

_RESULT = r"(?:error code is|runtime result =) ?"  # precedes a code in messages of torch_npu and of CANN


class NpuDevice(Device):
    """Huawei Ascend through torch_npu. Facts without a source are from the code of torch_npu and op-plugin."""

    type = "npu"
    backend = "hccl"
    # In seconds; HCCL's default is 120. The first collective may wait for a rank that downloads weights.
    collective_env: ClassVar[dict[str, str]] = {"HCCL_CONNECT_TIMEOUT": "1800"}
    # _fused_adamw_ ignores found_inf and grad_scale, and launches two kernels per parameter
    # (op_plugin/ops/opapi/FusedAdamWKernelNpuOpApi.cpp).
    fused_adamw_skips = False
    peaks = peaks.ASCEND_PEAKS
    variables = (
        "ASCEND_RT_VISIBLE_DEVICES",
        "ASCEND_LAUNCH_BLOCKING",
        "TORCH_TRANSFER_TO_NPU",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_NPU_ALLOC_CONF",
        "TASK_QUEUE_ENABLE",
        "CPU_AFFINITY_CONF",
        "ACL_DEVICE_SYNC_TIMEOUT",
        "INF_NAN_MODE_ENABLE",
        "HCCL_BUFFSIZE",
        "HCCL_CONNECT_TIMEOUT",
        "HCCL_EXEC_TIMEOUT",
        "HCCL_EVENT_TIMEOUT",
        "HCCL_DETERMINISTIC",
        "HCCL_OP_EXPANSION_MODE",
        "HCCL_IF_BASE_PORT",
        "HCCL_HOST_SOCKET_PORT_RANGE",
        "HCCL_NPU_SOCKET_PORT_RANGE",
        "HCCL_SOCKET_IFNAME",
        "TORCHINDUCTOR_NPU_BACKEND",
    )
    deterministic_env: ClassVar[dict[str, str]] = {"HCCL_DETERMINISTIC": "true"}
    # Source of the codes: CANN's acl/error_codes/rt_error_codes.h and CANN's list of error codes.
    out_of_memory = Device.out_of_memory + rf"|{_RESULT}(207001|207018)\b|\bEL0004\b"
    hints = (
        *Device.hints,
        (
            r"\bEJ0001\b",
            "EJ0001: the process that last used this NPU has not ended yet. Wait 10 s after its end, then start again. "
            "torchrun --max-restarts may restart within these 10 s, so allow 2 restarts or more.",
        ),
        (
            r"\bEI0006\b",
            "EI0006: not every rank reached the first collective within HCCL_CONNECT_TIMEOUT. Look for the first error "
            "in the logs of the other ranks, and check that the NPUs' network ports reach each other (hccn_tool).",
        ),
        (
            rf"\bE(E1002|I0002)\b|{_RESULT}(107020|507046|507047|507048)\b",
            "A wait for the NPU timed out, usually because another rank stopped or is late: look for the first error "
            "in the logs of the other ranks and in ~/ascend/log. If long waits are expected, raise HCCL_EXEC_TIMEOUT "
            "(and ACL_DEVICE_SYNC_TIMEOUT, if set).",
        ),
        (
            r"\bERR99999\b",
            "ERR99999 means only that an exception outside torch_npu ended a process. Its traceback has the cause.",
        ),
    )
    converts_weights_once = True

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
            wanted = torch_versions.release(str(torch.__version__))
            return (
                f"torch_npu is not installed. On a host with CANN, run `pip install torch_npu=={wanted}.*`, with the "
                ".postN for that CANN (docs/npu.md)."
            )
        return "No NPU is visible: does `npu-smi info` list one, and does ASCEND_RT_VISIBLE_DEVICES hide it?"

    def software(self) -> dict[str, str]:
        found = {}
        if self.library is not None:
            found["torch_npu"] = str(self.library.__version__)
        elif npu_loading.failure is not None:
            found["torch_npu"] = "installed, cannot load"
        home = _cann_home()
        if home:
            found["CANN"] = _cann_version(home)
        return found

    def problems(self) -> list[str]:
        found = []
        if npu_loading.failure is not None:
            found.append(self.why_missing() or "")
        if self.library is not None:
            version, torch_version = str(self.library.__version__), str(torch.__version__)
            if not torch_versions.is_built_for(version, torch_version):
                needed = torch_versions.release(version)
                found.append(
                    f"torch_npu {version} does not match torch {torch_version}: it requires exactly torch {needed}. "
                    f"Install that torch, or the torch_npu for this torch (docs/npu.md)."
                )
        if self.is_available() and self.name(0).startswith("Ascend310"):
            found.append(
                f"{self.name(0)} is an inference chip: torch_npu's fused optimizers support training chips only. Train "
                "on an Ascend 910."
            )
        return found

    def environment_errors(self) -> list[str]:
        found = []  # source: checks in torch_npu's libtorch_npu.so (2.13), which raise at the first use of the NPU
        if "PYTORCH_ALLOC_CONF" in os.environ and "PYTORCH_NPU_ALLOC_CONF" in os.environ:
            found.append(
                "PYTORCH_ALLOC_CONF and PYTORCH_NPU_ALLOC_CONF are both set, so torch_npu will not allocate memory. "
                "Unset one of them."
            )
        limit = _whole_number("ACL_DEVICE_SYNC_TIMEOUT")
        if limit is not None and limit <= 0:
            found.append(
                f"ACL_DEVICE_SYNC_TIMEOUT={limit} is out of range: torch_npu accepts 1 second or more. Unset it for no "
                "limit."
            )
        return found

    def environment_warnings(self) -> list[str]:
        # Sources: torch_npu's ProcessGroupHCCL.cpp (event and execution), OptionsManager.cpp (blocking); CANN's
        # documentation of the HCCL variables (connect, AIV).
        found = []
        given = _whole_number("HCCL_EXEC_TIMEOUT")
        execution = _EXECUTION_LIMIT if given is None or given < 0 else given
        event, connect = _whole_number("HCCL_EVENT_TIMEOUT"), _whole_number("HCCL_CONNECT_TIMEOUT")
        if event is not None and event > 0 and (execution == 0 or event <= execution):  # 0: no limit
            found.append(
                f"HCCL_EVENT_TIMEOUT={event} must be larger than HCCL_EXEC_TIMEOUT, which is "
                f"{execution or '0 (no limit)'}. Otherwise a late rank is reported as a failed event. Unset "
                "HCCL_EVENT_TIMEOUT to let torch_npu derive it."
            )
        if os.environ.get("HCCL_OP_EXPANSION_MODE") == "AIV" and (given or 0) > _EXECUTION_LIMIT_AIV:
            found.append(
                f"HCCL_EXEC_TIMEOUT={given} is more than the {_EXECUTION_LIMIT_AIV} seconds that CANN allows with "
                "HCCL_OP_EXPANSION_MODE=AIV. Lower it, or choose another mode."
            )
        if connect is not None and not 120 <= connect <= 7200:
            found.append(f"HCCL_CONNECT_TIMEOUT={connect} is out of range: CANN accepts 120 to 7200 seconds.")
        if os.environ.get("ASCEND_LAUNCH_BLOCKING", "0") != "0":
            found.append(
                "ASCEND_LAUNCH_BLOCKING is set: the host waits for each operator, and TASK_QUEUE_ENABLE has no effect. "
                "It is for debugging; unset it for training."
            )
        return found

    def notes(self) -> list[str]:
        if not npu_loading.replaces_cuda():
            return []
        return [
            "torch_npu's transfer_to_npu is on: 'cuda' means npu, 'nccl' means hccl, and torch.jit.script does nothing."
        ]

    def why_not_compile(self) -> str | None:
        backend = os.environ.get("TORCHINDUCTOR_NPU_BACKEND", "default")
        if backend != "default":
            return None  # other backends check their packages themselves
        if npu_loading.replaces_cuda():
            return (
                "torch.compile on an NPU does not find triton-ascend while torch_npu's transfer_to_npu is on. Train "
                "without transfer_to_npu, which this project does not need, or without --torchcompile."
            )
        spec = importlib.util.find_spec("triton")
        folders = (spec.submodule_search_locations or []) if spec else []
        if not any(os.path.isdir(os.path.join(folder, "backends", "ascend")) for folder in folders):
            return (
                "torch.compile on an NPU needs triton-ascend, which is not installed. Install the version for your "
                "CANN and torch_npu (pip install triton-ascend), or do not use --torchcompile."
            )
        return None

    def set_deterministic(self) -> None:
        if os.environ.get("HCCL_DETERMINISTIC", "true").lower() == "false":
            raise ValueError("--deterministic contradicts HCCL_DETERMINISTIC=false: unset one of them.")
        super().set_deterministic()

    def peak_flops(self, dtype: torch.dtype, index: int | None = None) -> float | None:
        found = self._find_peak_in_cann(index)
        if found is None:
            return super().peak_flops(dtype, index)
        # The file does not tell whether fp32 products use HF32 or the vector units.
        return found[0] if dtype in (torch.float16, torch.bfloat16) and self.supports(dtype) else None

    def peak_source(self, index: int | None = None) -> str:
        found = self._find_peak_in_cann(index)
        return super().peak_source(index) if found is None else str(found[1])

    def _find_peak_in_cann(self, index: int | None) -> tuple[float, Path] | None:
        """Return (FLOP/s of half precision products, the file of CANN that has it), or None without such a file."""
        home = _cann_home()
        if not home or not self.is_available():
            return None
        for folder in (f"{platform.machine()}-linux", "aarch64-linux", "arm64-linux", "x86_64-linux", "compiler"):
            path = Path(home, folder, "data", "platform_config", f"{self.name(index)}.ini")
            peak = peaks.of_platform_config(path) if path.is_file() else None
            if peak is not None:
                return peak, path
        return None

    @property
    def saturates(self) -> bool:
        return self.is_available() and not self.module.utils.is_support_inf_nan()

    def grad_scaler(self, **kwargs: Any) -> Any:
        # Not torch.amp.GradScaler("npu"): it has been reported to fail in update() on some versions.
        return npu_scaler.create(self.module.amp.GradScaler, self.saturates, **kwargs)

    def adamw(self, groups: Iterable[Any], form: str = "auto", **options: Any) -> torch.optim.Optimizer:
        if form == "npu":
            return npu_adamw.make_safe(self.library.optim.NpuFusedAdamW(groups, **options))
        optimizer = super().adamw(groups, form, **options)
        # torch_npu's scaler passes itself to step() of optimizers with this attribute, as AdamW(fused=True) has it, but
        # AdamW.step takes no such argument. With False, the scaler unscales before the step.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        return optimizer

    def set_fast_matmul(self, enabled: bool) -> None:
        # The defaults differ: convolutions use HF32, matrix products fp32.
        self.module.matmul.allow_hf32 = enabled
        self.module.conv.allow_hf32 = enabled

    def layer_norm(
        self,
        x: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        # Autocast would add a cast of the input to float32 and of the output back. aclnnLayerNorm supports half
        # precision with float32 weights and computes its statistics in float32 (op-plugin:
        # LayerNormKernelNpuOpApi.cpp; CANN: aclnnLayerNorm.md).
        has_weights = weight is not None and bias is not None and weight.dtype == bias.dtype == torch.float32
        if not has_weights or not npu_ops.is_usable("native_layer_norm", x.device, x.dtype):
            return super().layer_norm(x, normalized_shape, weight, bias, eps)
        with torch.autocast(self.type, enabled=False):
            return F.layer_norm(x, normalized_shape, weight, bias, eps)

    def fused_ops(self, index: int | None = None) -> dict[str, str | None]:
        device = torch.device(self.type, index or 0)
        half = torch.float16
        return {
            name: npu_ops.find_failure(name, device, half if half in op.dtypes else op.dtypes[0])
            for name, op in npu_ops.FUSED_OPS.items()
        }

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        if not npu_ops.is_usable("npu_fast_gelu", x.device, x.dtype):
            return super().quick_gelu(x)
        return self.library.npu_fast_gelu(x)  # x * sigmoid(1.702 x) in one kernel

    def gelu(self, x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        # On an NPU, F.gelu always computes the tanh form. npu_gelu obeys `approximate`.
        if not npu_ops.is_usable("npu_gelu", x.device, x.dtype):
            return exact_gelu(x) if approximate == "none" else super().gelu(x, approximate)
        return self.library.npu_gelu(x, approximate=approximate)

    def attention(self, inputs: AttentionInputs) -> torch.Tensor:
        cast = inputs
        # Autocast does not cast for npu_fusion_attention.
        if torch.is_autocast_enabled(self.type) and inputs.query.dtype == torch.float32:
            dtype = torch.get_autocast_dtype(self.type)
            query, key, value = (x.to(dtype) for x in inputs[:3])
            cast = inputs._replace(query=query, key=key, value=value)
        is_fused = (
            npu_attention.takes(cast)
            and not torch.compiler.is_compiling()  # cached masks cannot be part of a graph
            and npu_ops.is_usable("npu_fusion_attention", cast.query.device, cast.query.dtype)
        )
        if is_fused:
            return npu_attention.attend(self.library, cast)
        return elementary_attention(cast) if npu_attention.fails_in_torch(cast) else super().attention(inputs)

    def packed_attention(self, inputs: packed.PackedInputs) -> torch.Tensor:
        is_fused = npu_attention.takes_packed(inputs) and npu_ops.is_usable(
            "npu_fusion_attention of packed sequences", inputs.query.device, inputs.query.dtype
        )
        return npu_attention.attend_packed(self.library, inputs) if is_fused else super().packed_attention(inputs)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        # The kernel computes in float32. Its page asks for one dtype; float32 weights with half precision are tried.
        is_mixed = weight.dtype == torch.float32 != x.dtype
        if is_mixed and npu_ops.is_usable("npu_rms_norm with float32 weights", x.device, x.dtype):
            return self.library.npu_rms_norm(x, weight, eps)[0]
        if not npu_ops.is_usable("npu_rms_norm", x.device, x.dtype):
            return super().rms_norm(x, weight, eps)
        return self.library.npu_rms_norm(x, weight.to(x.dtype), eps)[0]

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        # In float32: the kernel needs tables of the dtype of `x`, and op-plugin rounds others to it.
        if not npu_ops.takes_rotary(x) or not npu_ops.is_usable("npu_rotary_mul", x.device, torch.float32):
            return super().rotary(x, cos, sin)
        return npu_ops.rotate_pairs(self.library, x.float(), cos.float(), sin.float()).to(x.dtype)

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        if not npu_ops.is_usable("npu_swiglu", x.device, x.dtype):
            return super().swiglu(x)
        return self.library.npu_swiglu(x.roll(x.shape[-1] // 2, -1), dim=-1)  # the kernel needs the gate first

    def swiglu_linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # The kernel needs the gate first. Swapping the halves of the weights costs less than those of the result.
        is_cast = torch.is_autocast_enabled(self.type)
        dtype = torch.get_autocast_dtype(self.type) if is_cast else x.dtype
        if not npu_ops.is_usable("npu_swiglu", x.device, dtype):
            return super().swiglu_linear(x, weight, bias)
        size = len(weight) // 2
        weight = weight.to(dtype).roll(size, 0)
        bias = None if bias is None else bias.to(dtype).roll(size, 0)
        return self.library.npu_swiglu(F.linear(x, weight, bias), dim=-1)

    def profiler(self, folder: str, wait: int = 1, warmup: int = 1, active: int = 3, level: int = 0) -> Any:
        """See the base class. `level` is also that of torch_npu.profiler.ProfilerLevel.

        Level 1 adds metrics of the AI cores and of HCCL, level 2 those of the runtime and of the AI CPU.
        """
        npu_profiler = self.library.profiler
        config = {"profiler_level": getattr(npu_profiler.ProfilerLevel, f"Level{level}")}
        if level == 0:
            config["aic_metrics"] = npu_profiler.AiCMetrics.AiCoreNone  # torch_npu's default warns at level 0
        return npu_profiler.profile(
            activities=[npu_profiler.ProfilerActivity.CPU, npu_profiler.ProfilerActivity.NPU],
            schedule=npu_profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=npu_profiler.tensorboard_trace_handler(folder),
            profile_memory=True,
            record_shapes=level >= 1,
            with_stack=level >= 2,
            experimental_config=npu_profiler._ExperimentalConfig(**config),
        )


# How long HCCL waits for a rank inside a collective, in seconds (CANN's documentation of HCCL_EXEC_TIMEOUT).
_EXECUTION_LIMIT = 1836
_EXECUTION_LIMIT_AIV = 1091


def _whole_number(name: str) -> int | None:
    """Return the value of an environment variable, or None if it is not set or not a whole number."""
    text = os.environ.get(name, "").strip()
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else None


def _cann_home() -> str | None:
    return os.environ.get("ASCEND_TOOLKIT_HOME") or os.environ.get("ASCEND_HOME_PATH")


def _cann_version(home: str) -> str:
    """Return the version from CANN's files, or its folder if no file has one."""
    for relative in ("version.cfg", "compiler/version.info", "runtime/version.info", "opp/version.info"):
        path = os.path.join(home, relative)
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                match = re.search(r"\b\d+\.\d+[\w.]*", file.read())
            if match:
                return match[0]
    return f"at {home}, version unknown"
