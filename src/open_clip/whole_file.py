"""Files that are at every moment the old ones or the whole new ones."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike, is_synced: bool = False) -> Iterator[Path]:
    """A context in which a new file is written, which then gets the name `path` at once.

    The new file is in the folder of the old one (for a symbolic link, of the file that it points to) and is removed if
    the context fails. Its permissions are those of any new file.

    Args:
        is_synced: whether the file and its name survive a power cut once the context is left.

    Raises:
        OSError: the folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    # The suffix keeps it from being taken for a checkpoint.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.open("xb").close()
        permissions = temporary.stat().st_mode & 0o777
        yield temporary
        os.chmod(temporary, permissions)  # safetensors makes a private file
        if is_synced:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if is_synced:
        _sync_folder(target.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 file whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut; where folders cannot be opened (Windows), nothing."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
