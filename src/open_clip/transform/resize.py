"""Resizing and cropping of PIL images and of tensors [..., height, width].

For PIL images, the pixels equal those of torchvision's Resize, CenterCrop and RandomResizedCrop within one level of
255, and are computed several times faster. Tensors are passed to torchvision.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .jpeg import decode_jpeg
from .pillow_memory import view_pixels
from .pixels import to_pil, to_resizable

if TYPE_CHECKING:
    from PIL.Image import Image


_INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos")


def to_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Convert a side, a sequence of one side, or a pair to (height, width).

    Raises:
        ValueError: `size` is something else, or a side is not a positive int.
    """
    sides = [size] if isinstance(size, (int, np.integer)) else list(size) if isinstance(size, Sequence) else []
    if len(sides) not in (1, 2) or not all(isinstance(side, (int, np.integer)) and side > 0 for side in sides):
        raise ValueError(f"size={size!r} is not valid. Pass a positive number of pixels, or (height, width).")
    return int(sides[0]), int(sides[-1])


def to_interpolation(interpolation: Any) -> str:
    """Return the name of an interpolation given as a name or as torchvision's InterpolationMode."""
    name = getattr(interpolation, "value", interpolation)
    if name not in _INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r} is unknown. Choose from {', '.join(_INTERPOLATIONS)}.")
    return name


@lru_cache
def _has_fast_uint8_resize() -> bool:
    """Whether torch has a vectorized resize for uint8 here. It is 4 to 6 times as fast as Pillow; others are slower."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _vertical_first(source: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether Pillow 13 resizes columns before rows. The intermediate image is rounded, so the order matters.

    torch, and Pillow before 13, always resize rows first. Sizes are (height, width).
    """
    return source[0] - size[0] > 2 * max(source[1] - size[1], 0)


def _torch_agrees(mode: str, source: tuple[int, int], size: tuple[int, int], exact: bool = True) -> bool:
    """Whether torch's resize for uint8 is fast here, and equals Pillow's within one level of 255.

    torch stores its weights with fewer bits. The difference in rounding between the two passes stays within one level
    if no single weight is large, that is, if the image shrinks: at ratios of 1.6 and more, none of 500 million values
    differed by two levels. With exact=False, such differences do not matter. Sizes are (height, width).
    """
    if mode not in ("RGB", "L") or not _has_fast_uint8_resize():
        return False
    shrinks = min(source[0] / size[0], source[1] / size[1]) >= 1.6
    return not exact or (shrinks and not _vertical_first(source, size))


def resize(image: Image, size: tuple[int, int], interpolation: str) -> Image:
    """Resize an image to (height, width) with antialiasing. Palette and 1-bit images use the nearest pixel."""
    return to_pil(resize_to_pixels(image, size, interpolation))


def resize_to_pixels(
    image: Image,
    size: tuple[int, int],
    interpolation: str,
    exact: bool = True,
    crop: tuple[int, int, int, int] | None = None,
    is_temporary: bool = False,
) -> Image | torch.Tensor:
    """Resize like `resize`, and return uint8 [1 or 3, height, width] where torch does it: an image would be a copy.

    Args:
        image: PIL image.
        size: (height, width).
        interpolation: name.
        exact: if False, a few pixels may differ by two levels from those of Pillow.
        crop: (left, top, right, bottom) of the part that is resized; by default the whole image.
        is_temporary: nobody uses the image afterwards, so its file may be decoded without Pillow.
    """
    from PIL.Image import Resampling

    height, width = size
    left, top, right, bottom = crop or (0, 0, *image.size)
    source = (bottom - top, right - left)
    if source != size and interpolation in ("bicubic", "bilinear") and _torch_agrees(image.mode, source, size, exact):
        decoded = decode_jpeg(image) if is_temporary else None
        pixels = torch.from_numpy(view_pixels(image)) if decoded is None else decoded
        # The batch dimension has the stride of memory in channels-last format, which saves torch's resize a copy.
        part = pixels[None].permute(0, 3, 1, 2)[:, :, top:bottom, left:right]
        resized = nn.functional.interpolate(part, (height, width), mode=interpolation, antialias=True)
        return resized[0, : len(image.getbands())]
    cropped = image if crop is None else image.crop(crop)
    return cropped if source == size else cropped.resize((width, height), Resampling[interpolation.upper()])


def _resize_any(image: Image | torch.Tensor, size: tuple[int, int], interpolation: str) -> Image | torch.Tensor:
    """Resize a PIL image with `resize`, or a tensor [..., height, width] with torchvision."""
    if isinstance(image, torch.Tensor):
        from torchvision.transforms import InterpolationMode, functional

        return functional.resize(image, list(size), InterpolationMode(interpolation), antialias=True)
    return resize(to_resizable(image), size, interpolation)


