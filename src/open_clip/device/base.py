"""The interface of a device type. The base class is an accelerator with the module `torch.<type>`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

from . import npu_loading as npu_loading  # before torch

import torch  # isort: skip
import torch.nn.functional as F

from ..utils import exact_dtype
from . import packed, peaks


class AttentionInputs(NamedTuple):
    """The arguments of `ops.attention`, which explains them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    num_heads: int | None = None


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    """Compute the exact GELU (with erf) from elementary operators, for devices on which F.gelu is an approximation."""
    return 0.5 * x * (1.0 + torch.erf(x * 0.5**0.5))


class Device:
    """A type of device. The base class is an accelerator whose functions are in the module `torch.<type>`."""

    type: ClassVar[str]
    backend: ClassVar[str]  # collective communication backend
    collective_env: ClassVar[dict[str, str]] = {}  # defaults set before the process group is created
    default_precision: ClassVar[str] = "amp"
    pin_memory: ClassVar[bool] = True  # copies from pinned host memory are asynchronous
    # torch.optim.AdamW(fused=True) skips the step if `found_inf` is set. Known from the kernel's source.
    fused_adamw_skips: ClassVar[bool] = False
    indexed: ClassVar[bool] = True  # a host can have several: "cuda:1"
    peaks: ClassVar[tuple[peaks.Peak, ...]] = ()
    variables: ClassVar[tuple[str, ...]] = ()  # environment variables that affect it, for reports
    text_group_cost: ClassVar[int] = 4096  # in tokens, see text_groups; about the cost of several hundred launches
    # Attention over sequences that are packed one after another is faster than over padded ones, see open_clip.packing.
    packs_sequences: ClassVar[bool] = False
    # Of one more group of packed sequences: the number of (query token, key token, channel) that take the same time.
    packed_launch_cost: ClassVar[int] = 2**25
    converts_weights_once: ClassVar[bool] = False  # per step, which saves launches, see training.half_weights
    deterministic_env: ClassVar[dict[str, str]] = {}  # defaults set by `set_deterministic`
    deterministic_switches: ClassVar[tuple[str, ...]] = ("torch.use_deterministic_algorithms",)
    # A regular expression that is searched in error messages.
    out_of_memory: ClassVar[str] = r"(?i)out of memory|can't allocate memory"
    # (regular expression that is searched in error messages, advice)
    hints: ClassVar[tuple[tuple[str, str], ...]] = (
        (
            r"does not have a deterministic implementation",
            "Without --deterministic, training works but is not reproducible.",
        ),
    )

    def __repr__(self) -> str:
        return f"<device {self.type}>"

    @property
    def module(self) -> Any:
        """`torch.<type>`, or None if this torch does not have it."""
        return getattr(torch, self.type, None)

    # Availability

    def is_available(self) -> bool:
        return self.module is not None and bool(self.module.is_available())

    def why_missing(self) -> str | None:
        """Return a sentence that says what is missing and how to fix it, or None if the device is available."""
        return None if self.is_available() else f"torch {torch.__version__} finds no {self.type} device."

    def count(self) -> int:
        return int(self.module.device_count()) if self.is_available() else 0

    def name(self, index: int | None = None) -> str:
        """Return the chip's name from its driver, such as "Ascend910B3"."""
        return str(self.module.get_device_name(index))

    def software(self) -> dict[str, str]:
        """Return the versions of the device's software, for reports."""
        return {}

    def problems(self) -> list[str]:
        """Return problems of the device's software that may not stop a run, each with how to fix it."""
        return []

    def environment_errors(self) -> list[str]:
        """Return one message per error in environment variables that stops a run, with how to fix it."""
        return []

    def environment_warnings(self) -> list[str]:
        """Return one message per environment variable that is out of range or contradicts another one."""
        return []

    def notes(self) -> list[str]:
        """Return sentences for the log of a run on this device."""
        return []

    def why_not_compile(self) -> str | None:
        """Return a message that says what torch.compile lacks and how to install it, or None if nothing is known."""
        if importlib.util.find_spec("triton") is None:
            return (
                f"torch.compile on {self.type} needs the package triton, which is not installed. Install the version "
                f"for torch {torch.__version__}, or do not use --torchcompile."
            )
        if sys.platform.startswith("linux") and "CC" not in os.environ and not _has_command("gcc", "clang"):
            return f"torch.compile on {self.type} needs a C compiler: install gcc, or set CC to the path of one."
        return None

    def why_not_shard(self) -> str | None:
        """Return a message that says why FSDP2 cannot run on the device with the installed torch, or None if it can."""
        return None

    def hint(self, error_text: str) -> str | None:
        """Return advice for an error from the codes in its message, or None if it has no known code."""
        return next((advice for pattern, advice in self.hints if re.search(pattern, error_text)), None)

    @property
    def saturates(self) -> bool:
        """Whether fp16 overflows become the largest number and NaN becomes 0, so `isfinite` does not detect them.

        On such a device, only the gradient scaler can detect an overflow, from the device's status flag.
        """
        return False

    # Execution

    def set_device(self, index: int) -> None:
        self.module.set_device(index)

    def synchronize(self) -> None:
        self.module.synchronize()

    def mark(self) -> Callable[[], None]:
        """Return a function that waits until the device has finished all work queued so far. It is thread-safe."""
        event = self.module.Event()
        event.record()
        return event.synchronize

    def manual_seed(self, seed: int) -> None:
        self.module.manual_seed_all(seed)

    def rng_state(self) -> torch.Tensor:
        """Return the state of the current device's generator (uint8, on the CPU)."""
        return self.module.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.module.set_rng_state(state)

    def memory(self, index: int | None = None) -> dict[str, int]:
        """Return bytes: "allocated" by tensors, "reserved" from the driver, "peak" of allocated, "total" memory."""
        return {
            "allocated": int(self.module.memory_allocated(index)),
            "reserved": int(self.module.memory_reserved(index)),
            "peak": int(self.module.max_memory_allocated(index)),
            "total": int(self.module.get_device_properties(index or 0).total_memory),
        }

    def reset_peak_memory(self, index: int | None = None) -> None:
        self.module.reset_peak_memory_stats(index)

    def tile_elements(self, index: int | None = None) -> int:
        """Return the number of logits that the contrastive losses compute at once.

        Large tiles need few launches. It depends on the total memory, not on the free one, so that a resumed run adds
        in the same order. In float32, a tile has 1 % of the memory, at most 0.5 GiB.
        """
        return min(self.memory(index)["total"] // 400, 2**27)

    # Precision

    def supports(self, dtype: torch.dtype) -> bool:
        """Return whether the installed device can train models in this dtype."""
        if dtype == torch.bfloat16:
            return self.is_available() and bool(self.module.is_bf16_supported())
        return dtype in (torch.float32, torch.float16)

    @property
    def amp_dtype(self) -> torch.dtype:
        """The dtype of the precision "amp". float16 needs a gradient scaler."""
        return torch.float16

    def autocast(self, dtype: torch.dtype) -> contextlib.AbstractContextManager:
        return torch.autocast(self.type, dtype=dtype)

    def grad_scaler(self, **kwargs: Any) -> Any:
        """Return a new gradient scaler for fp16 autocast, or None if "amp" needs none."""
        return torch.amp.GradScaler(self.type, **kwargs)

    def set_fast_matmul(self, enabled: bool) -> None:
        """Allow fp32 matrix products in TF32 or HF32: faster, with a precision of about 3 decimal digits."""

    # Determinism

    def set_deterministic(self) -> None:
        """Make operators and collectives give the same bits for the same input in each run.

        Call this before the process group exists and before the device is used. An operator without a deterministic
        implementation then raises RuntimeError. `warn_only` is not used, because with it torch keeps the
        non-deterministic backward pass of memory-efficient attention.

        Raises:
            ValueError: an environment variable contradicts it.
        """
        torch.use_deterministic_algorithms(True)
        # Filling new memory only helps to find reads of uninitialized values, and costs one kernel per tensor.
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False
        for name, value in self.deterministic_env.items():
            os.environ.setdefault(name, value)

    def deterministic_settings(self) -> str:
        """Return the settings that `set_deterministic` has made, for the log."""
        variables = [f"{name}={os.environ.get(name, '')}" for name in self.deterministic_env]
        return ", ".join([*self.deterministic_switches, *variables])

    # Speed

    def adamw(self, groups: Iterable[Any], form: str = "auto", **options: Any) -> torch.optim.Optimizer:
        """Create an AdamW that works with this device's `grad_scaler`.

        Args:
            groups: parameters or parameter groups, on the device.
            form: "torch" for torch's fused kernel; "off" for torch's foreach kernels or loop; "npu" for torch_npu's
                fused optimizer (see npu_adamw); "auto" for "torch" if it can skip a step on this device, else "off".
            options: lr, betas, eps, weight_decay.

        Raises:
            ValueError: the device does not have this form.
        """
        if form == "npu":
            raise ValueError(
                f"torch_npu's fused AdamW needs an NPU, and this device is {self.type}. Use --fused-optimizer auto."
            )
        fused = form == "torch" or (form == "auto" and self.fused_adamw_skips)
        # fused=None leaves the choice between foreach and a loop to torch.
        return torch.optim.AdamW(groups, fused=fused or None, **options)

    def peak_flops(self, dtype: torch.dtype, index: int | None = None) -> float | None:
        """Return the dense matrix-multiplication peak in FLOP/s, or None if the table has no value for it."""
        if not self.peaks or not self.is_available():
            return None
        field = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype)
        peak = peaks.find(self.peaks, self.name(index))
        tera = getattr(peak, field) if peak and field else None
        return tera * 1e12 if tera else None

    def peak_source(self, index: int | None = None) -> str:
        """Return the source of `peak_flops`, for the log."""
        return "the table in open_clip/device/peaks.py"

    def fused_ops(self, index: int | None = None) -> dict[str, str | None]:
        """Try the fused operators that a chip may lack. Return the error of each by name, None if it works."""
        return {}

    def layer_norm(
        self,
        x: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        """Compute layer norm, with statistics in float32 under autocast. Return the dtype of `x`."""
        return F.layer_norm(x, normalized_shape, weight, bias, eps).to(x.dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `ops.rms_norm`."""
        dtype = exact_dtype(x.dtype)
        return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """See `ops.rotary`."""
        return elementary_rotary(x, cos, sin)

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        """See `ops.swiglu`."""
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)

    def swiglu_linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `ops.swiglu_linear`."""
        return self.swiglu(F.linear(x, weight, bias))

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)

    def gelu(self, x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        return F.gelu(x, approximate=approximate)

    def softplus(self, x: torch.Tensor) -> torch.Tensor:
        """Compute log(1 + exp(x))."""
        # With the default threshold of 20, the approximation would be visible in float64.
        return F.softplus(x, threshold=40)

    def attention(self, inputs: AttentionInputs) -> torch.Tensor:
        """See `ops.attention`."""
        query, key, value = _split_inputs(inputs)
        out = F.scaled_dot_product_attention(
            query, key, value, inputs.attn_mask, inputs.dropout_p, inputs.is_causal, scale=inputs.scale
        )
        return out if inputs.num_heads is None else merge_heads(out)

    def packed_attention(self, inputs: packed.PackedInputs) -> torch.Tensor:
        """See `ops.packed_attention`."""

        def attend(query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scale: float | None) -> torch.Tensor:
            return self.attention(AttentionInputs(query, key, value, mask, 0.0, is_causal, scale))

        return packed.in_buckets(inputs, self.packed_launch_cost, attend)

    def profiler(self, folder: str, wait: int = 1, warmup: int = 1, active: int = 3, level: int = 0) -> Any:
        """Create a profiler that traces `active` steps once and writes them for TensorBoard.

        Args:
            folder: where the trace is written.
            wait, warmup, active: numbers of steps, as in torch.profiler.schedule.
            level: 0 for times and memory, 1 for operators' input shapes in addition, 2 for Python stacks in addition.

        Returns:
            A context manager with the method `step()`.
        """
        activities = [torch.profiler.ProfilerActivity.CPU]
        device_activity = getattr(torch.profiler.ProfilerActivity, self.type.upper(), None)
        if device_activity is not None and device_activity not in activities:
            activities.append(device_activity)
        return torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(folder),
            profile_memory=True,
            record_shapes=level >= 1,
            with_stack=level >= 2,
        )


def _has_command(*names: str) -> bool:
    return any(shutil.which(name) for name in names)


def elementary_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute `ops.rms_norm` with elementary operators."""
    wide = x.to(exact_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight).to(x.dtype)


def elementary_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Compute `ops.rotary` with elementary operators."""
    dtype = exact_dtype(x.dtype)
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (table.to(dtype)[..., None, ::2] for table in (cos, sin))
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def elementary_attention(inputs: AttentionInputs) -> torch.Tensor:
    """Compute `ops.attention` with elementary operators."""
    query, key, value = _split_inputs(inputs)
    attn_mask = inputs.attn_mask
    # Scaled before the product, because the unscaled product may overflow in half precision.
    scores = query * (query.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale) @ key.transpose(-2, -1)
    if inputs.is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    out = F.dropout(scores.softmax(dim=-1), inputs.dropout_p) @ value
    return out if inputs.num_heads is None else merge_heads(out)


def elementary_attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Compute `elementary_attention`, in the form of packed_attention.Attend."""
    return elementary_attention(AttentionInputs(query, key, value, mask, 0.0, is_causal, scale))


def _split_inputs(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value as [batch, heads, tokens, head_dim]."""
    if inputs.num_heads is None:
        return inputs.query, inputs.key, inputs.value
    query, key, value = (split_heads(x, inputs.num_heads) for x in (inputs.query, inputs.key, inputs.value))
    return query, key, value


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return a view of [(batch,) tokens, width] as [(batch,) heads, tokens, head_dim]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """Merge [(batch,) heads, tokens, head_dim] to [(batch,) tokens, width]."""
    return x.transpose(-3, -2).flatten(-2)
