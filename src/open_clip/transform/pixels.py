"""Conversions between PIL images and uint8 tensors, and between the modes of PIL images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image


def to_resizable(image: Image) -> Image:
    """Convert an image to a mode that can be resized: scale 16 bits to 8, convert palettes with alpha to RGBA."""
    from PIL.Image import fromarray

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return fromarray(((levels + 128) // 257).astype(np.uint8))
    return image.convert("RGBA") if image.mode == "PA" else image


class MaybeConvertMode:
    """Convert PIL images to a mode. 16-bit grayscale is scaled to 8 bits. Other objects are returned unchanged."""

    def __init__(self, mode: str = "RGB") -> None:
        self.mode = mode

    def __call__(self, pic: Image | torch.Tensor) -> Image | torch.Tensor:
        from PIL import Image

        if not isinstance(pic, Image.Image) or pic.mode == self.mode:
            return pic
        pic = to_resizable(pic)
        if pic.mode == "P" and isinstance(pic.info.get("transparency"), bytes):
            pic = pic.convert("RGBA")  # the colors are the same, and Pillow does not warn about the dropped alpha
        return pic.convert(self.mode)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mode={self.mode})"


def to_pixels(image: Image | torch.Tensor) -> torch.Tensor:
    """Return uint8 [3, height, width], contiguous, of an RGB image or of uint8 [1 or 3, height, width]."""
    if isinstance(image, torch.Tensor):
        channels_first = image.expand(3, -1, -1).numpy()
    else:
        channels_first = np.asarray(image).transpose(2, 0, 1)
    # numpy transposes the channels in half the time of torch's contiguous().
    return torch.from_numpy(np.array(channels_first, order="C"))


def to_pil(pixels: Image | torch.Tensor) -> Image:
    """Return the image of uint8 [1 or 3, height, width], or an image unchanged."""
    from PIL.Image import fromarray

    if not isinstance(pixels, torch.Tensor):
        return pixels
    return fromarray(pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy())
