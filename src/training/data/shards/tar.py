"""Reads tar archives as a stream of members, from files and pipes, compressed or not, also if they are damaged.

Python's tarfile reads long names and pax records of any claimed size into memory, decompresses bz2 and xz without
a limit, and skips damage silently. This reader reads the contents of a member only on request, gives its offset, and
continues after damage at the next valid header.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from training import children
from training.data.shards.remote import is_local, open_stream

_BLOCK = 512
_CHUNK = 1 << 20  # of bytes that are skipped in a stream
_BUFFER = 1 << 17
_HEADER_LIMIT = 1 << 20  # bytes of a long name or of pax records
_EXTENDED_HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
# Compression formats by their first bytes. These readers decompress only as many bytes as are read.
_FORMATS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"\x5d\x00\x00": lzma.LZMAFile,
}


@contextlib.contextmanager
def open_tar(url: str) -> Iterator[TarStream]:
    """Open the archive at a path or URL."""
    if is_local(url):
        with open(url, "rb", buffering=_BUFFER) as local:
            yield TarStream(local, seekable=True)
        return
    stream = open_stream(url)
    try:
        yield TarStream(stream)
    except tarfile.TarError:
        stream.close()  # raises if the command of a pipe failed, which is then the cause
        raise
    except BaseException:
        # An epoch may end within a shard. Do not wait for the command of a pipe, and ignore its errors.
        command = getattr(stream, "proc", None)
        if command is not None:
            children.kill_tree(command.pid)  # the shell and its children
        with contextlib.suppress(OSError):
            stream.close()
        raise
    else:
        stream.close()


@dataclass(frozen=True)
class Member:
    """A member of an archive.

    Attributes:
        name: without control characters.
        size: of the contents in bytes.
        offset: of its first header, in the uncompressed archive.
        is_file: whether it is a regular file.
        after_damage: whether damage or an end mark is between the previous member and this one.
    """

    name: str
    size: int
    offset: int
    is_file: bool
    after_damage: bool


class TarStream:
    """An iterator over the members of an archive. `contents()` reads the contents of the latest one.

    Attributes:
        damaged_blocks: how many blocks of 512 bytes are not headers where a header should be.
        has_end_mark: whether the archive has the end mark of a complete one.
        is_empty: whether no byte was read.
    """

    def __init__(self, file: Any, seekable: bool = False) -> None:
        first = file.read(6)
        self._size: int | None = None  # if known, skipping is a seek
        decompressor = next((reader for magic, reader in _FORMATS.items() if first.startswith(magic)), None)
        if seekable and decompressor is None:
            self._size = os.fstat(file.fileno()).st_size
        if seekable:
            file.seek(0)
        else:
            file = _PrefixedStream(first, file)
        self._file = file if decompressor is None else decompressor(file)
        self._position = 0
        self._end = 0  # of the latest member, including its padding
        self._member: Member | None = None
        self.damaged_blocks = 0
        self.has_end_mark = False

    def start_at(self, offset: int) -> None:
        """Go to the offset of a member. Call this before the iteration.

        Raises:
            tarfile.ReadError: the archive is shorter.
        """
        self._end = offset
        self._go_to_end()

    def __iter__(self) -> Iterator[Member]:
        damage, extended = True, _ExtendedHeader()
        while True:
            self._go_to_end()
            offset = self._position
            block = self._read(_BLOCK)
            if len(block) < _BLOCK:
                return
            self._end = self._position
            if block.count(0) == _BLOCK:
                self.has_end_mark, damage, extended = True, True, _ExtendedHeader()
                continue
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
                if header.type in _EXTENDED_HEADERS:
                    self._read_extended_header(header, offset, extended)
                    continue
                size = header.size if extended.size is None else extended.size
                if size < 0:
                    raise tarfile.ReadError(f"{header.name} has a size of {size}")
            except (tarfile.TarError, ValueError):
                self.damaged_blocks += 1
                damage, extended = True, _ExtendedHeader()
                continue
            self._skip_sparse_map(header, block)
            has_contents = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
            name = header.name if extended.name is None else extended.name
            self._end = self._position + (_padded(size) if has_contents else 0)
            is_file = header.isreg() and header.type != tarfile.GNUTYPE_SPARSE and not extended.sparse
            start = offset if extended.offset is None else extended.offset
            self._member = Member(_escape(name), size, start, is_file, damage)
            yield self._member
            damage, extended = False, _ExtendedHeader()

    def contents(self) -> bytes:
        """Read the contents of the latest member.

        Raises:
            tarfile.ReadError: the archive ends within it.
        """
        assert self._member is not None
        data = self._read(self._member.size)
        if len(data) != self._member.size:
            raise tarfile.ReadError(f"unexpected end of data in {self._member.name}")
        return data

    @property
    def is_empty(self) -> bool:
        return self._position == 0

    def _read_extended_header(self, header: tarfile.TarInfo, offset: int, extended: _ExtendedHeader) -> None:
        if not 0 <= header.size <= _HEADER_LIMIT:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        data = self._read(_padded(header.size))[: header.size]
        self._end = self._position
        if len(data) != header.size:
            raise tarfile.ReadError("unexpected end of data in a header")
        extended.offset = offset if extended.offset is None else extended.offset
        if header.type == tarfile.GNUTYPE_LONGNAME:
            extended.name = data.rstrip(b"\0").decode("utf-8", "backslashreplace")
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended.parse_pax(data)

    def _skip_sparse_map(self, header: tarfile.TarInfo, block: bytes) -> None:
        more = header.type == tarfile.GNUTYPE_SPARSE and block[482] != 0
        while more:
            block = self._read(_BLOCK)
            more = len(block) == _BLOCK and block[504] != 0

    def _read(self, size: int) -> bytes:
        """Read `size` bytes, or fewer at the end of the file."""
        data = self._file.read(size)
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        self._position += len(data)
        return data

    def _go_to_end(self) -> None:
        """Go to the next header. Missing padding at the end of the file is not an error."""
        missing = self._end - self._position
        if self._size is not None:
            if self._end > self._size + _BLOCK:
                raise tarfile.ReadError(f"unexpected end of data at {self._size} bytes of {self._end}")
            self._file.seek(self._end)
            self._position = self._end
            return
        while missing > 0:
            read = len(self._read(min(missing, _CHUNK)))
            missing -= read
            if not read and missing >= _BLOCK:
                raise tarfile.ReadError(f"unexpected end of data, {missing} bytes early")
            if not read:
                return


class _ExtendedHeader:
    """What the headers before the main header of a member say about it."""

    def __init__(self) -> None:
        self.offset: int | None = None
        self.name: str | None = None
        self.size: int | None = None
        self.sparse = False

    def parse_pax(self, data: bytes) -> None:
        """Parse records "LENGTH KEY=VALUE\\n". Raises ValueError for anything else."""
        while data.strip(b"\0"):
            digits, _, _ = data.partition(b" ")
            length = int(digits)
            if not len(digits) + 2 < length <= len(data):
                raise ValueError(f"a record of {length} bytes")
            key, _, value = data[len(digits) + 1 : length - 1].partition(b"=")
            if key == b"path":
                self.name = value.decode("utf-8", "backslashreplace")
            elif key == b"size":
                self.size = int(value)
            elif key.startswith(b"GNU.sparse."):
                self.sparse = True
            data = data[length:]


class _PrefixedStream(io.RawIOBase):
    """A stream whose first bytes have been read already, and are read again."""

    def __init__(self, first: bytes, stream: Any) -> None:
        self._first, self._stream = first, stream

    def read(self, size: int = -1) -> bytes:
        if not self._first:
            return self._stream.read(size)
        first, self._first = (self._first, b"") if size < 0 else (self._first[:size], self._first[size:])
        return first


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _escape(name: str) -> str:
    """Escape line ends and control characters, because names are logged."""
    return name if name.isprintable() else name.encode("unicode_escape").decode("ascii")
