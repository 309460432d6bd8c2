"""Every fact about a kind of device, one row each; the rest of the package asks this table and never a device's name.

Import this module before torch. Where torch_npu is installed but CANN's environment is not sourced, `import torch`
itself raises, because torch loads the backend it finds; here the backend is loaded after torch, and a failure is one
warning. Nothing is asked of a driver while this module is imported.

Adding a device is adding a row: a subclass of `DeviceRow` and its instance in `ROWS`.
"""
from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, ClassVar

from . import chips, torch_versions

logger = logging.getLogger(__name__)

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def _import_torch() -> tuple[ModuleType | None, str | None]:
    """Imports torch, then torch_npu where it is installed: (torch_npu or None, why it could not load or None)."""
    if importlib.util.find_spec("torch_npu") is None:
        return None, None
    before = os.environ.get(_AUTOLOAD)  # "1" is what torch_npu leaves to the processes started from its own
    os.environ[_AUTOLOAD] = "0"
    import torch  # noqa: F401  first without the backend, so that a broken one cannot take torch down with it

    try:
        # torch_npu prints a warning where CANN's variables are not set; stdout is for the tables and JSON of commands.
        with contextlib.redirect_stdout(sys.stderr):
            import torch_npu
    except Exception as error:  # a missing library, an undefined symbol, a version check: each has its own type
        # The variable stays set: processes started from this one must survive their `import torch`, too.
        reason = f"{type(error).__name__}: {error}"
        logger.warning("torch_npu is installed but cannot load (%s), so the NPU is not used. %s", reason, _NPU_CURE)
        return None, reason
    if before is None:
        del os.environ[_AUTOLOAD]
    else:
        os.environ[_AUTOLOAD] = before
    return torch_npu, None


_NPU_CURE = (
    "Source CANN's environment before starting python (source /usr/local/Ascend/ascend-toolkit/set_env.sh) and install "
    "the torch_npu for this torch, the same to all three numbers; `python -m training.doctor` says more."
)
_torch_npu, _torch_npu_failure = _import_torch()

import torch  # noqa: E402  must come after the guard above
import torch.nn.functional as F  # noqa: E402