def _height_width(image: Image | torch.Tensor) -> tuple[int, int]:
    return tuple(image.shape[-2:]) if isinstance(image, torch.Tensor) else (image.height, image.width)  # type: ignore


def resize_center_crop(
    image: Image, side: int, interpolation: str, exact: bool = True, is_temporary: bool = False
) -> Image | torch.Tensor:
    """Resize the shorter side to `side` and crop the central square, as torchvision's Resize and CenterCrop do.

    If it is faster, only the pixels of the square are computed. See `resize_to_pixels` for the last two arguments and
    the types that are returned.
    """
    width, height = image.size
    shortest = min(height, width)
    # Round the long side down, as torchvision's Resize does.
    new_height, new_width = (side if edge == shortest else int(side * edge / shortest) for edge in (height, width))
    top, left = round((new_height - side) / 2), round((new_width - side) / 2)
    crop = (left, top, left + side, top + side)
    if not exact or not _should_use_box(image, side, (new_height, new_width)):
        resized = resize_to_pixels(image, (new_height, new_width), interpolation, exact, is_temporary=is_temporary)
        if isinstance(resized, torch.Tensor):
            return resized[:, top : top + side, left : left + side]
        return resized.crop(crop)
    from PIL.Image import Resampling

    scale_x, scale_y = width / new_width, height / new_height
    box = (crop[0] * scale_x, crop[1] * scale_y, min(crop[2] * scale_x, width), min(crop[3] * scale_y, height))
    return image.resize((side, side), Resampling[interpolation.upper()], box)


def _should_use_box(image: Image, side: int, resized: tuple[int, int]) -> bool:
    """Whether resizing only the square with Pillow gives the same pixels within one level, and is faster than `resize`.

    Exceptions: palette and 1-bit images, where other pixels would be selected; alpha, which amplifies rounding errors;
    a different order of the two passes; and growing images, where single weights are large and one value in 10 million
    would differ by two levels.
    """
    source = (image.height, image.width)
    return (
        image.mode in ("RGB", "L", "CMYK", "YCbCr")
        and min(source) >= side
        and source != resized
        and _vertical_first(source, (side, side)) == _vertical_first(source, resized)
        and (max(resized) > 4 * side or not _torch_agrees(image.mode, source, resized))
    )


def random_resized_crop(
    image: Image,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str,
    exact: bool = True,
    is_temporary: bool = False,
) -> Image | torch.Tensor:
    """Crop and resize randomly, as torchvision's RandomResizedCrop does, with the same draws from torch's generator.

    See `resize_to_pixels` for the last two arguments and the types that are returned.
    """
    crop = _draw_crop(image.width, image.height, scale, ratio)
    return resize_to_pixels(image, size, interpolation, exact, crop, is_temporary)


