"""A file that byte ranges are read from, straight into the memory of tensors, or mapped where nobody edits the file."""

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
_THREADS = 4  # more than two cores are good for, as they also wait for page faults
# Reading a cached file into new memory spends most of its time on page faults. One call that makes all pages of a
# piece present is twice as fast. (Huge pages can be faster still, or ten times slower: on virtual machines that return
# free memory to their host.)
_POPULATE_FROM = 256 << 10  # bytes
_MADV_POPULATE_WRITE = 23


class FileError(ValueError):
    """A file cannot be read as what it should be. The message names the file."""


@contextlib.contextmanager
def name_damage(name: str) -> Iterator[None]:
    """Raise FileError with the file's name for whatever a parser raises on bytes that make no sense.

    Errors of the disk stay OSErrors.
    """
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        # EINVAL: a position that a damaged header asked for.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
        raise FileError(f"{name} is damaged ({reason}). Was its copy or download interrupted?") from error


class BinaryFile:
    """A file of known size.

    Args:
        source: a path, or a binary file object that can seek (which stays open).
        name: for messages; the path if not given.
        is_mapped: `storage` maps the file instead of reading it. Only for files that nobody overwrites: a mapped file
            that is truncated kills the process, and one that is written to changes the tensors.
    """

    def __init__(self, source: Any, name: str = "", is_mapped: bool = False) -> None:
        self._is_own = not hasattr(source, "read")
        self.file: Any = open(source, "rb") if self._is_own else source  # noqa: SIM115 (closed by __exit__)
        self.name = name or (os.fspath(source) if self._is_own else "the file")
        self.is_mapped = is_mapped and self._is_own
        self.size: int = self.file.seek(0, os.SEEK_END)
        self.file.seek(0)
        self._mapping: torch.Tensor | None = None

    def __enter__(self) -> BinaryFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_own:
            self.file.close()

    def read(self, start: int, count: int) -> bytes:
        """Exactly `count` bytes."""
        self._check_range(start, count)
        self.file.seek(start)
        data = self.file.read(count)
        if len(data) != count:
            raise self._ends_early(start + len(data))
        return data

    def map(self, start: int, count: int) -> torch.UntypedStorage:
        """A private mapping of a range: writing to it never writes to the file."""
        self._check_range(start, count)
        if self._mapping is None:
            self._mapping = torch.from_file(self.name, shared=False, size=self.size, dtype=torch.uint8)
        return self._mapping.untyped_storage()[start : start + count]

    def fill(self, reads: list[tuple[torch.UntypedStorage, int]]) -> None:
        """Read into each storage as many bytes as it has, from the given position. Threads share the work."""
        pieces = []
        for storage, start in reads:
            self._check_range(start, storage.nbytes())
            view = _view(storage)
            pieces += [(view[at : at + _PIECE], start + at) for at in range(0, len(view), _PIECE)]
        if self._is_own and hasattr(os, "preadv") and sum(len(view) for view, _ in pieces) > _PIECE:
            with ThreadPoolExecutor(_THREADS) as pool:
                for _ in pool.map(lambda piece: self._read_at(*piece), pieces):
                    pass
        else:
            for view, start in pieces:
                self._read_in_turn(view, start)

    def _read_at(self, view: memoryview, start: int) -> None:
        _populate(view)
        done = 0
        while done < len(view):
            count = os.preadv(self.file.fileno(), [view[done:]], start + done)
            if count == 0:
                raise self._ends_early(start + done)
            done += count

    def _read_in_turn(self, view: memoryview, start: int) -> None:
        self.file.seek(start)
        done = 0
        while done < len(view):
            data = self.file.read(len(view) - done)
            if not data:
                raise self._ends_early(start + done)
            view[done : done + len(data)] = data
            done += len(data)

    def _check_range(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > self.size:
            raise self._ends_early(self.size)

    def _ends_early(self, position: int) -> FileError:
        return FileError(
            f"{self.name} is damaged: it ends at byte {position}, in the middle of its data. "
            "Was its copy or download interrupted?"
        )


def _view(storage: torch.UntypedStorage) -> memoryview:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data


def _populate(view: memoryview) -> None:
    """Make the whole pages of a view present. Kernels before 5.14 refuse, and pages appear when they are touched."""
    if len(view) < _POPULATE_FROM or not sys.platform.startswith("linux"):
        return
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + len(view) - start) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)
