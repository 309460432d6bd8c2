"""Zip archives: where the bytes of their entries are in the file."""

from __future__ import annotations

import struct
import zipfile

import torch

from .binary_file import BinaryFile, FileError
from .tensor_records import Storage

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field
_MAX_DEFLATE_RATIO = 1100  # deflate cannot do better than 1032
_CHUNK = 1 << 20


class ZipArchive:
    """A zip archive to read from.

    Raises:
        zipfile.BadZipFile, and whatever else zipfile raises on damaged archives: use it within `name_damage`.
    """

    def __init__(self, file: BinaryFile) -> None:
        self.file = file
        self.name = file.name
        self._archive = zipfile.ZipFile(file.file)
        self.entries = {info.filename: info for info in self._archive.infolist()}

    def read(self, name: str, limit: int) -> bytes:
        """The content of an entry, whose checksum is verified."""
        entry = self._checked(name)
        if entry.file_size > limit:
            raise FileError(f"{self.name} is damaged: {name} in it has {entry.file_size} bytes.")
        return self._archive.read(entry)

    def read_head(self, name: str, limit: int) -> bytes:
        """The first bytes of an entry; what follows is not verified."""
        with self._archive.open(self._checked(name)) as content:
            return content.read(limit)

    def storage(self, name: str) -> Storage:
        """The bytes of an entry, to be read later."""
        entry = self._checked(name)
        if entry.compress_type != zipfile.ZIP_STORED:
            return Storage(entry.file_size, unpack=lambda: self._unpack(entry))
        return Storage(entry.file_size, start=self._start(entry))

    def _checked(self, name: str) -> zipfile.ZipInfo:
        entry = self.entries.get(name)
        if entry is None:
            raise FileError(f"{self.name} is damaged: there is no {name} in it.")
        is_stored, is_deflated = (entry.compress_type == kind for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        packed, unpacked = entry.compress_size, entry.file_size
        is_possible = packed == unpacked if is_stored else is_deflated and unpacked <= packed * _MAX_DEFLATE_RATIO
        if not is_possible or packed > self.file.size or entry.flag_bits & 1:
            raise FileError(f"{self.name} is damaged: its directory has no valid sizes for {name}.")
        return entry

    def _start(self, entry: zipfile.ZipInfo) -> int:
        header = self.file.read(entry.header_offset, _LOCAL_HEADER.size)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        name_start = entry.header_offset + _LOCAL_HEADER.size
        start = name_start + name_length + extra_length
        named = self.file.read(name_start, name_length)
        if (
            signature != b"PK\x03\x04"
            or named != entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
            or start + entry.file_size > self.file.size
        ):
            raise FileError(f"{self.name} is damaged: {entry.filename} is not where its directory says.")
        return start

    def _unpack(self, entry: zipfile.ZipInfo) -> torch.UntypedStorage:
        memory = bytearray(entry.file_size)
        done = 0
        with self._archive.open(entry) as packed:
            while data := packed.read(_CHUNK):
                memory[done : done + len(data)] = data
                done += len(data)
        if done != entry.file_size:
            raise FileError(f"{self.name} is damaged: {entry.filename} in it is cut off.")
        return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage() if memory else torch.UntypedStorage(0)


def names_in_zip(file: BinaryFile) -> list[str]:
    """Names of the entries; none where the file is not a readable zip archive."""
    try:
        return list(ZipArchive(file).entries)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError, EOFError, OSError):
        return []
    finally:
        file.file.seek(0)
