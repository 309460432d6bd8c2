"""Tar archives as a stream of members, of files and pipes, compressed or not, whole or damaged.

Python's tarfile reads the headers of a member (long names, pax records) into memory whatever size they claim, inflates
bz2 and xz without bound, and passes over damage in silence. This reader holds one member at a time and only if it is
asked for, says where each begins, and goes on behind what is damaged at the next whole header.
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
from training.data.remote import is_local, open_stream

_BLOCK = 512
_CHUNK = 1 << 20  # what is skipped in a stream is read in such pieces
_BUFFER = 1 << 17
_HEADER_LIMIT = 1 << 20  # of a long name or of pax records
_NOTES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
# Formats by their first bytes. These readers inflate as much as is asked for, and hold no more.
_FORMATS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"\x5d\x00\x00": lzma.LZMAFile,
}


@contextlib.contextmanager
def opened(url: str) -> Iterator[TarStream]:
    """Open the archive at a path or URL."""
    if is_local(url):
        with open(url, "rb", buffering=_BUFFER) as local:
            yield TarStream(local, seekable=True)
        return
    stream = open_stream(url)
    try:
        yield TarStream(stream)
    except tarfile.TarError:
        stream.close()  # where the command of a pipe failed, that is the error
        raise
    except BaseException:
        # An epoch may end inside a shard: a pipe's command is not waited for, and that it complains is to be expected.
        command = getattr(stream, "proc", None)
        if command is not None:
            children.kill_tree(command.pid)  # the shell, and what it started
        with contextlib.suppress(OSError):
            stream.close()
        raise
    else:
        stream.close()


@dataclass(frozen=True)
class Member:
    """name: as text without control characters. offset: of its first header, in the uncompressed archive.

    after_damage: between the member before and this one there is something that is no member: damage, or an end mark.
    """

    name: str
    size: int
    offset: int
    is_file: bool
    after_damage: bool


class TarStream:
    """Members in order: `for member in stream`, and `contents()` of the latest one if it is wanted.

    damaged_blocks: how many blocks of 512 bytes were no header where one should be. has_end_mark: whether the archive
    says that it is complete. is_empty: not a byte was read.
    """

    def __init__(self, file: Any, seekable: bool = False) -> None:
        first = file.read(6)
        self._size: int | None = None  # where it is known, skipping is a seek
        inflating = next((reader for magic, reader in _FORMATS.items() if first.startswith(magic)), None)
        if seekable and inflating is None:
            self._size = os.fstat(file.fileno()).st_size
        if seekable:
            file.seek(0)
        else:
            file = _Rejoined(first, file)
        self._file = file if inflating is None else inflating(file)
        self._position = 0
        self._end = 0  # of the latest member, with its padding
        self._member: Member | None = None
        self.damaged_blocks = 0
        self.has_end_mark = False

    def start_at(self, offset: int) -> None:
        """Goes to a member's offset; before the first member is asked for.

        Raises:
            tarfile.ReadError: the archive is not as long.
        """
        self._end = offset
        self._go_to_end()

    def __iter__(self) -> Iterator[Member]:
        damage, notes = True, _Notes()
        while True:
            self._go_to_end()
            offset = self._position
            block = self._read(_BLOCK)
            if len(block) < _BLOCK:
                return
            self._end = self._position
            if block.count(0) == _BLOCK:
                self.has_end_mark, damage, notes = True, True, _Notes()
                continue
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
                if header.type in _NOTES:
                    self._take_notes(header, offset, notes)
                    continue
                size = header.size if notes.size is None else notes.size
                if size < 0:
                    raise tarfile.ReadError(f"{header.name} has a size of {size}")
            except (tarfile.TarError, ValueError):
                self.damaged_blocks += 1
                damage, notes = True, _Notes()
                continue
            self._pass_over_sparse_map(header, block)
            has_contents = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
            name = header.name if notes.name is None else notes.name
            self._end = self._position + (_padded(size) if has_contents else 0)
            is_file = header.isreg() and header.type != tarfile.GNUTYPE_SPARSE and not notes.sparse
            begin = offset if notes.offset is None else notes.offset
            self._member = Member(_printable(name), size, begin, is_file, damage)
            yield self._member
            damage, notes = False, _Notes()

    def contents(self) -> bytes:
        """Of the latest member.

        Raises:
            tarfile.ReadError: the archive breaks off in it.
        """
        assert self._member is not None
        data = self._read(self._member.size)
        if len(data) != self._member.size:
            raise tarfile.ReadError(f"unexpected end of data in {self._member.name}")
        return data

    @property
    def is_empty(self) -> bool:
        return self._position == 0

    def _take_notes(self, header: tarfile.TarInfo, offset: int, notes: _Notes) -> None:
        if not 0 <= header.size <= _HEADER_LIMIT:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        data = self._read(_padded(header.size))[: header.size]
        self._end = self._position
        if len(data) != header.size:
            raise tarfile.ReadError("unexpected end of data in a header")
        notes.offset = offset if notes.offset is None else notes.offset
        if header.type == tarfile.GNUTYPE_LONGNAME:
            notes.name = data.rstrip(b"\0").decode("utf-8", "backslashreplace")
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            notes.take_pax(data)

    def _pass_over_sparse_map(self, header: tarfile.TarInfo, block: bytes) -> None:
        more = header.type == tarfile.GNUTYPE_SPARSE and block[482] != 0
        while more:
            block = self._read(_BLOCK)
            more = len(block) == _BLOCK and block[504] != 0

    def _read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end."""
        data = self._file.read(size)
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        self._position += len(data)
        return data

    def _go_to_end(self) -> None:
        """To where the next header should be. That padding is missing at the very end is no damage to a member."""
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


class _Notes:
    """What headers before a member's own say of it."""

    def __init__(self) -> None:
        self.offset: int | None = None
        self.name: str | None = None
        self.size: int | None = None
        self.sparse = False

    def take_pax(self, data: bytes) -> None:
        """Records "LENGTH KEY=VALUE\\n". ValueError for what is none."""
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


class _Rejoined(io.RawIOBase):
    """A stream of which the first bytes were read, as if they were not."""

    def __init__(self, first: bytes, stream: Any) -> None:
        self._first, self._stream = first, stream

    def read(self, size: int = -1) -> bytes:
        if not self._first:
            return self._stream.read(size)
        first, self._first = (self._first, b"") if size < 0 else (self._first[:size], self._first[size:])
        return first


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _printable(name: str) -> str:
    """Names go into logs: without line ends and control characters."""
    return name if name.isprintable() else name.encode("unicode_escape").decode("ascii")
