"""Folders of torch.distributed.checkpoint (DCP), read without running anything in them.

`.metadata` is a pickle. It lists the tensors, the chunks of each tensor, and where each chunk is: in the file
`__RANK_0.distcp` at some offset. A chunk is a complete file of `torch.save`, with its checksums.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .binary_file import BinaryFile, FileError, name_damage
from .inert_pickle import AllowedFunction, Foreign, InertUnpickler, is_foreign, replace_records, to_plain_tree
from .tensor_records import TensorRecord, load_tensors
from .torch_archive import read_zip

METADATA = ".metadata"
_MAX_METADATA = 1 << 30  # bytes; 1,000 tensors on 1,000 ranks have about 100 MB
_BUFFER = 1 << 20
_RECORDS = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties",
                 "TensorStorageMetadata")
} | {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}  # fmt: skip

Opener = Callable[[str], Any]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, or a pickled object, in a file.

    Attributes:
        offsets, sizes: the part of the tensor.
        file: name of the file in the folder.
        start, nbytes: range of bytes in the file.
    """

    offsets: Sizes
    sizes: Sizes
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor in the folder."""

    shape: Sizes
    dtype: torch.dtype
    chunks: list[Chunk] = field(default_factory=list)


class ShardedFolder:
    """A DCP folder.

    Attributes:
        tensors: by their names, such as "model.visual.proj".
        objects: chunks of pickled objects, by their names.
    """

    def __init__(self, path: str, open_file: Opener | None = None) -> None:
        """Read `.metadata`.

        Args:
            path: the folder.
            open_file: opens a file of the folder by name for reading; by default from the local disk.

        Raises:
            FileNotFoundError: there is no `.metadata`.
            FileError: it is damaged.
        """
        self.path = path
        self._open_file = open_file or (lambda name: (Path(path) / name).open("rb"))
        self.tensors: dict[str, ChunkedTensor] = {}
        self.objects: dict[str, Chunk] = {}
        with self._open_file(METADATA) as file, name_damage(f"{path}/{METADATA}"):
            self._parse(file.read(_MAX_METADATA))

    def _parse(self, data: bytes) -> None:
        metadata = _MetadataUnpickler(io.BytesIO(data), len(data)).load()
        places = {(key.state["fqn"], _sizes(key.state.get("offset"))): info.state
                  for key, info in metadata.state["storage_data"].items()}  # fmt: skip
        for name, entry in metadata.state["state_dict_metadata"].items():
            if "size" not in entry.state:  # BytesStorageMetadata
                self.objects[name] = _chunk((), (), places[name, ()])
                continue
            shape, dtype = _sizes(entry.state["size"]), entry.state["properties"].state[0]
            if not isinstance(dtype, torch.dtype):
                raise FileError(f"{self.path}/{METADATA} is damaged: {name[:80]!r} has no dtype.")
            parts = [(_sizes(part.state["offsets"]), _sizes(part.state["sizes"])) for part in entry.state["chunks"]]
            chunks = [_chunk(offsets, sizes, places[name, offsets]) for offsets, sizes in parts]
            self.tensors[name] = ChunkedTensor(shape, dtype, chunks)
            self._check_chunks(name)

    def _check_chunks(self, name: str) -> None:
        tensor = self.tensors[name]
        inside = all(
            len(tensor.shape) == len(chunk.offsets) == len(chunk.sizes)
            and all(
                at + size <= whole for at, size, whole in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
            )
            and math.prod(chunk.sizes) * tensor.dtype.itemsize <= chunk.nbytes
            for chunk in tensor.chunks
        )
        if not inside or sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.shape):
            raise FileError(f"{self.path}/{METADATA} is damaged: the chunks of {name[:80]!r} do not cover it.")

    def read(self, name: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> Tensor:
        """Read a tensor, or a part of it.

        Args:
            offsets, sizes: the part; None: the whole tensor.

        Raises:
            FileNotFoundError: a file of the folder is missing.
            FileError: a file is damaged.
        """
        tensor = self.tensors[name]
        offsets = (0,) * len(tensor.shape) if offsets is None else tuple(offsets)
        sizes = tensor.shape if sizes is None else tuple(sizes)
        result = torch.empty(sizes, dtype=tensor.dtype)
        for chunk in tensor.chunks:
            ranges = [
                (max(a, c), min(a + n, c + m))
                for a, n, c, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(first < end for first, end in ranges):
                values = self._read_chunk(chunk, tensor.dtype)
                target = tuple(slice(first - a, end - a) for (first, end), a in zip(ranges, offsets, strict=True))
                source = tuple(slice(first - c, end - c) for (first, end), c in zip(ranges, chunk.offsets, strict=True))
                result[target] = values[source]
        return result

    def _read_chunk(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        tree = self._read_blob(chunk)
        if not isinstance(tree, Tensor) or tree.shape != chunk.sizes or tree.dtype != dtype:
            raise FileError(f"{self.path}/{chunk.file} is damaged: a chunk differs from {METADATA}.")
        return tree

    def read_object(self, name: str) -> Any:
        """Read a pickled object: tensors, numbers and containers. Other objects are dropped."""
        return self._read_blob(self.objects[name])

    def _read_blob(self, chunk: Chunk) -> Any:
        name = f"{self.path}/{chunk.file}"
        with self._open_file(chunk.file) as raw, name_damage(name):
            blob = BinaryFile(_slice(raw, chunk), name)
            tree, _ = read_zip(blob)
            if isinstance(tree, TensorRecord):
                load_tensors(blob, [tree])
                return tree.tensor
            if is_foreign(tree):
                return None
            tree, records = to_plain_tree(tree, name)
            load_tensors(blob, records)
            return replace_records(tree, name)

    def verify_checksums(self) -> None:
        """Read all chunks and verify their checksums.

        Raises:
            FileNotFoundError: a file is missing.
            FileError: a chunk is damaged.
        """
        chunks = [chunk for tensor in self.tensors.values() for chunk in tensor.chunks] + list(self.objects.values())
        for file_name in sorted({chunk.file for chunk in chunks}):
            self._check_file(file_name, (chunk for chunk in chunks if chunk.file == file_name))

    def _check_file(self, file_name: str, chunks: Iterable[Chunk]) -> None:
        name = f"{self.path}/{file_name}"
        with self._open_file(file_name) as raw, name_damage(name):
            for chunk in chunks:
                with zipfile.ZipFile(_slice(raw, chunk)) as archive:
                    if archive.testzip() is not None:
                        raise FileError(f"{name} is damaged: the checksum of a chunk at byte {chunk.start} is wrong.")


class _Record(Foreign):
    """The fields of an object of DCP."""

    __slots__ = ("state",)

    def set_state(self, state: Any) -> None:
        self.state = state


class _MetadataUnpickler(InertUnpickler):
    """Builds the objects that describe tensors as records of their fields."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return AllowedFunction(lambda: _with_state(_Record(name)))
        return super().find_class(module, name)


