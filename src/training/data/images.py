"""Loads images from files and bytes. An image that cannot be decoded raises `BadSample`."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable
from os import PathLike, fspath
from typing import Any

from training.data.skips import BadSample

# Formats for which Pillow runs another program (Ghostscript for EPS) or calls the system. Data must not run programs.
_FORMATS_OF_PROGRAMS = ("EPS", "WMF")


def load_image(
    source: str | PathLike[str] | bytes,
    transform: Callable[[Any], Any] | None,
    name: str,
    max_pixels: int | None = None,
) -> Any:
    """Open an image (a path, or an encoded image in memory) and apply `transform` to it.

    An animated image gives its first frame. Pillow decodes an image when its pixels are read, which is in `transform`,
    so an exception of `transform` makes a bad sample. If `transform` fails on every image, `BadStreak` ends the run
    with the first exception's text.

    Args:
        name: of the sample, for messages.
        max_pixels: an image with more pixels is not decoded. None or 0: only Pillow's limit applies.

    Raises:
        BadSample: missing_image, empty_image, huge_image or corrupt_image.
    """
    from PIL import Image

    if isinstance(source, bytes):
        if not source:
            raise BadSample("empty_image", name, "it has 0 bytes")
    else:
        _check_file(fspath(source), name)
    try:
        with warnings.catch_warnings():
            # between one and two times its limit, Pillow only warns
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else fspath(source))
        with opened as image:
            if image.format in _FORMATS_OF_PROGRAMS:
                raise Image.UnidentifiedImageError(f"{image.format} images are not opened")
            if max_pixels and image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height} pixels"
                raise BadSample("huge_image", name, f"{size}, more than --max-image-pixels {max_pixels}")
            if transform is None:
                image.load()
                return image.copy()
            transformed = transform(image)
            if transformed is image:
                image.load()  # before the file is closed
            return transformed
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("huge_image", name, str(error)) from error
    except BadSample:
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ValueError...
        raise BadSample("corrupt_image", name, f"{type(error).__name__}: {error}") from error


def _check_file(path: str, name: str) -> None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSample("missing_image", name, "there is no such file") from error
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a NUL in it
        raise BadSample("missing_image", name, f"cannot be opened ({error})") from error
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
        raise BadSample("missing_image", name, "it is not a file")
    if not status.st_size:
        raise BadSample("empty_image", name, "it has 0 bytes")