class DeviceRow:
    """One kind of device. The base is an accelerator whose functions are in the module `torch.<type>`."""

    type: ClassVar[str]
    backend: ClassVar[str]  # of its collectives
    collective_env: ClassVar[dict[str, str]] = {}  # set before the process group is made, where the user has not
    default_precision: ClassVar[str] = "amp"
    pin_memory: ClassVar[bool] = True  # host memory pinned for it makes copies asynchronous
    fused_adamw: ClassVar[bool] = True  # torch.optim.AdamW(fused=True) is the best choice on it
    indexed: ClassVar[bool] = True  # there can be several: "cuda:1"
    peaks: ClassVar[tuple[chips.Peak, ...]] = ()
    variables: ClassVar[tuple[str, ...]] = ()  # of the environment, that change what it does: for reports

    def __repr__(self) -> str:
        return f"<device row {self.type}>"

    @property
    def module(self) -> Any:
        """`torch.<type>`; None where this torch does not have it."""
        return getattr(torch, self.type, None)

    # What is there

    def is_available(self) -> bool:
        return self.module is not None and bool(self.module.is_available())

    def why_missing(self) -> str | None:
        """What is missing and how to mend it, in a sentence; None where the device is there."""
        return None if self.is_available() else f"torch {torch.__version__} finds no {self.type} device."

    def count(self) -> int:
        return int(self.module.device_count()) if self.is_available() else 0

    def name(self, index: int | None = None) -> str:
        """The chip's name as its driver gives it, such as "Ascend910B3"."""
        return str(self.module.get_device_name(index))

    def software(self) -> dict[str, str]:
        """Versions of what drives the device, for reports."""
        return {}

    def problems(self) -> list[str]:
        """What is wrong with the software of this device although it may run, each with its mend."""
        return []

    # Running on it

    def set_device(self, index: int) -> None:
        self.module.set_device(index)

    def synchronize(self) -> None:
        self.module.synchronize()

    def mark(self) -> Callable[[], None]:
        """A function that returns when the device has done what is queued by now; any thread may call it."""
        event = self.module.Event()
        event.record()
        return event.synchronize

    def manual_seed(self, seed: int) -> None:
        self.module.manual_seed_all(seed)

    def rng_state(self) -> torch.Tensor:
        """State of the current device's generator (uint8, on the CPU)."""
        return self.module.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.module.set_rng_state(state)

    def memory(self, index: int | None = None) -> dict[str, int]:
        """Bytes: allocated by tensors, reserved from the driver, peak of allocated, total of the device."""
        return {
            "allocated": int(self.module.memory_allocated(index)),
            "reserved": int(self.module.memory_reserved(index)),
            "peak": int(self.module.max_memory_allocated(index)),
            "total": int(self.module.get_device_properties(index or 0).total_memory),
        }

    def reset_peak_memory(self, index: int | None = None) -> None:
        self.module.reset_peak_memory_stats(index)

    # Precision

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether models can be trained in this dtype on the device present."""
        if dtype == torch.bfloat16:
            return self.is_available() and bool(self.module.is_bf16_supported())
        return dtype in (torch.float32, torch.float16)

    @property
    def amp_dtype(self) -> torch.dtype:
        """What the precision "amp" computes in: float16 where a gradient scaler exists, which it needs."""
        return torch.float16

    def autocast(self, dtype: torch.dtype) -> contextlib.AbstractContextManager:
        return torch.autocast(self.type, dtype=dtype)

    def grad_scaler(self, **kwargs: Any) -> Any:
        """A new gradient scaler for fp16 autocast; None where "amp" needs none."""
        return torch.amp.GradScaler(self.type, **kwargs)

    def set_fast_matmul(self, enabled: bool) -> None:
        """fp32 products in a format of fewer mantissa bits (TF32, HF32): faster, about 3 decimal digits."""

    # Speed

    def adamw(self, groups: Iterable[Any], form: str = "auto", **options: Any) -> torch.optim.Optimizer:
        """AdamW that works together with this row's `grad_scaler`.

        Args:
            groups: parameters or their groups, on the device.
            form: "auto": what is best here; "torch": torch's one kernel; "off": torch's several; "npu": torch_npu's
                (see training.combined_adamw on what it takes).
            options: lr, betas, eps, weight_decay.

        Raises:
            ValueError: the device does not have this form.
        """
        if form == "npu":
            raise ValueError(
                f"torch_npu's fused AdamW runs on an NPU only, and this is {self.type}: use --fused-optimizer auto."
            )
        fused = form == "torch" or (form == "auto" and self.fused_adamw)
        # fused=None leaves the choice between foreach and a loop to torch.
        return torch.optim.AdamW(groups, fused=fused or None, **options)

    def peak_flops(self, dtype: torch.dtype, index: int | None = None) -> float | None:
        """Dense matrix-multiplication peak in FLOP/s; None where the table has no such chip or no unit for `dtype`."""
        if not self.peaks or not self.is_available():
            return None
        field = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype)
        peak = chips.find(self.peaks, self.name(index))
        tera = getattr(peak, field) if peak and field else None
        return tera * 1e12 if tera else None

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)

    def gelu(self, x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        return F.gelu(x, approximate=approximate)

    def profiler(self, folder: str, wait: int = 1, warmup: int = 1, active: int = 3) -> Any:
        """A context manager with `step()` that traces `active` steps, once, into `folder` for TensorBoard."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        own = getattr(torch.profiler.ProfilerActivity, self.type.upper(), None)
        if own is not None and own not in activities:
            activities.append(own)
        return torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(folder),
            profile_memory=True,
        )


class CpuRow(DeviceRow):
    type = "cpu"
    backend = "gloo"
    default_precision = "fp32"  # bf16 autocast halves the speed of a CPU without AMX
    pin_memory = False
    indexed = False

    def is_available(self) -> bool:
        return True

    def count(self) -> int:
        return 1

    def name(self, index: int | None = None) -> str:
        return f"CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"

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
        """Of this process; {} where the system does not tell."""
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
        pass  # the kernel's high-water mark is the process's own

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)

    @property
    def amp_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def grad_scaler(self, **kwargs: Any) -> None:
        return None


class CudaRow(DeviceRow):
    type = "cuda"
    backend = "nccl"
    peaks = chips.NVIDIA_PEAKS
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


