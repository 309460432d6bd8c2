"""Batches on their way to the device: dicts of tensors and of names, whatever loader they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from open_clip import device as devices
from open_clip.text_groups import MAX_GROUPS, GroupedText, group_by_length


class Normalization:
    """Makes normalized floats of uint8 pixels: what torchvision's ToTensor and Normalize do, on the pixels' device.

    The results are equal to the last bit of float32, in three operators instead of four.

    Args:
        mean, std: by channel, of values from 0 to 1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._constants: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [batch, channels, height, width] -> float32 of the same shape."""
        if pixels.device not in self._constants:
            self._constants[pixels.device] = self._make_constants(pixels.device)
        minus_mean, levels, std = self._constants[pixels.device]
        return torch.addcdiv(minus_mean, pixels.float(), levels).div_(std)

    def _make_constants(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        # 255 is a tensor: CUDA divides by a number through its reciprocal, which may change the last bit.
        with torch.inference_mode(False):
            return (
                -torch.tensor(self.mean, dtype=torch.float32).view(-1, 1, 1).to(device),
                torch.tensor(255.0).to(device),
                torch.tensor(self.std, dtype=torch.float32).view(-1, 1, 1).to(device),
            )


def to_pixels(preprocess: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The transform for loaders whose batches `to_device` normalizes: `preprocess` without its normalization.

    It stays `preprocess` where that is not open_clip's own, was edited, or does not end with the normalization.
    """
    without_normalization = getattr(preprocess, "without_normalization", None)
    return (without_normalization and without_normalization()) or preprocess


def normalization_of(preprocess: Any) -> Normalization | None:
    """What is still to be done to the images that a transform of `to_pixels` makes, None if nothing."""
    mean_and_std = getattr(preprocess, "normalization", None)
    return None if mean_and_std is None else Normalization(*mean_and_std)


class TextGrouping:
    """Groups the texts of batches by length, where none of the models that encode them needs the padding.

    Args:
        models: CLIP models, and others that the texts are for. None is ignored.
        device: where the texts are encoded.
        max_groups: groups of a batch at most. 0 leaves texts unchanged.
    """

    def __init__(self, models: Sequence[Any], device: torch.device, max_groups: int = MAX_GROUPS) -> None:
        self._models = [model for model in models if model is not None]
        self._group_cost = devices.get(device).text_group_cost
        self._max_groups = max_groups

    def __call__(self, text: Any) -> Any:
        """int64 [batch, tokens] on the CPU -> the same, shorter or in groups. Other values are returned unchanged."""
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
    group_text: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """Move a batch to `device`, its floating point tensors in `input_dtype` (None: theirs). The host does not wait.

    A value that is not a tensor, such as the samples' names, is returned unchanged.

    Args:
        names: of the members of a tuple, which loaders of scripts written for open_clip_train give.
        normalization: applied to the images on the device if they are uint8.
        group_text: applied to the texts before they are moved, such as a TextGrouping.
    """
    named = dict(batch) if isinstance(batch, Mapping) else dict(zip(names, batch, strict=False))
    if group_text is not None and "text" in named:
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
