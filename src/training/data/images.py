"""Images from files and bytes, undecodable ones as `BadSample`."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable
from os import PathLike, fspath
from typing import Any

from training.data.skips import BadSample

# Formats that Pillow hands to another program (EPS: to Ghostscript) or to the system: data are not to start any.
_RUN_PROGRAMS = ("EPS", "WMF")


def load_image(source: str | PathLike[str] | bytes, transform: Callable[[Any], Any] | None, name: str) -> Any:
    """Opens an image (a path, or an encoded image in memory) and applies `transform` to it.

    Of an animated image the first frame. PIL decodes when the pixels are asked for, that is inside `transform`: its
    exceptions are the image's. A transform that fails on every image is told from bad images by `Streak`, which ends
    the run with the first exception's text.

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
            # between one and two times its limit Pillow only warns
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else fspath(source))
        with opened as image:
            if image.format in _RUN_PROGRAMS:
                raise Image.UnidentifiedImageError(f"{image.format} images are not opened")
            if transform is None:
                image.load()
                return image.copy()
            transformed = transform(image)
            if transformed is image:
                image.load()  # its file is about to be closed
            return transformed
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("huge_image", name, str(error)) from error
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ValueError...
        raise BadSample("corrupt_image", name, f"{type(error).__name__}: {error}") from error


def _check_file(path: str, name: str) -> None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSample("missing_image", name, "there is no such file") from error
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a NUL in it
        raise BadSample("missing_image", name, f"cannot be opened ({error})") from error
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device could be read for ever
        raise BadSample("missing_image", name, "it is not a file")
    if not status.st_size:
        raise BadSample("empty_image", name, "it has 0 bytes")
