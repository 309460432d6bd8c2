"""Packed attention as one operator in graphs of torch.compile.

The lengths of the sequences differ from batch to batch. If the graph contained them, each batch would be compiled
again. As an operator, they are data: the operator reads them from a tensor on the CPU when it runs. Its backward pass
computes the forward pass once more, because what it saves depends on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .packed import PackedInputs
from .segments import Segments
from .table import DEVICES

_LIBRARY = torch.library.Library("open_clip", "FRAGMENT")
_SEGMENTS = ", ".join(
    f"Tensor {kind}_{name}" for kind in ("query", "kv") for name in ("host_offsets", "indices", "offsets")
)
_INPUTS = f"Tensor query, Tensor key, Tensor value, {_SEGMENTS}, bool is_causal, float? scale"
_LIBRARY.define(f"packed_attention({_INPUTS}) -> Tensor")
_LIBRARY.define(f"packed_attention_backward(Tensor gradient, {_INPUTS}) -> (Tensor, Tensor, Tensor)")


def packed_attention(inputs: PackedInputs) -> Tensor:
    """Compute `ops.packed_attention` with an operator that torch.compile does not trace into."""
    query, key, value, segments, kv_segments, is_causal, scale = inputs
    tensors = (*segments.tensors(), *kv_segments.tensors())
    return torch.ops.open_clip.packed_attention(query, key, value, *tensors, is_causal, scale)


def _inputs_of(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> PackedInputs:
    *tensors, is_causal, scale = rest
    segments = Segments.of_tensors(*tensors[:3])
    kv_segments = segments if tensors[0] is tensors[3] else Segments.of_tensors(*tensors[3:])
    return PackedInputs(query, key, value, segments, kv_segments, is_causal, scale)


def _compute(inputs: PackedInputs) -> Tensor:
    return DEVICES.get(inputs.query.device.type, DEVICES["cpu"]).packed_attention(inputs)


def _forward(*arguments: Any) -> Tensor:
    return _compute(_inputs_of(*arguments)).contiguous()


def _backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        output = _compute(_inputs_of(*leaves, *rest))
    return tuple(x.contiguous() for x in torch.autograd.grad(output, leaves, gradient))


def _forward_shape(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


def _backward_shapes(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (*ctx.saved_tensors, ctx.is_causal, ctx.scale)
    return (*torch.ops.open_clip.packed_attention_backward(gradient, *arguments), *(None,) * (len(arguments) - 3))


# Not torch.library.custom_op: its backward could not use autograd.
_LIBRARY.impl("packed_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("open_clip::packed_attention", _forward_shape, lib=_LIBRARY)
torch.library.register_fake("open_clip::packed_attention_backward", _backward_shapes, lib=_LIBRARY)
torch.library.register_autograd("open_clip::packed_attention", _gradients, setup_context=_save, lib=_LIBRARY)
