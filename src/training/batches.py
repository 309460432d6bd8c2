"""Preparing batches for the model: grouping texts, moving to the device, normalizing images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from open_clip import device as devices
from open_clip.text_groups import MAX_GROUPS, GroupedText, group_by_length

LOSS_SCALE = "__loss_scale__"  # in a batch: a factor of the loss for its gradient. The logged loss does not have it


class Normalization:
    """Converts uint8 pixels to normalized floats on their device, like ToTensor and Normalize of torchvision.

    The float32 results are bit-identical, with three operators instead of four.

    Args:
        mean, std: per channel, for values from 0 to 1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._constants: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Convert uint8 [batch, channels, height, width] to float32 of the same shape."""
        if pixels.device not in self._constants:
            self._constants[pixels.device] = self._make_constants(pixels.device)
        minus_mean, levels, std = self._constants[pixels.device]
        return torch.addcdiv(minus_mean, pixels.float(), levels).div_(std)

    def _make_constants(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        # 255 is a tensor because CUDA divides by a Python number via its reciprocal, which may change the last bit.
        with torch.inference_mode(False):
            return (
                -torch.tensor(self.mean, dtype=torch.float32).view(-1, 1, 1).to(device),
                torch.tensor(255.0).to(device),
                torch.tensor(self.std, dtype=torch.float32).view(-1, 1, 1).to(device),
            )


def to_pixels(preprocess: Callable[[Any], Any], fast_decode: bool = False) -> Callable[[Any], Any]:
    """Return `preprocess` without its normalization, for loaders whose batches are normalized by `to_device`.

    A transform that is not from open_clip, was edited, or does not end with the normalization is returned unchanged.

    Args:
        fast_decode: decode large JPEG images at a reduced size.
    """
    without_normalization = getattr(preprocess, "without_normalization", None)
    pixels = without_normalization and without_normalization()
    if pixels is None:
        return preprocess
    pixels.fast_decode = fast_decode
    return pixels


def keep_text(text: Any) -> Any:
    """Return the texts unchanged, where they are not grouped."""
    return text


def normalization_of(preprocess: Any) -> Normalization | None:
    """Return the normalization that a transform from `to_pixels` leaves out; None if it leaves out nothing."""
    mean_and_std = getattr(preprocess, "normalization", None)
    return None if mean_and_std is None else Normalization(*mean_and_std)


class TextReader:
    """What TextGrouping needs of a model, asked before the model is sharded, whose hooks look like those of users."""

    def __init__(self, model: Any) -> None:
        self.takes_grouped_text = getattr(model, "takes_grouped_text", False)
        self.text_lengths = getattr(model, "text_lengths", None)


class TextGrouping:
    """Groups the texts of a batch by length, unless one of the models needs the padding.

    Args:
        models: all models that encode the texts. None is ignored.
        device: device of the models.
        max_groups: maximum number of groups per batch. 0 keeps texts unchanged.
    """

    def __init__(self, models: Sequence[Any], device: torch.device, max_groups: int = MAX_GROUPS) -> None:
        self._models = [model for model in models if model is not None]
        self._group_cost = devices.get(device).text_group_cost
        self._max_groups = max_groups

    def __call__(self, text: Any) -> Any:
        """Group texts, int64 [batch, tokens] on the CPU. Other values are returned unchanged."""
        if not self._max_groups or not isinstance(text, Tensor) or text.dim() != 2 or not len(text) or not text.is_cpu:
            return text
        lengths = [_text_lengths(model, text) for model in self._models]
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths):
            return text
        return group_by_length(text, torch.stack(known).amax(dim=0), self._group_cost, self._max_groups)


def _text_lengths(model: Any, text: Tensor) -> Tensor | None:
    return model.text_lengths(text) if getattr(model, "takes_grouped_text", False) else None


def to_device(
    batch: Mapping[str, Any] | Sequence[Any],
    device: torch.device,
    input_dtype: torch.dtype | None = None,
    names: Sequence[str] = ("image", "text"),
    normalization: Normalization | None = None,
    group_text: Callable[[Any], Any] = keep_text,
) -> dict[str, Any]:
    """Move a batch to `device` without waiting. Values that are not tensors, such as sample keys, are not changed.

    Args:
        batch: a dict, or a tuple, which data loaders written for open_clip_train give.
        input_dtype: dtype for floating point tensors; None: keep theirs.
        names: names of the members of a tuple.
        normalization: applied to the images on the device if they are uint8.
        group_text: applied to the texts before they are moved, such as a TextGrouping.
    """
    named = dict(batch) if isinstance(batch, Mapping) else dict(zip(names, batch, strict=False))
    if "text" in named:
        named["text"] = group_text(named["text"])
    moved = {name: _move(value, device, input_dtype) for name, value in named.items()}
    image = moved.get("image")
    if normalization is not None and isinstance(image, Tensor) and image.dtype == torch.uint8:
        normalized = normalization(image)
        moved["image"] = normalized if input_dtype is None else normalized.to(input_dtype)
    return moved


def _move(value: Any, device: torch.device, input_dtype: torch.dtype | None) -> Any:
    if isinstance(value, GroupedText):
        return value.to(device, non_blocking=True)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, input_dtype if value.is_floating_point() else None, non_blocking=True)
