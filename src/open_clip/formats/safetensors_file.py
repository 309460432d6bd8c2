"""Safetensors files: a JSON header with the position of each tensor, followed by the bytes."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from .binary_file import BinaryFile, FileError
from .tensor_records import Storage, TensorRecord, contiguous_record

MAX_HEADER = 100 << 20  # bytes, as in safetensors itself

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def read_safetensors(file: BinaryFile) -> dict[str, TensorRecord]:
    """Read the records of the tensors, by name."""
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        raise FileError(f"{file.name} is damaged: its header claims {length} bytes.")
    header = json.loads(file.read(8, length))
    header.pop("__metadata__", None)
    return {name: _record(file, name, entry, 8 + length) for name, entry in header.items()}


def _record(file: BinaryFile, name: str, entry: dict[str, Any], base: int) -> TensorRecord:
    dtype = getattr(torch, _DTYPES.get(entry["dtype"], ""), None)
    if dtype is None:
        kind = str(entry["dtype"])[:20]
        raise FileError(f"{file.name}: {name[:80]!r} has the dtype {kind!r}, which is not supported.")
    shape, (first, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, first, end)) or end < first:
        raise FileError(f"{file.name} is damaged: the shape or position of {name[:80]!r} is invalid.")
    if math.prod(shape) * dtype.itemsize != end - first or base + end > file.size:
        raise FileError(
            f"{file.name} is damaged: {name[:80]!r} of shape {list(shape)} has {end - first} bytes, and "
            f"the file has {file.size}. Was its copy or download interrupted?"
        )
    return contiguous_record(Storage(end - first, start=base + first), dtype, shape)
