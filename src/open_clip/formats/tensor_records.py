"""Records of the tensors in a file, and the loading of these tensors.

A reader first parses the layout of a file into `TensorRecord`s. Then `load_tensors` reads the bytes of the selected
tensors once, each into separate memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .binary_file import BinaryFile, FileError

# Limits for malicious files. The elements of an expanded tensor share memory, and several tensors may share memory.
_MAX_EXPANDED = 64 << 20  # bytes of an expanded tensor, if the file is smaller
_MAX_REPEATS = 8  # total size of all tensors, as a multiple of the size of the file

DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}


@dataclass(eq=False)
class Storage:
    """A range of bytes in a file that tensors are views of.

    Attributes:
        nbytes: number of bytes.
        start: position in the file. None: the bytes are compressed, and `unpack` returns them.
        unpack: decompresses the bytes.
    """

    nbytes: int
    start: int | None = None
    unpack: Callable[[], torch.UntypedStorage] | None = None


@dataclass(eq=False)
class TensorRecord:
    """A tensor in a file.

    Attributes:
        storage: the bytes it is a view of.
        dtype: its dtype.
        offset: offset in the storage, in elements.
        shape: its shape.
        stride: its strides, in elements.
        tensor: the tensor itself, once `load_tensors` has read it.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    tensor: torch.Tensor | None = field(default=None, repr=False)

    def check(self, name: str) -> None:
        """Raise FileError if the shape is invalid or an element is outside the storage."""
        numbers = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
            raise FileError(f"{name} is damaged: the shape or stride of a tensor is invalid.")
        if self.numel and self.span()[1] > self.storage.nbytes:
            raise FileError(
                f"{name} is damaged: a tensor of shape {list(self.shape)} exceeds its storage of "
                f"{self.storage.nbytes} bytes."
            )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def span(self) -> tuple[int, int]:
        """Return the range of bytes in the storage that contains its elements."""
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset * self.dtype.itemsize, (last + 1) * self.dtype.itemsize

    def is_compact(self) -> bool:
        """Whether its elements fill at least half of their range and do not overlap."""
        first, end = self.span()
        return end - first <= 2 * self.nbytes and self.nbytes <= end - first

    def view(self, storage: torch.UntypedStorage, offset: int) -> torch.Tensor:
        return torch.empty(0, dtype=self.dtype).set_(storage, offset, self.shape, self.stride)


def contiguous_record(storage: Storage, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorRecord:
    """Create the record of a tensor that fills a storage in C order."""
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return TensorRecord(storage, dtype, 0, shape, stride)


def load_tensors(file: BinaryFile, records: Iterable[TensorRecord]) -> None:
    """Read the tensor of each record and store it there. The tensors share no memory, and keep no unused memory.

    Raises:
        FileError: the file is damaged: a tensor is not inside it.
    """
    records = list(records)
    check_records(file, records)
    direct: list[TensorRecord] = []
    by_storage: dict[Storage, list[TensorRecord]] = {}
    for record in records:
        if not record.numel:
            record.tensor = torch.empty(record.shape, dtype=record.dtype)
        elif record.storage.start is not None and record.is_compact():
            direct.append(record)
        else:
            by_storage.setdefault(record.storage, []).append(record)
    _map(file, direct) if file.is_mapped else _read(file, direct)
    for storage, views in by_storage.items():
        whole = _read_storage(file, storage)
        for record in views:
            record.tensor = record.view(whole, record.offset).clone(memory_format=torch.contiguous_format)


def check_records(file: BinaryFile, records: list[TensorRecord]) -> None:
    """Raise FileError if a tensor is outside the file, or if the tensors are much larger than the file."""
    for record in records:
        record.check(file.name)
        start, (first, end) = record.storage.start, record.span()
        if start is not None and record.numel and start + end > file.size:
            raise FileError(f"{file.name} is damaged: it ends before its last tensor. Was its copy interrupted?")
        if record.nbytes > max(end - first, file.size, _MAX_EXPANDED):
            raise FileError(
                f"{file.name} is damaged: a tensor of shape {list(record.shape)} repeats {end - first} bytes."
            )
    total = sum(record.nbytes for record in records if record.storage.start is not None)
    if total > _MAX_REPEATS * max(file.size, _MAX_EXPANDED):
        raise FileError(
            f"{file.name} is damaged: {len(records)} tensors of {total} bytes in total share {file.size} bytes."
        )


def _read(file: BinaryFile, records: list[TensorRecord]) -> None:
    reads = []
    for record in records:
        first, end = record.span()
        assert record.storage.start is not None
        memory = torch.UntypedStorage(end - first)
        reads.append((memory, record.storage.start + first))
        record.tensor = record.view(memory, 0)
    file.fill(reads)


def _map(file: BinaryFile, records: list[TensorRecord]) -> None:
    seen: set[Storage] = set()
    for record in records:
        start = record.storage.start
        assert start is not None
        tensor = record.view(file.map(start, record.storage.nbytes), record.offset)
        is_shared, is_aligned = record.storage in seen, start % record.dtype.itemsize == 0
        record.tensor = tensor.clone() if is_shared or not is_aligned else tensor
        seen.add(record.storage)


def _read_storage(file: BinaryFile, storage: Storage) -> torch.UntypedStorage:
    if storage.start is None:
        assert storage.unpack is not None
        return storage.unpack()
    memory = torch.UntypedStorage(storage.nbytes)
    file.fill([(memory, storage.start)])
    return memory
