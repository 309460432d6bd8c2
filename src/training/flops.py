"""FLOPs of models, counted on any device including meta, and the throughput at the peak of a chip.

A multiply-add counts as two FLOPs. Norms, activations and other elementwise operations are not counted, as in the
published tables. Attention counts as two full matrix products, for any kernel and with or without a mask.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from open_clip import device as devices
from open_clip import model_inputs
from open_clip.modified_resnet import AttentionPool2d
from training.precision import Precision

logger = logging.getLogger(__name__)

# With "high", fp32 products are computed in TF32 or HF32, for which the table of chips has no peaks.
_WITHOUT_PEAK = (torch.float32, "high")


def count_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _count_flops(run: Callable[[], Any]) -> int:
    # The counter does not know the fused attention operators of every device. Elementary operators, and the MATH
    # backend for towers that call torch's function, use matrix products, which it knows.
    with devices.elementary_ops(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _count_forward(model: nn.Module, run: Callable[[], Any]) -> int:
    # The counter expects a gradient function for each module input that requires grad. Under no_grad a view of a
    # parameter (a query of attention pooling) requires grad but has no such function. So no parameter requires grad.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad = False
    try:
        with torch.no_grad():
            return _count_flops(run)
    finally:
        for parameter in trainable:
            parameter.requires_grad = True


def profile_torch_image(
    model: nn.Module, image_input_size: Sequence[int] | None, batch_size: int = 1, force_cpu: bool = False
) -> float:
    """Count the FLOPs of the image tower for one image of `image_input_size` (3, height, width); None: the model's."""
    model = _moved(model, force_cpu)
    image = _example_inputs(model, batch_size, image=image_input_size)["image"]
    counted = _count_forward(model, lambda: model.encode_image(image))  # type: ignore[operator]
    return counted / batch_size + _dropped_queries(model)


def profile_torch_text(
    model: nn.Module, text_input_size: Sequence[int] | None, batch_size: int = 1, force_cpu: bool = False
) -> float:
    """Count the FLOPs of the text tower for one text of `text_input_size` (tokens,); None: the model's."""
    model = _moved(model, force_cpu)
    text = _example_inputs(model, batch_size, text=text_input_size)["text"]
    return _count_forward(model, lambda: model.encode_text(text)) / batch_size  # type: ignore[operator]


def profile_torch(
    model: nn.Module,
    text_input_size: Sequence[int] | None,
    image_input_size: Sequence[int] | None,
    batch_size: int = 1,
    force_cpu: bool = False,
) -> float:
    """Count the FLOPs of the whole model for one image and one text, including a decoder if it has one.

    Args:
        text_input_size, image_input_size: (tokens,) and (3, height, width). None: the model's own inputs.
        force_cpu: move the model to the CPU first. The count is the same on every device.
    """
    model = _moved(model, force_cpu)
    inputs = _example_inputs(model, batch_size, image=image_input_size, text=text_input_size)
    return _count_forward(model, lambda: model(*inputs.values())) / batch_size + _dropped_queries(model)


def _dropped_queries(model: nn.Module) -> int:
    """Count the FLOPs per image that the published tables include for the attention pool of ResNets.

    The published implementation computes an output for each position and drops all but the first. This package
    computes only the first.
    """
    flops = 0
    for pool in model.modules():
        if isinstance(pool, AttentionPool2d):
            tokens, width = pool.positional_embedding.shape
            flops_per_query = 2 * width * width + 2 * (2 * tokens * width) + 2 * width * pool.c_proj.out_features
            flops += (tokens - 1) * flops_per_query
    return flops


def _moved(model: nn.Module, force_cpu: bool) -> nn.Module:
    return model.to("cpu") if force_cpu else model


def _example_inputs(model: nn.Module, batch_size: int, **sizes: Sequence[int] | None) -> dict[str, Any]:
    """Return inputs of the model, of these sizes without the batch. A size that is None is left to the model."""
    parameter = next(model.parameters())
    dtypes = {"image": parameter.dtype, "text": torch.int64}
    given = {
        name: torch.ones((batch_size, *size), device=parameter.device, dtype=dtypes[name])
        for name, size in sizes.items()
        if size is not None
    }
    return given if len(given) == len(sizes) else model_inputs.example_inputs(model, batch_size) | given


def input_sizes(model: nn.Module) -> tuple[tuple[int, int, int], tuple[int]]:
    """Return the input sizes of a model: (3, height, width) in pixels, and (tokens,)."""
    size = model.visual.image_size  # type: ignore[union-attr]
    height, width = (size, size) if isinstance(size, int) else size  # type: ignore[misc]
    return (3, height, width), (int(model.context_length),)  # type: ignore[arg-type]


def training_flops(model: nn.Module, teacher: nn.Module | None = None) -> float:
    """Count the FLOPs per image-text pair of a training step: forward and backward pass, and the teacher's forward.

    They are about 3 times those of the forward pass, less if parts are locked, and include the effect of patch dropout.
    The model runs with weights on the meta device, so nothing is allocated or computed and no random number is drawn.
    Computation that --grad-checkpointing and --accum-freq repeat is not counted, as in the definition of MFU in PaLM
    (arXiv:2204.02311, appendix B).
    """
    with _no_grad_checkpointing(model):
        flops = _count_flops(lambda: _run_on_meta(model, backward=True))
    if teacher is not None:
        flops += _count_forward(teacher, lambda: _run_on_meta(teacher, backward=False))
    return flops / _PAIRS


_PAIRS = 2  # BatchNorm in training needs at least two


def _run_on_meta(model: nn.Module, backward: bool) -> None:
    """Run the model with meta tensors instead of its parameters and buffers."""
    tensors = {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
    }
    inputs = model_inputs.example_inputs(model, _PAIRS, "meta")
    outputs = functional_call(model, tensors, tuple(inputs.values()))
    if backward:
        values = outputs.values() if isinstance(outputs, Mapping) else outputs
        sums = [value.float().sum() for value in values if torch.is_tensor(value) and value.requires_grad]
        torch.stack(sums).sum().backward()


@contextlib.contextmanager
def _no_grad_checkpointing(model: nn.Module) -> Iterator[None]:
    """Disable gradient checkpointing, which would run the forward pass twice."""
    checkpointing: list[Any] = [module for module in model.modules() if getattr(module, "grad_checkpointing", False)]
    for module in checkpointing:
        module.grad_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointing:
            module.grad_checkpointing = True


def pairs_at_peak(model: nn.Module, teacher: nn.Module | None, precision: Precision, fp32_matmul: str) -> float | None:
    """Return how many image-text pairs per second the chip could train on at its peak FLOP/s; None if unknown."""
    dtype, device = precision.compute_dtype, precision.device
    kind = devices.get(device)
    peak = None if (dtype, fp32_matmul) == _WITHOUT_PEAK else kind.peak_flops(dtype, device.index)
    if peak is None:
        return None
    try:
        flops = training_flops(model, teacher)
    except (RuntimeError, NotImplementedError) as error:  # a tower that reads values, which meta tensors do not have
        logger.info("The log has no MFU: the FLOPs of this model cannot be counted (%s).", error)
        return None
    logger.info(
        "Training needs %.2f GFLOPs per pair. MFU is relative to a peak of %.1f TFLOP/s, from %s.",
        flops / 1e9, peak / 1e12, kind.peak_source(device.index),
    )  # fmt: skip
    return peak / flops
