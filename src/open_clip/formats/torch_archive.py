"""Files of `torch.save`: zip archives, and the format before torch 1.6 (pickles followed by the bytes of tensors)."""

from __future__ import annotations

from typing import Any

from .binary_file import BinaryFile, FileError
from .inert_pickle import InertUnpickler, unpickle
from .mapped_zip import ZipArchive
from .tensor_records import Storage

MAX_PICKLE = 256 << 20  # bytes; the pickle of a checkpoint with 1,000 tensors has 0.1 MB
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_zip(file: BinaryFile) -> tuple[Any, list[str]]:
    """Read a zip archive: (tree with tensor records, names of the foreign objects in it)."""
    archive = ZipArchive(file)
    root = archive_root(archive, "data.pkl")
    check_byteorder(archive, root)
    storages: dict[str, Storage] = {}

    def load_storage(key: str, nbytes: int) -> Storage:
        if key not in storages:
            storages[key] = archive.storage(f"{root}data/{key}")
        if storages[key].nbytes < nbytes:
            raise FileError(f"{file.name} is damaged: data/{key} has less than {nbytes} bytes.")
        return storages[key]

    return unpickle(archive.read(f"{root}data.pkl", MAX_PICKLE), load_storage)


def archive_root(archive: ZipArchive, entry: str) -> str:
    """Return the folder that contains all entries, with a trailing slash."""
    root = next((name[: -len(entry)] for name in archive.entries if name.endswith(f"/{entry}")), None)
    if root is None:
        raise FileError(f"{archive.name} is a zip archive without {entry}, so torch.save did not write it.")
    return root


def check_byteorder(archive: ZipArchive, root: str) -> None:
    if f"{root}byteorder" in archive.entries and archive.read(f"{root}byteorder", 100) != b"little":
        raise FileError(f"{archive.name} was written on a big-endian machine, which is not supported.")


def read_legacy(file: BinaryFile) -> tuple[Any, list[str]]:
    """Read a file in the format before torch 1.6, see `read_zip`."""
    stream, sizes = file.file, dict[str, int]()
    storages: dict[str, Storage] = {}

    def load_storage(key: str, nbytes: int) -> Storage:
        sizes[key] = max(nbytes, sizes.get(key, 0))
        return storages.setdefault(key, Storage(0))

    stream.seek(0)
    if InertUnpickler(stream, file.size).load() != _LEGACY_MAGIC:
        raise FileError(f"{file.name} is a pickle that torch.save did not write.")
    if InertUnpickler(stream, file.size).load() != _LEGACY_PROTOCOL:
        raise FileError(f"{file.name} is damaged: the version of its format is unknown.")
    system = InertUnpickler(stream, file.size).load()
    if not system.get("little_endian", True):
        raise FileError(f"{file.name} was written on a big-endian machine, which is not supported.")
    unpickler = InertUnpickler(stream, file.size, load_storage)
    tree = unpickler.load()
    position = None
    for key in InertUnpickler(stream, file.size).load():
        position = stream.tell() if position is None else position
        nbytes = sizes.pop(str(key))
        count = int.from_bytes(file.read(position, 8), "little")
        if count > nbytes or nbytes % max(count, 1):
            raise FileError(f"{file.name} is damaged: a storage of {nbytes} bytes has {count} elements.")
        storages[str(key)].nbytes, storages[str(key)].start = nbytes, position + 8
        position += 8 + nbytes
    if sizes or (position or 0) > file.size:
        raise FileError(f"{file.name} is damaged: it ends before its last tensor.")
    return tree, list(unpickler.foreign)
