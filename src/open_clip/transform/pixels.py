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


class _WritableBytes:
    """Bytes for numpy, declared as writable, because torch warns about read-only arrays. They must not be changed."""

    def __init__(self, data: bytes, shape: tuple[int, ...]) -> None:
        self.data = data
        address = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": shape, "data": (address, False)}


def view_bands(image: Image) -> torch.Tensor:
    """Return the pixels of an RGB or L image as uint8 [1, 4 or 1, height, width], which must not be changed.

    Pillow stores 4 bytes for an RGB pixel, so 4 channels (the last has no meaning) take half as long as 3. The memory
    format is channels last also by the stride of the batch dimension, which saves torch's resize a copy.
    """
    data = image.tobytes("raw", "RGBX") if image.mode == "RGB" else image.tobytes()
    shape = (1, image.height, image.width, len(data) // (image.height * image.width))
    return torch.from_numpy(np.asarray(_WritableBytes(data, shape))).permute(0, 3, 1, 2)


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
