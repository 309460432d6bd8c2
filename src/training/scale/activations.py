"""Count the bytes that autograd keeps for the backward pass, by running the model on fake tensors.

Fake tensors have shapes and dtypes but no values, so nothing is allocated or computed. Every tensor that an operator
saves for its backward pass is counted once, by its storage. Parameters and buffers are not counted, copies of them in
the dtype of autocast are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from open_clip.model_inputs import example_inputs
from open_clip.model_traits import traits_of
from training import compilation

# Fake tensors of another device abort the process if torch is built without it, or (torch 2.6) its driver is missing.
_DEVICE = "cpu"
# What accelerators compute in float32 under autocast, unlike CPUs ("CUDA Ops that autocast to float32" of torch.amp).
_IN_FLOAT32 = frozenset({
    F.layer_norm, F.group_norm, F.normalize, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, Tensor.softmax,
    Tensor.log_softmax, torch.pow, Tensor.pow, torch.norm, Tensor.norm, torch.rsqrt, Tensor.rsqrt, torch.exp,
    Tensor.exp, torch.log, Tensor.log, torch.cumsum, Tensor.cumsum, torch.sum, Tensor.sum, torch.prod, Tensor.prod,
})  # fmt: skip
_BATCHES = 2, 4  # BatchNorm in training needs at least two samples


class Bytes(NamedTuple):
    """Bytes that are `fixed` for any batch, and bytes that grow with each sample."""

    fixed: int
    per_sample: int

    def of(self, batch_size: int) -> int:
        return self.fixed + batch_size * self.per_sample


class Activations(NamedTuple):
    """What autograd keeps for the backward pass of a model.

    Attributes:
        all: without gradient checkpointing.
        checkpointed: what gradient checkpointing keeps; None if it was not counted.
        block: of the largest block, which gradient checkpointing computes again.
        embed_dim: width of the features.
        feature_itemsize: bytes per element of the features.
    """

    all: Bytes
    checkpointed: Bytes | None
    block: Bytes
    embed_dim: int
    feature_itemsize: int


def count(model: nn.Module, autocast: torch.dtype | None, checkpointing: bool = False) -> Activations:
    """Count the activations of image-text pairs with texts of full length.

    Args:
        model: with outputs by name, in training mode.
        autocast: dtype of autocast, None without it.
        checkpointing: also count with gradient checkpointing, which is switched off afterwards.

    Raises:
        NotImplementedError: a tower reads values, which fake tensors do not have, or has no gradient checkpointing.
    """
    runs = [_run(model, batch, autocast) for batch in _BATCHES]
    features = runs[0].outputs[traits_of(model).features[0]]
    blocks = [_linear(*sizes) for sizes in zip(*(run.blocks for run in runs), strict=True)]
    checkpointed = None
    if checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
        try:
            checkpointed = _linear(*(_run(model, batch, autocast).total for batch in _BATCHES))
        finally:
            model.set_grad_checkpointing(False)  # type: ignore[operator]
    return Activations(
        all=_linear(*(run.total for run in runs)),
        checkpointed=checkpointed,
        block=max(blocks, key=lambda block: block.per_sample, default=Bytes(0, 0)),
        embed_dim=features.shape[1],
        feature_itemsize=features.element_size(),
    )


def _linear(small: int, large: int) -> Bytes:
    """Return the line through the bytes of both batches."""
    per_sample = (large - small) // (_BATCHES[1] - _BATCHES[0])
    return Bytes(small - _BATCHES[0] * per_sample, per_sample)


class _Run(NamedTuple):
    """Saved bytes of one forward pass: all, and those of each block."""

    total: int
    blocks: list[int]
    outputs: dict[str, Tensor]


def _run(model: nn.Module, batch: int, autocast: torch.dtype | None) -> _Run:
    dtype = min((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)  # that of most weights
    autocasting = torch.autocast(_DEVICE, autocast, enabled=autocast is not None)
    with FakeTensorMode(allow_non_fake_inputs=True), autocasting, _Accelerator():
        weights = {n: torch.empty_like(p, device=_DEVICE).requires_grad_(p.requires_grad) for n, p in _named(model)}
        inputs = tuple(example_inputs(model, batch, _DEVICE, dtype).values())
        saved = _Saved([*weights.values(), *tree_leaves(inputs)])
        with saved, _measuring(compilation.find_blocks(model), saved) as blocks:
            try:
                outputs = functional_call(model, weights, inputs)
            except RuntimeError as error:
                raise NotImplementedError(f"A tower cannot run without values: {error}") from error
    return _Run(saved.total, list(blocks.values()), outputs)


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the storages of the tensors that autograd saves in its context, except the given ones."""

    def __init__(self, excluded: list[Tensor]) -> None:
        self.total = 0
        # The storages are kept, because a new one may get the address of a freed one.
        self._seen: dict[int, Any] = {x.untyped_storage()._cdata: x.untyped_storage() for x in excluded}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.total += storage.nbytes()
        return tensor


@contextlib.contextmanager
def _measuring(blocks: list[nn.Module], saved: _Saved) -> Iterator[dict[nn.Module, int]]:
    """Yield the bytes that each block saves, filled while the model runs."""
    sizes = dict.fromkeys(blocks, 0)

    def start(block: nn.Module, _: Any) -> None:
        sizes[block] -= saved.total

    def stop(block: nn.Module, *_: Any) -> None:
        sizes[block] += saved.total

    hooks = [block.register_forward_pre_hook(start) for block in blocks]
    hooks += [block.register_forward_hook(stop) for block in blocks]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


class _Accelerator(TorchFunctionMode):
    """Makes functions on the CPU save what they save on accelerators.

    Attention and RMSNorm save what fused kernels save, which fake tensors do not have. Under autocast, functions that
    accelerators compute in float32 are given float32 tensors.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _SavedAttention.apply(*map(_cast, args[:3]))
        if func is F.rms_norm:
            return _rms_norm(*args, **(kwargs or {}))
        if func in _IN_FLOAT32 and torch.is_autocast_enabled(_DEVICE):
            args = tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, args)
        return func(*args, **(kwargs or {}))


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _SavedRMSNorm.apply(x, weight, len(shape))


def _cast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.get_autocast_dtype(_DEVICE)) if torch.is_autocast_enabled(_DEVICE) else tensor


class _SavedAttention(torch.autograd.Function):
    """Saves query, key, value, the result, and the logarithms of the sums (FlashAttention, arXiv:2205.14135)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Fused kernels return the tokens before the heads, so that the heads are joined without a copy.
        result = torch.empty_like(query.transpose(1, -2), memory_format=torch.contiguous_format).transpose(1, -2)
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AssertionError("Only the forward pass is run.")


class _SavedRMSNorm(torch.autograd.Function):
    """Saves the input, the weight, and the inverse root mean square over the last `dims` dimensions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dims: int) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-dims], dtype=torch.float32, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AssertionError("Only the forward pass is run.")
