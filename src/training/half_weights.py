"""Half precision copies of the weights, made once per step instead of by autocast at each use.

Under autocast each layer casts its fp32 weights to half precision and their gradients back: two casts per weight and
step. Here one copy of a buffer converts all weights at the start of a step. During the step each transformer block runs
on its converted weights. Its gradients are converted together at the end of its backward pass, so DDP still reduces
them during the backward passes of the other blocks. The results equal those of autocast.

This is faster only on devices where launches cost more than memory traffic, because the gradients of a block are first
copied into one tensor. The device decides (`Device.converts_weights_once`). The copies need 2 bytes per parameter
during the whole run; autocast needs them during the forward and backward pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from open_clip.transformer import attention
from training import compilation
from training.flat_tensors import FlatTensors
from training.precision import Precision
from training.sharding.tensors import is_sharded_model

# Parameters that a layer passes to F.linear, where autocast would cast them.
_LINEAR_PARAMETERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight", "bias"),
    attention.Attention: ("in_proj_weight", "in_proj_bias"),
    attention.MultiheadAttention: (
        "in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight",
    ),
}  # fmt: skip


def create(
    model: nn.Module, precision: Precision, flats: Sequence[FlatTensors] = ()
) -> Callable[[], contextlib.AbstractContextManager]:
    """Return a function that makes a context for the forward and backward pass of a step.

    The context has no effect if autocast is off, if the device does not benefit, if the model is compiled (the compiler
    merges casts), or if it is sharded (weights are converted when they are gathered). Layers outside the transformer
    blocks of this package are still cast by autocast.

    Args:
        model: the bare module, already on its device.
        precision: of the run.
        flats: buffers of the optimizer that hold the parameters, if any. A buffer is converted in one launch.
    """
    if compilation.is_compiled(model) or is_sharded_model(model) or not precision.converts_weights_once:
        return contextlib.nullcontext
    return HalfWeights(model, precision.compute_dtype, flats).lent


class HalfWeights:
    """Half precision copies of the weights of transformer blocks. The blocks use them in the context of `lent`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, flats: Sequence[FlatTensors] = ()) -> None:
        """Allocate the copies. `flats`: as in `create`."""
        self._blocks: list[Any] = [module for module in model.modules() if hasattr(module, "lent_weights")]
        places = [list(_places(block)) for block in self._blocks]
        weights = list({id(weight): weight for found in places for weight in map(_parameter, found)}.values())
        self._copies = [_copy_of_buffer(flat, weights, dtype) for flat in flats]
        flat_ids = {key for copy in self._copies for key in copy.halves}
        for trained in (True, False):
            others = [w for w in weights if id(w) not in flat_ids and w.requires_grad == trained]
            if others:
                self._copies.append(_copy_of_each(others, dtype))
        halves = {key: half for copy in self._copies for key, half in copy.halves.items()}
        self._lenders = [_Lender(found, [halves[id(_parameter(place))] for place in found], dtype) for found in places]

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Convert the current weights, and let the blocks run on the copies until the end of the context."""
        for copy in self._copies:
            copy.refresh()
        for block, lender in zip(self._blocks, self._lenders, strict=True):
            block.lent_weights = lender.lend
        try:
            yield
        finally:
            for block in self._blocks:
                block.lent_weights = None


class _Copy:
    """Half precision copies of some weights. `halves` maps the id of a weight to its copy."""

    def __init__(self, weights: Sequence[Tensor], halves: Sequence[Tensor], convert: Callable[[], Any]) -> None:
        """Create it. `convert` writes the current values of `weights` to `halves`."""
        self.halves = {id(weight): half for weight, half in zip(weights, halves, strict=True)}
        self._weights = weights
        self._convert = convert
        self._versions: list[int] | None = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Convert the weights, unless they are frozen and have not changed since the last call."""
        if not any(weight.requires_grad for weight in self._weights):
            versions = [weight._version for weight in self._weights]
            if versions == self._versions:
                return
            self._versions = versions
        self._convert()


def _copy_of_buffer(flat: FlatTensors, weights: Sequence[Tensor], dtype: torch.dtype) -> _Copy:
    """Create copies of the weights that are stored in a buffer. They are converted in one launch."""
    half = torch.empty_like(flat.buffer, dtype=dtype)
    storage = flat.buffer.untyped_storage().data_ptr()
    inside = [weight for weight in weights if weight.untyped_storage().data_ptr() == storage]
    halves = [half.as_strided(weight.shape, weight.stride(), weight.storage_offset()) for weight in inside]
    return _Copy(inside, halves, functools.partial(half.copy_, flat.buffer))


def _copy_of_each(weights: Sequence[Tensor], dtype: torch.dtype) -> _Copy:
    store = FlatTensors(weights, dtype)
    return _Copy(weights, store.views, functools.partial(store.fill, weights))


Place = tuple[nn.Module, str]  # where a parameter is: its module and its name in the module


def _parameter(place: Place) -> Tensor:
    module, name = place
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def _places(block: nn.Module) -> Iterator[Place]:
    """Find the parameters of a block that autocast would cast, except those of subclassed layers."""
    for module in block.modules():
        for name in _LINEAR_PARAMETERS.get(type(module), ()):
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.dtype == torch.float32:
                yield module, name


class _Lender:
    """Replaces the weights of a block by half precision copies while the block runs."""

    def __init__(self, places: Sequence[Place], halves: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._places = [(module._parameters, name) for module, name in places]
        self._weights = [_parameter(place) for place in places]
        self._halves = list(halves)
        self._dtype = dtype
        self._device_type = halves[0].device.type if halves else ""

    @contextlib.contextmanager
    def lend(self) -> Iterator[None]:
        lent = self._lent()
        if lent is None:
            yield
            return
        for (parameters, name), half in zip(self._places, lent, strict=True):
            parameters[name] = half  # type: ignore[assignment]
        try:
            yield
        finally:
            for (parameters, name), weight in zip(self._places, self._weights, strict=True):
                parameters[name] = weight  # type: ignore[assignment]

    def _lent(self) -> Sequence[Tensor] | None:
        """Return the weights to use now; None if autocast would not cast to this dtype, so the block keeps its own."""
        kind = self._device_type
        if not kind or not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != self._dtype:
            return None
        if not torch.is_grad_enabled():
            return self._halves
        trained = [weight for weight in self._weights if weight.requires_grad]
        if not trained:
            return self._halves
        halves = [half for half, weight in zip(self._halves, self._weights, strict=True) if weight.requires_grad]
        linked = iter(_Converted.apply(halves, *trained))
        return [
            next(linked) if weight.requires_grad else half
            for half, weight in zip(self._halves, self._weights, strict=True)
        ]


class _Converted(torch.autograd.Function):
    """Connects half precision copies to their weights in the graph, as if they were cast here."""

    @staticmethod
    def forward(ctx: Any, halves: Sequence[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(half.detach() for half in halves)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [gradient for gradient in gradients if gradient is not None]
        if not given:
            return (None,) * (len(gradients) + 1)
        flat = torch.cat([gradient.reshape(-1) for gradient in given]).float()
        parts = iter(flat.split([gradient.numel() for gradient in given]))
        return None, *(None if gradient is None else next(parts).view(gradient.shape) for gradient in gradients)
