"""Decoding JPEG files with torchvision's decoder, which is faster than Pillow's and gives the same pixels."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

_RGB = 3  # torchvision.io.ImageReadMode.RGB


def decode_jpeg(image: Image) -> torch.Tensor | None:
    """Return the pixels of an image that Pillow has opened but not read, as uint8 [height, width, 3].

    None if it is not an unread RGB image from a JPEG file, or if the file is damaged: Pillow then decides whether it
    can be read. Pillow does not get the pixels, so the image cannot be used after its file is closed.
    """
    from PIL.JpegImagePlugin import JpegImageFile

    if type(image) is not JpegImageFile or image.mode != "RGB" or not image.tile or image.fp is None:
        return None
    scale = image.decoderconfig[0] if image.decoderconfig else 1  # `draft` sets it
    if scale != 1 or not _has_same_decoder():
        return None
    image.fp.seek(0)
    try:
        pixels = _decode(image.fp.read())
    except RuntimeError:
        return None
    return pixels if pixels.shape[:2] == (image.height, image.width) else None


def _decode(data: bytes) -> torch.Tensor:
    # torchvision 0.29 deprecates its function for this operator. Without the operator, Pillow decodes.
    import torchvision.io.image  # noqa: F401  # registers the operator

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return torch.ops.image.decode_jpeg(encoded, _RGB, False).permute(1, 2, 0)


@lru_cache
def _has_same_decoder() -> bool:
    """Whether torchvision was built with a JPEG decoder that gives the pixels of Pillow's, tried on a small image."""
    from PIL import Image

    colors = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    file = io.BytesIO()
    Image.fromarray(colors).save(file, "JPEG", quality=85)
    try:
        pixels = _decode(file.getvalue())
    except (ImportError, AttributeError, RuntimeError):
        return False
    return bool((pixels.numpy() == np.asarray(Image.open(file))).all())
