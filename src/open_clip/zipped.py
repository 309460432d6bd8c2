"""Zip archives whose entries are memory-mapped where they lie, if they are stored as they are (not compressed)."""

from __future__ import annotations

import os
import struct
import zipfile

import torch

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field


class MappedZip(zipfile.ZipFile):
    """A zip archive to read from.

    The pages of what is mapped are private: a page is read when it is touched, and writing to it never writes to the
    file. The memory stays when the archive is closed.

    Raises:
        zipfile.BadZipFile: it is none, or cut off.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(path)
        self.path = os.fspath(path)
        self.size = os.path.getsize(path)
        self._mapped = torch.UntypedStorage.from_file(self.path, False, self.size)

    def storage(self, entry: zipfile.ZipInfo) -> torch.UntypedStorage:
        """The bytes of an entry."""
        if entry.compress_type != zipfile.ZIP_STORED:
            return torch.frombuffer(bytearray(self.read(entry)), dtype=torch.uint8).untyped_storage()
        with open(self.path, "rb") as file:
            file.seek(entry.header_offset)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\x03\x04" or start + entry.file_size > self.size:
            raise ValueError(f"{self.path}: entry {entry.filename} lies outside of the file")
        return self._mapped[start : start + entry.file_size]
