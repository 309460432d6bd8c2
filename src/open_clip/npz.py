"""Arrays of a numpy archive (`.npz`), as JAX projects publish weights, as memory-mapped tensors."""

from __future__ import annotations

import math
import os
import zipfile

import numpy as np
import torch

from .zipped import MappedZip

_DTYPES = {
    "|V2": torch.bfloat16,  # numpy has no such type: JAX writes two bytes without a meaning
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
    "|u1": torch.uint8,
    "|i1": torch.int8,
    "<i2": torch.int16,
    "<i4": torch.int32,
    "<i8": torch.int64,
    "|b1": torch.bool,
}


def is_npz(path: str | os.PathLike) -> bool:
    """Whether the file is a zip of numpy arrays and nothing else."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The arrays by name.

    They lie in the file, memory-mapped copy-on-write, wherever it put them: at addresses that may not be multiples of
    their type's size. Copy what is computed with.

    Raises:
        ValueError: the file is damaged, or an array is not of numbers (Python objects are never unpickled).
    """
    try:
        with MappedZip(path) as archive:
            return {entry.filename.removesuffix(".npy"): _tensor(archive, entry) for entry in archive.infolist()}
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is not readable as npz ({error}). Was its copy or download interrupted?") from error


def _tensor(archive: MappedZip, entry: zipfile.ZipInfo) -> torch.Tensor:
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, numpy_dtype = read_header(file)
        start = file.tell()
    dtype = _DTYPES.get(numpy_dtype.str)
    if dtype is None:
        raise ValueError(f"{archive.path}: {entry.filename} is an array of {numpy_dtype}, and numbers were expected.")
    data = archive.storage(entry)
    if math.prod(shape) * dtype.itemsize > data.nbytes() - start:
        raise ValueError(f"{archive.path}: {entry.filename} is shorter than its shape {shape} asks for.")
    flat = torch.empty(0, dtype=dtype).set_(data[start:], 0, (math.prod(shape),), (1,))
    return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape)))) if is_fortran else flat.reshape(shape)
