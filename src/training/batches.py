"""Preparing batches for the model: moving to the device, normalizing images, counting samples and tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from open_clip.text_groups import GroupedText

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
        minus_mean, levels, std = self._constants_on(pixels.device)
        return torch.addcdiv(minus_mean, pixels.float(), levels).div_(std)

    def of_patches(self, pixels: Tensor) -> Tensor:
        """Convert uint8 patches to float32 of the same shape, whose last dimension is (row, column, channel)."""
        minus_mean, levels, std = (constant.flatten() for constant in self._constants_on(pixels.device))
        by_channel = pixels.reshape(*pixels.shape[:-1], -1, len(self.mean)).float()
        return torch.addcdiv(minus_mean, by_channel, levels).div_(std).view(pixels.shape)

    def _constants_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._constants:
            self._constants[device] = self._make_constants(device)
        return self._constants[device]

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


def normalization_of(preprocess: Any) -> Normalization | None:
    """Return the normalization that a transform from `to_pixels` leaves out; None if it leaves out nothing."""
    mean_and_std = getattr(preprocess, "normalization", None)
    return None if mean_and_std is None else Normalization(*mean_and_std)


def keep_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch unchanged, where its inputs keep their padding."""
    return batch


def to_device(
    batch: Mapping[str, Any] | Sequence[Any],
    device: torch.device,
    input_dtype: torch.dtype | None = None,
    names: Sequence[str] = ("image", "text"),
    normalization: Normalization | None = None,
    unpad: Callable[[dict[str, Any]], dict[str, Any]] = keep_padding,
) -> dict[str, Any]:
    """Move a batch to `device` without waiting. Values that cannot be moved, such as sample keys, are not changed.

    Args:
        batch: a dict, whose values may be dicts, or a tuple, which data loaders written for open_clip_train give.
        input_dtype: dtype for floating point tensors; None: keep theirs.
        names: names of the members of a tuple.
        normalization: applied to the images, or their patches, on the device if they are uint8.
        unpad: applied to the batch before it is moved, such as a `training.unpadding.Unpadding`.
    """
    named = dict(batch) if isinstance(batch, Mapping) else dict(zip(names, batch, strict=False))
    moved = {name: _move(value, device, input_dtype) for name, value in unpad(named).items()}
    if normalization is not None and "image" in moved:
        moved["image"] = _normalize(moved["image"], normalization, input_dtype)
    return moved


def _move(value: Any, device: torch.device, input_dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, input_dtype if value.is_floating_point() else None, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: _move(part, device, input_dtype) for name, part in value.items()}
    if not hasattr(value, "to"):
        return value
    moved = value.to(device, non_blocking=True)
    if input_dtype is not None and _has_patches(moved) and moved.patches.is_floating_point():
        return replace(moved, patches=moved.patches.to(input_dtype))
    return moved


def _normalize(image: Any, normalization: Normalization, input_dtype: torch.dtype | None) -> Any:
    """Normalize an image tensor, a dict with "patches", or packed patches, if their pixels are uint8."""

    def normalized(pixels: Any, function: Callable[[Tensor], Tensor]) -> Any:
        if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8:
            return pixels
        return function(pixels) if input_dtype is None else function(pixels).to(input_dtype)

    if isinstance(image, Mapping):
        return {**image, "patches": normalized(image.get("patches"), normalization.of_patches)}
    if _has_patches(image):
        return replace(image, patches=normalized(image.patches, normalization.of_patches))
    return normalized(image, normalization)


def _has_patches(value: Any) -> bool:
    """Return whether the value is a dataclass of packed patches."""
    return is_dataclass(value) and isinstance(getattr(value, "patches", None), Tensor)


def num_samples(batch: Mapping[str, Any], name: str = "image") -> int:
    """Return the number of samples of a batch: of the entry `name`, or of the first entry that has samples.

    Raises:
        ValueError: no entry has samples.
    """
    for value in (batch.get(name), *batch.values()):
        samples = _num_rows(value)
        if samples is not None:
            return samples
    raise ValueError(f"The batch has no samples. Its entries are {', '.join(map(str, batch)) or 'none'}.")


def _num_rows(value: Any) -> int | None:
    """Return the number of samples of an entry of a batch; None if that is unknown."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() else None
    if isinstance(value, Mapping):
        return next((rows for rows in map(_num_rows, value.values()) if rows is not None), None)
    if isinstance(value, GroupedText):
        return len(value.inverse)
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return None
    return len(value)


def num_tokens(batch: Mapping[str, Any]) -> dict[str, int]:
    """Return how many tokens the towers compute, padding included, of the inputs whose number of tokens varies.

    These are packed inputs, patches, and texts with an entry "text_valid". No value is read from the device.

    Returns:
        The numbers by the name of the input. Empty for images and texts of fixed size.
    """
    counted = {name: _num_tokens(value, f"{name}_valid" in batch) for name, value in batch.items()}
    return {name: tokens for name, tokens in counted.items() if tokens is not None}


def _num_tokens(value: Any, is_ragged: bool) -> int | None:
    if isinstance(value, Mapping):
        patches = value.get("patches")
        return patches.shape[0] * patches.shape[1] if isinstance(patches, Tensor) else None
    if hasattr(value, "segments"):
        return int(value.segments.total)
    if not is_ragged:
        return None
    return sum(part.numel() for part in value.parts) if isinstance(value, GroupedText) else int(value.numel())
