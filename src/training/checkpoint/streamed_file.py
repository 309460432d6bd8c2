"""Writing a file in the format of `torch.save`, one tensor after another, from tensors that are stored elsewhere."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_clip.formats.tensor_records import DTYPES
from open_clip.formats.whole_file import replacing
from training.checkpoint.stored_tensor import StoredTensor

_STORAGES = {dtype: name for name, dtype in DTYPES.items() if name != "UntypedStorage"}
_ROOT = "archive"
_ALIGNMENT = 64  # bytes, as torch.save
_PIECE = 64 << 20


def save(content: Any, path: Path, advance: Callable[[int], None] = lambda nbytes: None) -> None:
    """Write nested containers with tensors, which may be `StoredTensor`s. Only one tensor is in memory at a time.

    The file is complete or does not exist, as with `file_utils.pt_save`.

    Args:
        advance: called with the number of bytes after each tensor.

    Raises:
        OSError: writing failed.
        ValueError: a stored tensor is damaged.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(content)
    with replacing(path, is_synced=True) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _write(archive, "data.pkl", stream.getvalue())
        _write(archive, "byteorder", b"little")
        for key, tensor in enumerate(pickler.tensors):
            values = tensor.read() if isinstance(tensor, StoredTensor) else tensor.detach().cpu()
            _write(archive, f"data/{key}", values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            advance(values.numel() * values.element_size())
        _write(archive, "version", b"3\n")


class _Storage:
    """The bytes of a tensor, by the number of their entry."""

    def __init__(self, key: int, tensor: Tensor) -> None:
        self.key, self.dtype, self.numel = key, tensor.dtype, tensor.numel()


class _Pickler(pickle.Pickler):
    """Pickles tensors as `torch.save` does, without their values.

    Attributes:
        tensors: in the order of their entries.
    """

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)
        self.tensors: list[Tensor] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        storage = _Storage(len(self.tensors), value)
        self.tensors.append(value)
        stride = torch.empty(value.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(value.shape), stride, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        return "storage", getattr(torch, _STORAGES[value.dtype]), str(value.key), "cpu", value.numel


def _write(archive: zipfile.ZipFile, name: str, data: Any) -> None:
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")
    info.file_size = len(data)
    is_large = info.file_size * 1.05 > zipfile.ZIP64_LIMIT  # zipfile then adds an extra field of 20 bytes
    assert archive.fp is not None
    start = archive.fp.tell() + 30 + len(info.filename) + (20 if is_large else 0) + 4
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=is_large) as entry:
        for at in range(0, len(data), _PIECE):
            entry.write(data[at : at + _PIECE])
