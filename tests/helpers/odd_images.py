"""Images of every mode and shape, the same on every machine, by name: what a preprocessing gets wrong."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from PIL import Image

# (width, height)
SHAPES = {
    "square": (64, 64),
    "exact": (16, 16),
    "photo": (90, 60),
    "odd": (67, 51),
    "tall": (20, 333),
    "wide": (401, 17),
    "tiny": (3, 2),
    "dot": (1, 1),
    "huge": (900, 700),
    "line": (600, 1),
}
MODES = ("RGB", "L", "RGBA", "LA", "P", "P alpha", "CMYK", "1", "YCbCr")


def picture(width: int, height: int, bands: int) -> np.ndarray:
    """uint8 [height, width, bands]: waves, an edge, and texture from a fixed hash, without any random generator."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    noise = (x * 73856093 ^ y * 19349663) * 2654435761 >> 16
    planes = [
        (x * (3 + band) + y * (5 - band)) % 256 * (x > width // 3) + (noise >> band) % 64 + 40 * band
        for band in range(bands)
    ]
    return np.stack(planes, -1).clip(0, 255).astype(np.uint8)


@cache
def odd_image(mode: str, shape: str) -> Image.Image:
    width, height = SHAPES[shape]
    rgb = Image.fromarray(picture(width, height, 3))
    if mode in ("RGBA", "CMYK"):
        return Image.frombytes(mode, (width, height), picture(width, height, 4).tobytes())
    if mode.startswith("P"):
        # A palette of our own: an adaptive one is Pillow's to choose, and may change with it.
        indexed = Image.frombytes("P", (width, height), picture(width, height, 1).tobytes())
        indexed.putpalette([(i * step) % 256 for i in range(256) for step in (7, 11, 13)])
        if mode == "P alpha":
            indexed.info["transparency"] = bytes(range(256))
        return indexed
    if mode == "LA":
        return Image.frombytes("LA", (width, height), picture(width, height, 2).tobytes())
    if mode == "1":
        return Image.fromarray(picture(width, height, 1)[..., 0] > 127)
    return rgb.convert(mode)


# Keyword arguments of image_transform, but for is_train. Small sizes: what is compared is arithmetic, not throughput.
SETTINGS = {
    "shortest": {"image_size": 16},
    "shortest bilinear": {"image_size": (16, 16), "interpolation": "bilinear"},
    "shortest oblong": {"image_size": (12, 20), "interpolation": "random"},
    "longest": {"image_size": 16, "resize_mode": "longest"},
    "longest filled": {"image_size": (20, 12), "resize_mode": "longest", "fill_color": 99},
    "squash": {"image_size": 16, "resize_mode": "squash"},
    "squash oblong": {"image_size": (12, 20), "resize_mode": "squash", "interpolation": "bilinear"},
}


def cases() -> Iterator[tuple[str, str, str]]:
    """(setting, mode, shape) of every image."""
    for setting in SETTINGS:
        for mode in MODES:
            for shape in SHAPES:
                yield setting, mode, shape


# Statistics that leave values as they are. A mean of 0 would be taken for none given.
UNIT = {"mean": (1e-9,) * 3, "std": (1.0,) * 3}


def to_levels(tensor) -> np.ndarray:
    """uint8 [3, H, W] of a transform's answer with the statistics of `UNIT`."""
    return (tensor.numpy() * 255).round().astype(np.uint8)