class NpuRow(DeviceRow):
    """Huawei Ascend through torch_npu; the sources of what is here are torch_npu's and op-plugin's own code."""

    type = "npu"
    backend = "hccl"
    # Seconds (120 by default): the first collective may wait for a rank that downloads weights.
    collective_env: ClassVar[dict[str, str]] = {"HCCL_CONNECT_TIMEOUT": "1800"}
    fused_adamw = False  # runs, but nobody has measured it against the foreach form yet: --fused-optimizer chooses it
    peaks = chips.ASCEND_PEAKS
    variables = (
        "ASCEND_RT_VISIBLE_DEVICES", "PYTORCH_NPU_ALLOC_CONF", "TASK_QUEUE_ENABLE", "CPU_AFFINITY_CONF",
        "HCCL_BUFFSIZE", "HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT",
    )

    @property
    def library(self) -> Any:
        return _torch_npu

    def is_available(self) -> bool:
        return self.library is not None and super().is_available()

    def why_missing(self) -> str | None:
        if self.is_available():
            return None
        if _torch_npu_failure is not None:
            return f"torch_npu is installed but cannot load ({_torch_npu_failure}). {_NPU_CURE}"
        if self.library is None:
            wanted = torch_versions.release(str(torch.__version__))
            return (
                f"torch_npu is not installed: on a host with CANN, `pip install torch_npu=={wanted}.*`, with the "
                ".postN for that CANN (docs/npu.md)."
            )
        return "No NPU is visible: does `npu-smi info` list one, and does ASCEND_RT_VISIBLE_DEVICES hide it?"

    def software(self) -> dict[str, str]:
        found = {}
        if self.library is not None:
            found["torch_npu"] = str(self.library.__version__)
        elif _torch_npu_failure is not None:
            found["torch_npu"] = "installed, cannot load"
        home = os.environ.get("ASCEND_TOOLKIT_HOME") or os.environ.get("ASCEND_HOME_PATH")
        if home:
            found["CANN"] = _cann_version(home)
        return found

    def problems(self) -> list[str]:
        found = []
        if _torch_npu_failure is not None:
            found.append(self.why_missing() or "")
        if self.library is not None:
            own, there = str(self.library.__version__), str(torch.__version__)
            if not torch_versions.is_built_for(own, there):
                needed = torch_versions.release(own)
                found.append(
                    f"torch_npu {own} does not match torch {there}: its wheels require torch {needed}, to all three "
                    f"numbers. Install that torch or the torch_npu for this one (docs/npu.md)."
                )
        return found

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

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return super().quick_gelu(x)
        return self.library.npu_fast_gelu(x)  # x * sigmoid(1.702 x) in one kernel

    def gelu(self, x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        # F.gelu computes the tanh form there whatever is asked; this operator does as it is told.
        return self.library.npu_gelu(x, approximate=approximate)

    def profiler(self, folder: str, wait: int = 1, warmup: int = 1, active: int = 3) -> Any:
        npu_profiler = self.library.profiler
        return npu_profiler.profile(
            activities=[npu_profiler.ProfilerActivity.CPU, npu_profiler.ProfilerActivity.NPU],
            schedule=npu_profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=npu_profiler.tensorboard_trace_handler(folder),
            profile_memory=True,
        )


class MpsRow(DeviceRow):
    type = "mps"
    backend = "gloo"
    pin_memory = False  # memory is shared
    indexed = False

    def why_missing(self) -> str | None:
        if self.is_available():
            return None
        if not torch.backends.mps.is_built():
            return f"torch {torch.__version__} is built without MPS: it needs a torch for macOS on Apple silicon."
        return "MPS is not available: it needs macOS 12.3 or later on Apple silicon."

    def is_available(self) -> bool:
        return torch.backends.mps.is_available()

    def name(self, index: int | None = None) -> str:
        return "Apple GPU (MPS)"

    def set_device(self, index: int) -> None:
        pass  # there is one

    def mark(self) -> Callable[[], None]:
        self.synchronize()  # copies from it are not asynchronous: nothing is gained by an event
        return lambda: None

    def manual_seed(self, seed: int) -> None:
        self.module.manual_seed(seed)

    def memory(self, index: int | None = None) -> dict[str, int]:
        allocated = int(self.module.current_allocated_memory())
        return {
            "allocated": allocated,
            "reserved": int(self.module.driver_allocated_memory()),
            "peak": allocated,  # Metal keeps no high-water mark
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


class XpuRow(DeviceRow):
    type = "xpu"
    backend = "xccl"

    def why_missing(self) -> str | None:
        if self.is_available():
            return None
        if getattr(torch.version, "xpu", None) is None:
            return f"torch {torch.__version__} is built without XPU: install one with it (pytorch.org/get-started)."
        return "No XPU is visible: does `sycl-ls` list one, and does ZE_AFFINITY_MASK hide it?"

    def software(self) -> dict[str, str]:
        version = getattr(torch.version, "xpu", None)
        return {"SYCL": str(version)} if version else {}


# In the order of preference where nothing was asked for.
ROWS: dict[str, DeviceRow] = {row.type: row for row in (NpuRow(), CudaRow(), XpuRow(), MpsRow(), CpuRow())}
_PLAIN = ROWS["cpu"]


def _split(name: str) -> tuple[str, int | None]:
    """("npu", 3) of "npu:3"; torch.device() cannot be asked, since it does not know a backend that is not loaded."""
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", name.strip().lower())
    if match is None or match[1] not in ROWS:
        raise ValueError(f"Unknown device {name!r}: known are {', '.join(ROWS)}, with an index as in npu:0, and auto.")
    return match[1], None if match[2] is None else int(match[2])


def row(device: str | torch.device) -> DeviceRow:
    """The row of a device or of a device's name, such as "npu:3"; raises ValueError for a kind that is not known."""
    kind = device.type if isinstance(device, torch.device) else _split(device)[0]
    if kind not in ROWS:
        raise ValueError(f"Unknown device {kind!r}: known are {', '.join(ROWS)}.")
    return ROWS[kind]


def best() -> torch.device:
    """The best device present, without an index."""
    return torch.device(next(row.type for row in ROWS.values() if row.is_available()))


def as_asked(name: str | int | torch.device | None) -> torch.device:
    """`resolve`, but "npu" stays the process's current one."""
    found = resolve(name)
    return torch.device(name) if isinstance(name, (str, torch.device)) and name != "auto" else found


def resolve(name: str | int | torch.device | None = "auto", local_rank: int | None = None) -> torch.device:
    """The device that is meant: "auto" or None is the best one present; "npu" is npu:`local_rank`, or npu:0; an int is
    the accelerator of that index.

    Raises ValueError for a name that is not known, RuntimeError where the device is not there.
    """
    if name is None or name == "auto":
        kind, index = best().type, None
    elif isinstance(name, int) and not isinstance(name, bool):
        kind, index = best().type, name
        if ROWS[kind] is _PLAIN:
            raise RuntimeError(f"device={name} means an accelerator, and none is there. Use 'cpu' or 'auto'.")
    else:
        kind, index = _split(str(name))
    found = ROWS[kind]
    if not found.is_available():
        raise RuntimeError(f"Device {str(name)!r} was asked for and is not there. {found.why_missing()}")
    if not found.indexed:
        return torch.device(kind)
    if index is None:
        index = local_rank or 0
    if index >= found.count():
        raise RuntimeError(
            f"{kind}:{index} was asked for, and this host shows {found.count()} {kind} device(s): start at most that "
            "many processes on it, or name an index below that number."
        )
    return torch.device(kind, index)


# Fused operators, for every device at once

_FUSED_OPS = "OPEN_CLIP_FUSED_OPS"
_fused_ops = os.environ.get(_FUSED_OPS, "1") != "0"


def use_fused_ops(enabled: bool) -> None:
    """Whether activations and attention go through the devices' fused operators, or are made of elementary ones.

    For comparing the two, and for a fused operator that fails. OPEN_CLIP_FUSED_OPS=0 switches them off from the start.
    """
    global _fused_ops
    _fused_ops = enabled


@contextlib.contextmanager
def elementary_ops() -> Iterator[None]:
    """Within it, fused operators are switched off: for graphs that others are to read."""
    before = _fused_ops
    use_fused_ops(False)
    try:
        yield
    finally:
        use_fused_ops(before)


def _row_of(x: torch.Tensor) -> DeviceRow:
    return ROWS.get(x.device.type, _PLAIN) if _fused_ops else _PLAIN


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), OpenAI CLIP's activation (Hendrycks and Gimpel, arXiv:1606.08415), any shape and device."""
    return _row_of(x).quick_gelu(x)


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """GELU, exact (erf) or approximate="tanh", as asked on every device."""
    if not _fused_ops and approximate == "none":
        return 0.5 * x * (1.0 + torch.erf(x * 0.5**0.5))  # F.gelu is not this everywhere
    return _row_of(x).gelu(x, approximate)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """F.scaled_dot_product_attention on [batch, heads, tokens, head_dim], which has a fused kernel on most devices.

    Args:
        attn_mask: broadcastable to [batch, heads, query tokens, key tokens], True where a query may look. An additive
            float mask is accepted, too, and has no fused kernel on NPU. Excludes `is_causal`.
        dropout_p: of the weights.
        scale: of the scores; 1 / sqrt(head_dim) where None.
    """
    if _fused_ops:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    # scaled before the product, which in half precision might not hold what is scaled after it
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ value


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's or the host's memory did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


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
