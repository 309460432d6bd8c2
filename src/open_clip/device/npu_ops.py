"""torch_npu's fused operators that a chip may lack. Each is tested once before it is used.

op-plugin documents the chips that support each operator. Other chips raise an error or compute a wrong result. Before
its first use, an operator is therefore compared with its formula on a few values, forward and backward. If it fails,
the caller uses elementary operators, and one warning is logged.

To add an operator, add an entry to FUSED_OPS, a test in tests/npu with CANN_EMULATOR_BROKEN_OPS, and at its use

    if npu_ops.is_usable("npu_fast_gelu", x.device, x.dtype):
        return torch_npu.npu_fast_gelu(x)
    return <the elementary form>
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import npu_attention, npu_loading, packed
from .base import AttentionInputs, elementary_rms_norm, elementary_rotary
from .segments import Segments

logger = logging.getLogger(__name__)

# (relative, absolute): in fp32 narrow enough to tell the exact GELU from its tanh form, and wide enough for HF32.
TOLERANCES = {torch.float32: (2e-3, 2e-4), torch.float16: (1e-2, 1e-3), torch.bfloat16: (4e-2, 4e-3)}
# Limits of npu_rotary_mul in the mode "interleave": sequences * heads and head_dim are below these (op-plugin's page).
_MAX_ROTARY_HEADS = 1000
_MAX_ROTARY_DIM = 896


@dataclass(frozen=True)
class FusedOp:
    """A fused operator and its formula.

    Args:
        run: calls the operator on NPU tensors and returns one tensor, with autograd.
        reference: the formula; called with float64 tensors on the CPU.
        inputs: creates the arguments of both as float32 tensors on the CPU, with about 64 values. They are rounded to
            the tested dtype, and all their gradients are compared. Put arguments without gradients, such as a mask,
            into `run` and `reference`.
        dtypes: the dtypes that the operator supports.
        instead: the sentence of the warning that says what is used if the operator does not work.
    """

    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: Callable[[], tuple[Tensor, ...]]
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCES)
    instead: str = "Elementary operators are used instead, which are slower."


def _library() -> Any:
    return npu_loading.torch_npu


def _activations() -> tuple[Tensor, ...]:
    return (torch.linspace(-4.0, 4.0, 64).reshape(8, 8),)


def _attention_inputs() -> tuple[Tensor, ...]:
    """Return query, key and value, [batch, tokens, heads, head_dim]."""
    return tuple(torch.linspace(0.0, 20.0, 128).add(start).sin().reshape(2, 2, 2, 16) for start in (0.0, 0.7, 1.9))


_VISIBLE = torch.tensor([[True, True], [False, True]], device="cpu")


def _run_attention(*tensors: Tensor) -> Tensor:
    """Run causal attention and attention with a mask, and add the results."""
    query, key, value = (x.transpose(1, 2) for x in tensors)
    causal = npu_attention.attend(_library(), AttentionInputs(query, key, value, is_causal=True))
    return causal + npu_attention.attend(_library(), AttentionInputs(query, key, value, _VISIBLE.to(query.device)))


def _attention_reference(*tensors: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in tensors)
    causal = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return causal + F.scaled_dot_product_attention(query, key, value, _VISIBLE)


def _packed_inputs() -> tuple[Tensor, ...]:
    """Return query, key and value of packed sequences, [tokens, heads, head_dim]."""
    return tuple(torch.linspace(0.0, 20.0, 160).add(start).sin().reshape(5, 2, 16) for start in (0.0, 0.7, 1.9))


def _run_packed(attend: Callable[[packed.PackedInputs], Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run attention and causal attention of three packed sequences, and add the results."""
    segments = Segments.of((2, 1, 2)).to(query.device)
    inputs = packed.PackedInputs(query, key, value, segments, segments)
    return attend(inputs) + attend(inputs._replace(is_causal=True))


def takes_rotary(x: Tensor) -> bool:
    """Return whether npu_rotary_mul supports x [..., tokens, heads, head_dim]."""
    return x.dim() > 2 and x.shape[-2] < _MAX_ROTARY_HEADS and x.shape[-1] < _MAX_ROTARY_DIM and x.numel() > 0