def _draw_crop(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw (left, top, right, bottom) as torchvision's RandomResizedCrop.get_params does, in a third of its time."""
    draw = torch.empty(1)  # float32, as are torchvision's draws: the same bits
    log_ratio = torch.log(torch.tensor(ratio)).tolist()
    for _ in range(10):
        area = width * height * draw.uniform_(*scale).item()
        aspect = draw.uniform_(*log_ratio).exp_().item()
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(torch.randint(0, height - crop_height + 1, (1,)))
            left = int(torch.randint(0, width - crop_width + 1, (1,)))
            return left, top, left + crop_width, top + crop_height
    # No crop of an allowed shape fits: the largest central one whose shape is allowed.
    aspect = min(max(width / height, min(ratio)), max(ratio))
    is_too_wide, is_too_high = width / height > max(ratio), width / height < min(ratio)
    crop_width = round(height * aspect) if is_too_wide else width
    crop_height = round(width / aspect) if is_too_high else height
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def smallest_size_of_crop(
    width: int,
    height: int,
    size: tuple[int, int],
    scale: tuple[float, float] | None = None,
    ratio: tuple[float, float] = (1.0, 1.0),
) -> tuple[int, int]:
    """Return the (width, height) to which an image can be reduced so that no crop is smaller than `size`.

    Args:
        width, height: of the image.
        size: (height, width) to which a crop is resized.
        scale, ratio: of `random_resized_crop`. Without them, the crop is the whole image.
    """
    if scale is None:
        return size[1], size[0]
    area = width * height * scale[0]
    smallest_width, smallest_height = min(width, math.sqrt(area * ratio[0])), min(height, math.sqrt(area / ratio[1]))
    return math.ceil(size[1] * width / smallest_width), math.ceil(size[0] * height / smallest_height)


class ResizeKeepRatio:
    """Resize with a fixed aspect ratio: to cover `size` (longest=0), to fit in it (longest=1), or in between.

    Args:
        size: side, or (height, width).
        longest: weight of the side that is longer relative to `size`, 0 to 1.
        interpolation: name, or torchvision's InterpolationMode.
        random_scale_prob, random_scale_range: probability and factor of scaling both sides (Python's `random`).
        random_aspect_prob, random_aspect_range: probability and factor of stretching the width and shrinking the
            height.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        longest: float = 0.0,
        interpolation: Any = "bicubic",
        random_scale_prob: float = 0.0,
        random_scale_range: tuple[float, float] = (0.85, 1.05),
        random_aspect_prob: float = 0.0,
        random_aspect_range: tuple[float, float] = (0.9, 1.11),
    ) -> None:
        from torchvision.transforms import InterpolationMode

        self.size = to_pair(size)
        self.interpolation = InterpolationMode(to_interpolation(interpolation))
        self.longest = float(longest)
        self.random_scale_prob = random_scale_prob
        self.random_scale_range = random_scale_range
        self.random_aspect_prob = random_aspect_prob
        self.random_aspect_range = random_aspect_range

    @staticmethod
    def get_params(
        img: Image | torch.Tensor,
        target_size: tuple[int, int],
        longest: float,
        random_scale_prob: float = 0.0,
        random_scale_range: tuple[float, float] = (0.85, 1.05),
        random_aspect_prob: float = 0.0,
        random_aspect_range: tuple[float, float] = (0.9, 1.11),
    ) -> list[int]:
        """Draw the [height, width] to resize `img` to."""
        source = _height_width(img)
        ratios = [edge / target for edge, target in zip(source, target_size, strict=True)]
        ratio = max(ratios) * longest + min(ratios) * (1.0 - longest)
        height_factor = width_factor = 1.0
        if random_scale_prob > 0 and random.random() < random_scale_prob:
            height_factor = width_factor = random.uniform(*random_scale_range)
        if random_aspect_prob > 0 and random.random() < random_aspect_prob:
            aspect = random.uniform(*random_aspect_range)
            height_factor, width_factor = height_factor / aspect, width_factor * aspect
        return [round(source[0] * height_factor / ratio), round(source[1] * width_factor / ratio)]

    def __call__(self, img: Image | torch.Tensor) -> Image | torch.Tensor:
        height, width = self.get_params(
            img, self.size, self.longest,
            self.random_scale_prob, self.random_scale_range, self.random_aspect_prob, self.random_aspect_range,
        )  # fmt: skip
        # The short side of a very long image could round to 0: keep at least one pixel.
        return _resize_any(img, (max(height, 1), max(width, 1)), to_interpolation(self.interpolation))

    def __repr__(self) -> str:
        settings = f"size={self.size}, interpolation={self.interpolation.value}, longest={self.longest:.3f}"
        return f"{type(self).__name__}({settings})"


def center_crop_or_pad(
    img: Image | torch.Tensor, output_size: int | Sequence[int], fill: int | tuple[int, ...] = 0
) -> Image | torch.Tensor:
    """Crop the centre of an image to `output_size` (height, width), or pad it with `fill` where it is smaller.

    An odd pixel of padding is added at the right and at the bottom.
    """
    target = to_pair(output_size)
    source = _height_width(img)
    # Start of the output in the image; negative for padding. round() rounds halves to even, as in torchvision.
    top, left = (
        round((edge - side) / 2) if edge > side else -((side - edge) // 2)
        for edge, side in zip(source, target, strict=True)
    )
    if source == target:
        return img
    bottom, right = top + target[0], left + target[1]
    if isinstance(img, torch.Tensor):
        cropped = img[..., max(top, 0) : bottom, max(left, 0) : right]
        padding = (max(-left, 0), max(right - source[1], 0), max(-top, 0), max(bottom - source[0], 0))
        return nn.functional.pad(cropped, padding, value=fill) if any(padding) else cropped  # type: ignore[arg-type]
    if source[0] >= target[0] and source[1] >= target[1]:
        return img.crop((left, top, right, bottom))
    from PIL.Image import new

    bands = len(img.getbands())
    padded = new(img.mode, target[::-1], (fill,) * bands if isinstance(fill, int) and bands > 1 else fill)
    if img.mode == "P":
        padded.putpalette(img.getpalette())  # type: ignore[arg-type]
    padded.paste(img, (-left, -top))
    return padded


class CenterCropOrPad(nn.Module):
    """Module that applies `center_crop_or_pad` with `size` (a side, or (height, width))."""

    def __init__(self, size: int | Sequence[int], fill: int | tuple[int, ...] = 0) -> None:
        super().__init__()
        self.size = to_pair(size)
        self.fill = fill

    def forward(self, img: Image | torch.Tensor) -> Image | torch.Tensor:
        return center_crop_or_pad(img, self.size, self.fill)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size}, fill={self.fill})"
