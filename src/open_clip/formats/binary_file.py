"""Reading of byte ranges of a file directly into the memory of tensors, or memory-mapping if nobody edits the file."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch

_PIECE = 8 << 20  # bytes that one thread reads at a time
_THREADS = 4  # more threads than two cores could use, because they also wait for page faults
# Reading a cached file into new memory spends most of the time on page faults. Populating all pages of a piece with one
# call is twice as fast. (Huge pages can be faster still, but are ten times slower on virtual machines that return free
# memory to their host.)
_POPULATE_FROM = 256 << 10  # minimum number of bytes
_MADV_POPULATE_WRITE = 23


class FileError(ValueError):
    """A file is damaged or has another format. The message names the file."""


@contextlib.contextmanager
def name_damage(name: str) -> Iterator[None]:
    """Convert exceptions that a parser raises for a damaged file to FileError with the name of the file.

    An OSError of the disk is not converted.
    """
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        # EINVAL is caused by an invalid position in a damaged header.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
        raise FileError(f"{name} is damaged ({reason}). Was its copy or download interrupted?") from error


class BinaryFile:
    """A file of known size.

    Args:
        source: path, or seekable binary file object (which is not closed).
        name: name in messages; the path by default.
        is_mapped: whether `load_tensors` memory-maps the file instead of reading it. Only for files that nobody
            overwrites: truncating a mapped file kills the process, and writing to it changes the tensors.
    """

    def __init__(self, source: Any, name: str = "", is_mapped: bool = False) -> None:
        self._is_opened_here = not hasattr(source, "read")
        self.file: Any = open(source, "rb") if self._is_opened_here else source  # noqa: SIM115 (closed by __exit__)
        self.name = name or (os.fspath(source) if self._is_opened_here else "the file")
        self.is_mapped = is_mapped and self._is_opened_here
        self.size: int = self.file.seek(0, os.SEEK_END)
        self.file.seek(0)
        self._mapping: torch.Tensor | None = None

    def __enter__(self) -> BinaryFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_opened_here:
            self.file.close()

    def read(self, start: int, count: int) -> bytes:
        """Read exactly `count` bytes."""
        self._check_range(start, count)
        self.file.seek(start)
        data = self.file.read(count)
        if len(data) != count:
            raise self._cut_off_error(start + len(data))
        return data

    def map(self, start: int, count: int) -> torch.UntypedStorage:
        """Return a private mapping of a range. Writing to it does not change the file."""
        self._check_range(start, count)
        if self._mapping is None:
            self._mapping = torch.from_file(self.name, shared=False, size=self.size, dtype=torch.uint8)
        return self._mapping.untyped_storage()[start : start + count]

    def fill(self, reads: list[tuple[torch.UntypedStorage, int]]) -> None:
        """Fill each storage with bytes from the given position. Several threads share the work."""
        pieces = []
        for storage, start in reads:
            self._check_range(start, storage.nbytes())
            view = _view(storage)
            pieces += [(view[at : at + _PIECE], start + at) for at in range(0, len(view), _PIECE)]
        if self._is_opened_here and hasattr(os, "preadv") and sum(len(view) for view, _ in pieces) > _PIECE:
            with ThreadPoolExecutor(_THREADS) as pool:
                for _ in pool.map(lambda piece: self._read_at(*piece), pieces):
                    pass
        else:
            for view, start in pieces:
                self._read_sequentially(view, start)

    def _read_at(self, view: memoryview, start: int) -> None:
        _populate(view)
        done = 0
        while done < len(view):
            count = os.preadv(self.file.fileno(), [view[done:]], start + done)
            if count == 0:
                raise self._cut_off_error(start + done)
            done += count

    def _read_sequentially(self, view: memoryview, start: int) -> None:
        self.file.seek(start)
        done = 0
        while done < len(view):
            data = self.file.read(len(view) - done)
            if not data:
                raise self._cut_off_error(start + done)
            view[done : done + len(data)] = data
            done += len(data)

    def _check_range(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > self.size:
            raise self._cut_off_error(self.size)

    def _cut_off_error(self, position: int) -> FileError:
        return FileError(
            f"{self.name} is damaged: it ends at byte {position}, in the middle of its data. "
            "Was its copy or download interrupted?"
        )


def _view(storage: torch.UntypedStorage) -> memoryview:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data


def _populate(view: memoryview) -> None:
    """Populate the whole pages of a view. Kernels before 5.14 fail, and then pages are populated on first access."""
    if len(view) < _POPULATE_FROM or not sys.platform.startswith("linux"):
        return
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + len(view) - start) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)
