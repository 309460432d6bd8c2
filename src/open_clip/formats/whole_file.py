"""Atomic replacement of files: readers see either the old file or the complete new one."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike, is_synced: bool = False) -> Iterator[Path]:
    """Context that yields the path of a temporary file and, on exit, renames it to `path`.

    The temporary file is in the folder of `path` (of the target, if that is a symbolic link). It is removed if the
    context raises. The new file has the default permissions.

    Args:
        path: the file to replace.
        is_synced: whether to sync the file and its folder to disk, so that they survive a power failure.

    Raises:
        OSError: the folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    # The suffix keeps it from being mistaken for a checkpoint.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.open("xb").close()
        permissions = temporary.stat().st_mode & 0o777
        yield temporary
        os.chmod(temporary, permissions)  # safetensors creates a file that only its owner can read
        if is_synced:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if is_synced:
        sync_folder(target.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Sync a folder so that a rename in it survives a power failure. Windows cannot open folders; do nothing there."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
