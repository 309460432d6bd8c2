"""What the rest of the package may ask of a kind of device; the base class is an accelerator that torch supports."""
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

from . import peaks


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
    """GELU by erf, made of elementary operators, for devices on which F.gelu is another function."""
    return 0.5 * x * (1.0 + torch.erf(x * 0.5**0.5))


class Device:
    """One kind of device. The base is an accelerator whose functions are in the module `torch.<type>`."""

    type: ClassVar[str]
    backend: ClassVar[str]  # of its collectives
    collective_env: ClassVar[dict[str, str]] = {}  # set before the process group is made, where the user has not
    default_precision: ClassVar[str] = "amp"
    pin_memory: ClassVar[bool] = True  # host memory pinned for it makes copies asynchronous
    # torch.optim.AdamW(fused=True) leaves everything as it is if its `found_inf` is set: known from the kernel's source
    fused_adamw_skips: ClassVar[bool] = False
    indexed: ClassVar[bool] = True  # there can be several: "cuda:1"
    peaks: ClassVar[tuple[peaks.Peak, ...]] = ()
    variables: ClassVar[tuple[str, ...]] = ()  # of the environment, that change what it does: for reports
    text_group_cost: ClassVar[int] = 4096  # tokens, see text_groups: several hundred launches
    converts_weights_once: ClassVar[bool] = False  # per step, which saves launches: see training.half_weights
    deterministic_env: ClassVar[dict[str, str]] = {}  # set by `set_deterministic`, where the user has not
    deterministic_switches: ClassVar[tuple[str, ...]] = ("torch.use_deterministic_algorithms",)
    # Regular expression searched in the text of an error.
    out_of_memory: ClassVar[str] = r"(?i)out of memory|can't allocate memory"
    # (regular expression searched in the text of an error, what to do about it)
    hints: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"does not have a deterministic implementation", "Without --deterministic the run goes on, not reproducibly."),
    )

    def __repr__(self) -> str:
        return f"<device {self.type}>"

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
        """What is wrong with the software of this device although it may run, each with how to fix it."""
        return []

    def environment_errors(self) -> list[str]:
        """Environment variables that end a run on this device, a sentence each with how to fix it."""
        return []

    def environment_warnings(self) -> list[str]:
        """Environment variables that contradict each other or are out of range, a sentence each."""
        return []

    def notes(self) -> list[str]:
        """What the log of a run on this device should mention, a sentence each."""
        return []

    def why_not_compile(self) -> str | None:
        """What torch.compile lacks on this device and how to get it, in a sentence; None where nothing is known."""
        if importlib.util.find_spec("triton") is None:
            return (
                f"torch.compile on {self.type} needs the package triton, which is not installed. Install the version "
                f"that torch {torch.__version__} was built for, or leave out --torchcompile."
            )
        if sys.platform.startswith("linux") and "CC" not in os.environ and not _find_command("gcc", "clang"):
            return f"torch.compile on {self.type} needs a C compiler: install gcc, or name one by the variable CC."
        return None

    def hint(self, error_text: str) -> str | None:
        """What to do about an error, by the codes in its text; None for an error without a known code."""
        return next((advice for pattern, advice in self.hints if re.search(pattern, error_text)), None)

    @property
    def saturates(self) -> bool:
        """Whether fp16 overflows become the largest number and NaN becomes 0, so that `isfinite` does not see them.

        Only the gradient scaler of such a device learns of an overflow, from the device's status flag.
        """
        return False

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

    # Determinism

    def set_deterministic(self) -> None:
        """Make operators and collectives give the same bits for the same input, run after run.

        To be called before the process group exists and before the device is used. An operator that has no
        deterministic form raises RuntimeError: with warn_only, torch also keeps the non-deterministic backward pass
        of its memory-efficient attention.

        Raises:
            ValueError: an environment variable says the opposite.
        """
        torch.use_deterministic_algorithms(True)
        # Filling fresh memory is for finding reads of uninitialised values, and costs a kernel for each tensor.
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False
        for name, value in self.deterministic_env.items():
            os.environ.setdefault(name, value)

    def deterministic_settings(self) -> str:
        """What `set_deterministic` has set, for the log."""
        variables = [f"{name}={os.environ.get(name, '')}" for name in self.deterministic_env]
        return ", ".join([*self.deterministic_switches, *variables])

    # Speed

    def adamw(self, groups: Iterable[Any], form: str = "auto", **options: Any) -> torch.optim.Optimizer:
        """AdamW that works together with this device's `grad_scaler`.

        Args:
            groups: parameters or their groups, on the device.
            form: "torch": torch's fused kernel; "off": torch's foreach kernels or loop; "npu": torch_npu's (see
                npu_adamw); "auto": "torch" if it can skip a step on this device, else "off".
            options: lr, betas, eps, weight_decay.

        Raises:
            ValueError: the device does not have this form.
        """
        if form == "npu":
            raise ValueError(
                f"torch_npu's fused AdamW runs on an NPU only, and this is {self.type}: use --fused-optimizer auto."
            )
        fused = form == "torch" or (form == "auto" and self.fused_adamw_skips)
        # fused=None leaves the choice between foreach and a loop to torch.
        return torch.optim.AdamW(groups, fused=fused or None, **options)

    def peak_flops(self, dtype: torch.dtype, index: int | None = None) -> float | None:
        """Dense matrix-multiplication peak in FLOP/s; None where the table has no such chip or no unit for `dtype`."""
        if not self.peaks or not self.is_available():
            return None
        field = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype)
        peak = peaks.find(self.peaks, self.name(index))
        tera = getattr(peak, field) if peak and field else None
        return tera * 1e12 if tera else None

    def peak_source(self, index: int | None = None) -> str:
        """Where `peak_flops` is from, for the log."""
        return "the table in open_clip/device/peaks.py"

    def fused_ops(self, index: int | None = None) -> dict[str, str | None]:
        """Why each fused operator that a chip may lack does not work, by name; None where it does. Tries them once."""
        return {}

    def layer_norm(
        self,
        x: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        """Layer norm that returns the dtype of `x`, with statistics in float32 under autocast."""
        return F.layer_norm(x, normalized_shape, weight, bias, eps).to(x.dtype)

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)

    def gelu(self, x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        return F.gelu(x, approximate=approximate)

    def attention(self, inputs: AttentionInputs) -> torch.Tensor:
        """See `ops.attention`."""
        query, key, value = _split_inputs(inputs)
        out = F.scaled_dot_product_attention(
            query, key, value, inputs.attn_mask, inputs.dropout_p, inputs.is_causal, scale=inputs.scale
        )
        return out if inputs.num_heads is None else merge_heads(out)

    def profiler(self, folder: str, wait: int = 1, warmup: int = 1, active: int = 3, level: int = 0) -> Any:
        """A context manager with `step()` that traces `active` steps, once, into `folder` for TensorBoard.

        level: 0: times and memory; 1: also the operators' input shapes; 2: also the Python stacks.
        """
        activities = [torch.profiler.ProfilerActivity.CPU]
        own = getattr(torch.profiler.ProfilerActivity, self.type.upper(), None)
        if own is not None and own not in activities:
            activities.append(own)
        return torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(folder),
            profile_memory=True,
            record_shapes=level >= 1,
            with_stack=level >= 2,
        )


def _find_command(*names: str) -> bool:
    """Whether one of the commands is installed."""
    return any(shutil.which(name) for name in names)


def elementary_attention(inputs: AttentionInputs) -> torch.Tensor:
    """`ops.attention` made of elementary operators."""
    query, key, value = _split_inputs(inputs)
    attn_mask = inputs.attn_mask
    # scaled before the product, which in half precision might not hold what is scaled after it
    scores = query * (query.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale) @ key.transpose(-2, -1)
    if inputs.is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    out = F.dropout(scores.softmax(dim=-1), inputs.dropout_p) @ value
    return out if inputs.num_heads is None else merge_heads(out)


def _split_inputs(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as [batch, heads, tokens, head_dim]."""
    if inputs.num_heads is None:
        return inputs.query, inputs.key, inputs.value
    query, key, value = (split_heads(x, inputs.num_heads) for x in (inputs.query, inputs.key, inputs.value))
    return query, key, value


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[(batch,) tokens, width] -> [(batch,) heads, tokens, head_dim], a view"""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """[(batch,) heads, tokens, head_dim] -> [(batch,) tokens, width]"""
    return x.transpose(-3, -2).flatten(-2)
