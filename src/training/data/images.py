"""Images from files and bytes, undecodable ones as `BadSample`."""

from __future__ import annotations

import io
from collections.abc import Callable
from os import PathLike, fspath
from typing import Any

from training.data.skips import BadSample


def load_image(source: str | PathLike[str] | bytes, transform: Callable[[Any], Any] | None, name: str) -> Any:
    """Opens an image (a path, or an encoded image in memory) and applies `transform` to it.

    PIL decodes when the pixels are asked for, that is inside `transform`: its exceptions are the image's. A transform
    that fails on every image is told from bad images by `Streak`, which ends the run with the first exception's text.

    Raises:
        BadSample: missing_image or corrupt_image.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else fspath(source)) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                # between one and two times the limit PIL itself only warns
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, the limit is {limit}")
            if transform is None:
                image.load()
                return image.copy()
            return transform(image)
    except FileNotFoundError as error:
        raise BadSample("missing_image", name, "there is no such file") from error
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ValueError...
        raise BadSample("corrupt_image", name, f"{type(error).__name__}: {error}") from error
