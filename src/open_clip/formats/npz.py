"""Reading of NumPy archives (`.npz`), in which JAX projects publish weights."""

from __future__ import annotations

import io
import math
import os

import numpy as np
import torch

from .binary_file import BinaryFile, FileError, name_damage
from .mapped_zip import ZipArchive, names_in_zip
from .tensor_records import Storage, TensorRecord, contiguous_record, load_tensors

_MAX_HEADER = 1 << 16  # bytes of an array's header
_DTYPES = {
    "|V2": torch.bfloat16,  # NumPy has no bfloat16: JAX writes two bytes without a type
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
    """Whether the file is a zip archive of NumPy arrays only."""
    with BinaryFile(path) as file:
        return has_arrays_only(names_in_zip(file))


def has_arrays_only(names: list[str]) -> bool:
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read the arrays as tensors, by name.

    Raises:
        ValueError: the file is damaged, or an array does not contain numbers (Python objects are never unpickled).
    """
    with BinaryFile(path) as file, name_damage(file.name):
        records = read_arrays(file)
        load_tensors(file, records.values())
        return {name: record.tensor for name, record in records.items() if record.tensor is not None}


def read_arrays(file: BinaryFile) -> dict[str, TensorRecord]:
    """Read the records of the arrays, by name."""
    archive = ZipArchive(file)
    return {name.removesuffix(".npy"): _record(archive, name) for name in archive.entries}


def _record(archive: ZipArchive, name: str) -> TensorRecord:
    storage = archive.storage(name)
    head = io.BytesIO(archive.read_head(name, _MAX_HEADER))
    version = np.lib.format.read_magic(head)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, numpy_dtype = read_header(head)
    start = head.tell()
    dtype = _DTYPES.get(numpy_dtype.str)
    if dtype is None:
        raise FileError(f"{archive.name}: {name} has the dtype {str(numpy_dtype)[:40]}, which is not supported.")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise FileError(f"{archive.name} is damaged: the shape of {name} is invalid.")
    if math.prod(shape) * dtype.itemsize != storage.nbytes - start:
        raise FileError(
            f"{archive.name} is damaged: {name} has {storage.nbytes - start} bytes, and its shape {shape} needs "
            f"{math.prod(shape) * dtype.itemsize}."
        )
    data = _without_header(storage, start)
    if not is_fortran:
        return contiguous_record(data, dtype, shape)
    transposed = contiguous_record(data, dtype, shape[::-1])
    return TensorRecord(data, dtype, 0, shape, transposed.stride[::-1])


def _without_header(storage: Storage, start: int) -> Storage:
    if storage.start is not None:
        return Storage(storage.nbytes - start, start=storage.start + start)
    unpack = storage.unpack
    assert unpack is not None
    return Storage(storage.nbytes - start, unpack=lambda: _copy_from(unpack(), start))


def _copy_from(whole: torch.UntypedStorage, start: int) -> torch.UntypedStorage:
    # The copy is aligned.
    return torch.empty(0, dtype=torch.uint8).set_(whole)[start:].clone().untyped_storage()
