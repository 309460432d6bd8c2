"""FLOPs of models, counted on any device, the meta device included; and what a chip could do at its peak.

A multiply-add is two FLOPs; norms, activations and other elementwise work are not counted, as in the published tables.
Attention is counted as two full matrix products, whatever kernel would do it and whether or not half of it is masked.
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
from open_clip.modified_resnet import AttentionPool2d
from training import precision as precisions

logger = logging.getLogger(__name__)

# The chips' table has no peaks of TF32 and HF32, in which fp32 products are computed then.
_WITHOUT_PEAK = (torch.float32, "high")


def count_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _count_flops(run: Callable[[], Any]) -> int:
    # A fused attention kernel is one operator, which the counter does not know on every device. Elementary operators,
    # and the MATH backend for towers that call torch's function themselves, are matrix products, which it knows.
    with devices.elementary_ops(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _count_forward(model: nn.Module, run: Callable[[], Any]) -> int:
    # The counter looks for the gradient of each module's input that needs one, and under no_grad a view of a parameter
    # (a query of attention pooling) seems to need one and has none: no parameter needs one here.
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
    model: nn.Module, image_input_size: Sequence[int], batch_size: int = 1, force_cpu: bool = False
) -> float:
    """FLOPs of the image tower for one image of `image_input_size` (3, height, width)."""
    model = _moved(model, force_cpu)
    image = example_image(model, image_input_size, batch_size)
    counted = _count_forward(model, lambda: model.encode_image(image))  # type: ignore[operator]
    return counted / batch_size + _dropped_queries(model)


def profile_torch_text(
    model: nn.Module, text_input_size: Sequence[int], batch_size: int = 1, force_cpu: bool = False
) -> float:
    """FLOPs of the text tower for one text of `text_input_size` (tokens,)."""
    model = _moved(model, force_cpu)
    text = example_text(model, text_input_size, batch_size)
    return _count_forward(model, lambda: model.encode_text(text)) / batch_size  # type: ignore[operator]


def profile_torch(
    model: nn.Module,
    text_input_size: Sequence[int],
    image_input_size: Sequence[int],
    batch_size: int = 1,
    force_cpu: bool = False,
) -> float:
    """FLOPs of the whole model, decoder included where there is one, for one image and one text.

    force_cpu: move the model to the CPU first; the count is the same on every device.
    """
    model = _moved(model, force_cpu)
    image = example_image(model, image_input_size, batch_size)
    text = example_text(model, text_input_size, batch_size)
    return _count_forward(model, lambda: model(image, text)) / batch_size + _dropped_queries(model)


def _dropped_queries(model: nn.Module) -> int:
    """FLOPs an image that the published tables have for the attention pool of ResNets, and this package does without.

    Theirs computes an output for each place, and drops all but the first.
    """
    flops = 0
    for pool in model.modules():
        if isinstance(pool, AttentionPool2d):
            tokens, width = pool.positional_embedding.shape
            a_query = 2 * width * width + 2 * (2 * tokens * width) + 2 * width * pool.c_proj.out_features
            flops += (tokens - 1) * a_query
    return flops


def _moved(model: nn.Module, force_cpu: bool) -> nn.Module:
    return model.to("cpu") if force_cpu else model


def example_image(model: nn.Module, size: Sequence[int], batch_size: int) -> torch.Tensor:
    parameter = next(model.parameters())
    return torch.ones((batch_size, *size), device=parameter.device, dtype=parameter.dtype)


def example_text(model: nn.Module, size: Sequence[int], batch_size: int) -> torch.Tensor:
    return torch.ones((batch_size, *size), device=next(model.parameters()).device, dtype=torch.int64)


def input_sizes(model: nn.Module) -> tuple[tuple[int, int, int], tuple[int]]:
    """(3, height, width) in pixels, and (tokens,)."""
    size = model.visual.image_size  # type: ignore[union-attr]
    height, width = (size, size) if isinstance(size, int) else size  # type: ignore[misc]
    return (3, height, width), (int(model.context_length),)  # type: ignore[arg-type]


def training_flops(model: nn.Module, teacher: nn.Module | None = None) -> float:
    """FLOPs that one image-text pair needs in a training step: forward and backward pass, and the teacher's forward.

    About 3 times the forward pass, less for what is locked; counted with the patch dropout of training, on the model's
    own code with weights of the meta device, so that nothing is allocated or computed and no random number is drawn.
    What --grad-checkpointing and --accum-freq compute a second time does not count: these are the model's FLOPs of
    PaLM's MFU (arXiv:2204.02311, appendix B), whatever way they are got.
    """
    with _keeping_activations(model):
        flops = _count_flops(lambda: _on_meta(model, backward=True))
    if teacher is not None:
        flops += _count_forward(teacher, lambda: _on_meta(teacher, backward=False))
    return flops / _PAIRS


_PAIRS = 2  # one is too few for BatchNorm in training


def _on_meta(model: nn.Module, backward: bool) -> None:
    """A pass with meta tensors in place of the parameters and buffers."""
    tensors = {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
    }
    image_size, text_size = input_sizes(model)
    dtype = next(model.parameters()).dtype
    image = torch.empty(_PAIRS, *image_size, dtype=dtype, device="meta")
    text = torch.empty(_PAIRS, *text_size, dtype=torch.int64, device="meta")
    outputs = functional_call(model, tensors, (image, text))
    if backward:
        values = outputs.values() if isinstance(outputs, Mapping) else outputs
        reached = [value.float().sum() for value in values if torch.is_tensor(value) and value.requires_grad]
        torch.stack(reached).sum().backward()


@contextlib.contextmanager
def _keeping_activations(model: nn.Module) -> Iterator[None]:
    """Without gradient checkpointing, which would compute them twice."""
    checkpointing: list[Any] = [module for module in model.modules() if getattr(module, "grad_checkpointing", False)]
    for module in checkpointing:
        module.grad_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointing:
            module.grad_checkpointing = True


def pairs_at_peak(
    model: nn.Module, teacher: nn.Module | None, precision: str, fp32_matmul: str, device: torch.device
) -> float | None:
    """Image-text pairs a second that the chip could train on at its peak FLOP/s; None where that is not known."""
    dtype = precisions.dtype_of(precision, device)
    kind = devices.get(device)
    peak = None if (dtype, fp32_matmul) == _WITHOUT_PEAK else kind.peak_flops(dtype, device.index)
    if peak is None:
        return None
    try:
        flops = training_flops(model, teacher)
    except (RuntimeError, NotImplementedError) as error:  # a tower whose code looks at values, which meta has not
        logger.info("The log has no MFU: the FLOPs of this model cannot be counted (%s).", error)
        return None
    logger.info(
        "%.2f GFLOPs per pair in training. MFU refers to a peak of %.1f TFLOP/s, from %s.",
        flops / 1e9, peak / 1e12, kind.peak_source(device.index),
    )  # fmt: skip
    return peak / flops