def rotate_pairs(library: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `ops.rotary` with npu_rotary_mul, for inputs that it supports (`takes_rotary`) in one dtype."""
    *batch, tokens, heads, head_dim = x.shape
    if cos.dim() > 2 or math.prod(batch) * heads >= _MAX_ROTARY_HEADS:
        # The kernel broadcasts a table over at most 1000 sequences * heads: join all tokens to one sequence.
        cos, sin = (table.expand(*batch, tokens, head_dim) for table in (cos, sin))
        batch, tokens = [], math.prod(batch) * tokens
    tables = (table.reshape(1, tokens, 1, head_dim) for table in (cos, sin))
    rotated = library.npu_rotary_mul(x.reshape(math.prod(batch), tokens, heads, head_dim), *tables, "interleave")
    return rotated.view(x.shape)


def _rotary_inputs() -> tuple[Tensor, ...]:
    """Return x [2, tokens, heads, head_dim]. The tables are constants."""
    return (torch.linspace(-4.0, 4.0, 96).reshape(2, 3, 2, 8),)


def _run_rotary(rotate: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    angles = torch.linspace(0.0, 3.0, 12, device="cpu").reshape(3, 4).repeat_interleave(2, dim=-1)
    return rotate(x, angles.cos().to(x), angles.sin().to(x))


def _norm_inputs() -> tuple[Tensor, ...]:
    return (*_activations(), torch.linspace(0.5, 2.0, 8))


FUSED_OPS: dict[str, FusedOp] = {
    "npu_fusion_attention": FusedOp(_run_attention, _attention_reference, _attention_inputs),
    "npu_fusion_attention of packed sequences": FusedOp(
        run=lambda *x: _run_packed(lambda inputs: npu_attention.attend_packed(_library(), inputs), *x),
        reference=lambda *x: _run_packed(packed.by_sequence, *x),
        inputs=_packed_inputs,
        instead="Packed sequences are padded for attention instead, which is slower.",
    ),
    "npu_rms_norm": FusedOp(
        run=lambda x, weight: _library().npu_rms_norm(x, weight, 1e-6)[0],
        reference=lambda x, weight: elementary_rms_norm(x, weight, 1e-6),
        inputs=_norm_inputs,
    ),
    "npu_rms_norm with float32 weights": FusedOp(
        run=lambda x, weight: _library().npu_rms_norm(x, weight.float(), 1e-6)[0],
        reference=lambda x, weight: elementary_rms_norm(x, weight, 1e-6),
        inputs=_norm_inputs,
        dtypes=(torch.float16, torch.bfloat16),
        instead="Its weights are rounded to half precision instead.",
    ),
    "npu_rotary_mul": FusedOp(
        run=lambda x: _run_rotary(lambda *inputs: rotate_pairs(_library(), *inputs), x),
        reference=lambda x: _run_rotary(elementary_rotary, x),
        inputs=_rotary_inputs,
        dtypes=(torch.float32,),  # the only one that ops.rotary uses
    ),
    "npu_swiglu": FusedOp(
        run=lambda x: _library().npu_swiglu(x, dim=-1),
        reference=lambda x: F.silu(x[..., :4]) * x[..., 4:],
        inputs=_activations,
    ),
    "npu_fast_gelu": FusedOp(
        run=lambda x: _library().npu_fast_gelu(x),
        reference=lambda x: x * torch.sigmoid(1.702 * x),
        inputs=_activations,
    ),
    "npu_gelu": FusedOp(
        run=lambda x: _library().npu_gelu(x, approximate="none"),
        reference=F.gelu,
        inputs=_activations,
    ),
    "native_layer_norm": FusedOp(  # half precision input with float32 weights
        run=lambda x, weight, bias: F.layer_norm(x, weight.shape, weight.float(), bias.float()),
        reference=lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
        inputs=lambda: (*_activations(), torch.linspace(0.5, 2.0, 8), torch.linspace(-1.0, 1.0, 8)),
        dtypes=(torch.float16, torch.bfloat16),
    ),
}

_failures: dict[tuple[str, str, torch.dtype], str | None] = {}  # by operator, chip and dtype; None if it works
_usable: dict[tuple[str, torch.device, torch.dtype], bool] = {}  # by device, which needs no driver call for the name
_lock = threading.Lock()


def is_usable(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this NPU supports the operator `name` of FUSED_OPS in `dtype`.

    The first call for a chip and dtype tests the operator, which waits for the device. Later calls look up the result.
    A failure is logged once. torch.compile evaluates the call while it traces and keeps the result as a constant.

    Args:
        name: key in FUSED_OPS.
        device: the NPU, with its index.
        dtype: of the input.
    """
    known = _usable.get((name, device, dtype))
    if known is not None:
        return known
    if dtype not in FUSED_OPS[name].dtypes:
        return False
    if _library().npu.is_current_stream_capturing():
        return False  # a test would break the graph capture; it is done at the next call without one
    with _lock:
        found = _usable[name, device, dtype] = find_failure(name, device, dtype) is None
    return found


# As torch.compiler.assume_constant_result does, but without importing torch._dynamo.
is_usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def find_failure(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why the operator does not work on this NPU in `dtype`, or None if it works."""
    chip = _library().npu.get_device_name(device)
    key = name, chip, dtype
    if key not in _failures:
        # Another thread does not have the caller's autograd, autocast, inference and dispatch modes.
        with ThreadPoolExecutor(1) as executor:
            _failures[key] = executor.submit(_test_operator, FUSED_OPS[name], device, dtype).result()
        if _failures[key] is not None:
            logger.warning(
                f"{name} does not work on {chip} in {str(dtype).removeprefix('torch.')}: {_failures[key]}. "
                f"{FUSED_OPS[name].instead}"
            )
    return _failures[key]


def _test_operator(op: FusedOp, device: torch.device, dtype: torch.dtype) -> str | None:
    rounded = [x.to(dtype) for x in op.inputs()]
    expected = _outputs_and_gradients(op.reference, [x.double() for x in rounded])
    try:
        found = _outputs_and_gradients(op.run, [x.to(device) for x in rounded])
    except torch.OutOfMemoryError:
        raise  # not the operator's fault
    except Exception as error:  # torch_npu raises various types for operators that the chip or CANN does not have
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    relative, absolute = TOLERANCES[dtype]
    for index, (ours, reference) in enumerate(zip(found, expected, strict=True)):
        if not torch.allclose(ours, reference, rtol=relative, atol=absolute):
            part = "output" if index == 0 else "gradient"
            return f"its {part} differs from the formula by {(ours - reference).abs().max():.2g}"
    return None


def _outputs_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradient of each input, in float64 on the CPU."""
    leaves = [x.requires_grad_() for x in inputs]
    output = function(*leaves)
    weights = torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape).to(output)
    gradients = torch.autograd.grad(output, leaves, weights)
    return [x.detach().cpu().double() for x in (output, *gradients)]
