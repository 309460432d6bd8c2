"""The memory of a PIL image as a numpy array, without a copy.

Pillow 11.3 and later export images through the Arrow PyCapsule interface, a C struct with pointers to the pixels:
https://arrow.apache.org/docs/format/CDataInterface.html
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_get_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_capsule_pointer.restype, _get_capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _ArrowArray(ctypes.Structure):
    """The first fields of Arrow's struct of this name."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]


class _Pixels:
    """Memory, described for numpy, and its owner. It is called writable because torch warns about read-only arrays."""

    def __init__(self, address: int, shape: tuple[int, ...], owner: Any) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": shape, "data": (address, False)}


def view_pixels(image: Image) -> np.ndarray:
    """Return the pixels of an RGB or L image as uint8 [height, width, 4 or 1], which must not be changed.

    Pillow stores 4 bytes for an RGB pixel; the last has no meaning. The pixels are copied only if Pillow is older than
    11.3, or if the image is so large (16 MiB) that its memory has several parts.
    """
    shape = (image.height, image.width, 4 if image.mode == "RGB" else 1)
    image.load()
    try:
        _, capsule = image.__arrow_c_array__()
    except (AttributeError, ValueError):  # an older Pillow; several parts
        data = image.tobytes("raw", "RGBX") if image.mode == "RGB" else image.tobytes()
        return np.asarray(_Pixels(np.frombuffer(data, np.uint8).ctypes.data, shape, data))
    array = _ArrowArray.from_address(_get_capsule_pointer(capsule, b"arrow_array"))
    values = array.children[0].contents if array.n_children else array  # RGB: a list of 4 values for each pixel
    return np.asarray(_Pixels(values.buffers[1], shape, capsule))