def _with_state(record: _Record) -> _Record:
    record.state = {}
    return record


def _sizes(value: Any) -> Sizes:
    if value is None or is_foreign(value):
        return ()
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
        raise FileError("A size is not a number.")
    return tuple(value)


def _chunk(offsets: Sizes, sizes: Sizes, place: dict[str, Any]) -> Chunk:
    file, start, nbytes = place["relative_path"], place["offset"], place["length"]
    if not isinstance(file, str) or Path(file).name != file or "\\" in file:
        raise FileError(f"A chunk is in the file {str(file)[:80]!r}, which is outside the folder.")
    if place.get("transform_descriptors"):
        raise FileError("Its chunks are compressed or encrypted, which is not supported.")
    if type(start) is not int or type(nbytes) is not int or start < 0 or nbytes < 0:
        raise FileError("The position of a chunk is not a number.")
    return Chunk(offsets, sizes, file, start, nbytes)


def _slice(raw: Any, chunk: Chunk) -> io.BufferedReader:
    return io.BufferedReader(_Slice(raw, chunk.start, chunk.nbytes), _BUFFER)


class _Slice(io.RawIOBase):
    """A range of bytes of a file, as a file."""

    def __init__(self, raw: Any, start: int, nbytes: int) -> None:
        self._raw, self._start, self._nbytes, self._at = raw, start, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._raw.seek(self._start + self._at)
        data = self._raw.read(max(min(len(buffer), self._nbytes - self._at), 0))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
