"""Zip archives: find the bytes of each entry in the file."""

from __future__ import annotations

import struct
import zipfile

import torch

from .binary_file import BinaryFile, FileError
from .tensor_records import Storage

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field
_MAX_DEFLATE_RATIO = 1100  # the maximum of deflate is 1032
_CHUNK = 1 << 20


class ZipArchive:
    """A zip archive that is read.

    For damaged archives, the methods raise zipfile.BadZipFile and other exceptions of zipfile: call them within
    `name_damage`.
    """

    def __init__(self, file: BinaryFile) -> None:
        self.file = file
        self.name = file.name
        self._archive = zipfile.ZipFile(file.file)
        self.entries = {info.filename: info for info in self._archive.infolist()}

    def read(self, name: str, limit: int) -> bytes:
        """Read an entry of at most `limit` bytes and verify its checksum."""
        entry = self._check_entry(name)
        if entry.file_size > limit:
            raise FileError(f"{self.name} is damaged: {name} has {entry.file_size} bytes, more than {limit}.")
        return self._archive.read(entry)

    def read_head(self, name: str, limit: int) -> bytes:
        """Read the first bytes of an entry, without verifying its checksum."""
        with self._archive.open(self._check_entry(name)) as content:
            return content.read(limit)

    def storage(self, name: str) -> Storage:
        """Return the storage of an entry. Its bytes are read later."""
        entry = self._check_entry(name)
        if entry.compress_type != zipfile.ZIP_STORED:
            return Storage(entry.file_size, unpack=lambda: self._unpack(entry))
        return Storage(entry.file_size, start=self._find_start(entry))

    def _check_entry(self, name: str) -> zipfile.ZipInfo:
        entry = self.entries.get(name)
        if entry is None:
            raise FileError(f"{self.name} is damaged: it has no entry {name}.")
        is_stored, is_deflated = (entry.compress_type == kind for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        packed, unpacked = entry.compress_size, entry.file_size
        is_possible = packed == unpacked if is_stored else is_deflated and unpacked <= packed * _MAX_DEFLATE_RATIO
        if not is_possible or packed > self.file.size or entry.flag_bits & 1:
            raise FileError(f"{self.name} is damaged: its directory has invalid sizes for {name}.")
        return entry

    def _find_start(self, entry: zipfile.ZipInfo) -> int:
        header = self.file.read(entry.header_offset, _LOCAL_HEADER.size)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        name_start = entry.header_offset + _LOCAL_HEADER.size
        start = name_start + name_length + extra_length
        found_name = self.file.read(name_start, name_length)
        if (
            signature != b"PK\x03\x04"
            or found_name != entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
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
            raise FileError(f"{self.name} is damaged: {entry.filename} is cut off.")
        return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage() if memory else torch.UntypedStorage(0)


def names_in_zip(file: BinaryFile) -> list[str]:
    """List the names of the entries; an empty list if the file is not a readable zip archive."""
    try:
        return list(ZipArchive(file).entries)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError, EOFError, OSError):
        return []
    finally:
        file.file.seek(0)
