"""Checksums of downloads."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from .. import progress
from ..formats.whole_file import write_text

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20  # bytes read at a time


def expected_sha256(url: str) -> str:
    """Return the SHA-256 that the URL contains: 64 digits, a prefix of them, or "".

    OpenAI's URLs have it as the last folder. Many other URLs have its first digits at the end of the file name
    (`-455df137.pt`). A suffix without a letter is taken for a date.
    """
    *_, folder, name = ("/" + urlsplit(url).path).split("/")
    if re.fullmatch(r"[0-9a-f]{64}", folder):
        return folder
    suffix = re.search(r"-([0-9a-f]{8,64})\.[^.]+$", name)
    return suffix[1] if suffix and re.search(r"[a-f]", suffix[1]) else ""


def compute_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, progress.Task(f"Verifying {path.name}", path.stat().st_size, "B") as task:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            task.advance(len(chunk))
    return digest.hexdigest()


def _checksum_file(path: Path, expected: str) -> tuple[Path, str]:
    """Return the path and the contents of the small file that records that a download was verified."""
    stat = path.stat()
    return path.with_name(path.name + ".sha256"), f"{expected} {stat.st_size} {stat.st_mtime_ns}"


def is_verified(path: Path, expected: str) -> bool:
    """Whether an existing file has the expected checksum, if one is known.

    A checksum file records the result, so that later runs do not read gigabytes again.
    """
    if not expected:
        return True
    checksum_file, record = _checksum_file(path, expected)
    if checksum_file.is_file() and checksum_file.read_text(encoding="utf-8", errors="replace") == record:
        return True
    is_verified = compute_sha256(path).startswith(expected)
    if is_verified:
        write_checksum_file(path, expected)
    return is_verified


def is_unchanging(path: str | os.PathLike) -> bool:
    """Whether nobody edits a file, so that it is safe to memory-map it.

    This holds for files in the hub's cache, which are named by their checksum, and for verified downloads.
    """
    blob = Path(path).resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return True
    checksum_file = blob.with_name(blob.name + ".sha256")
    try:
        found = checksum_file.read_text(encoding="utf-8", errors="replace")
        expected, _, _ = found.partition(" ")
        return bool(expected) and found == _checksum_file(blob, expected)[1]
    except OSError:
        return False


def write_checksum_file(path: Path, expected: str) -> None:
    checksum_file, record = _checksum_file(path, expected)
    try:
        write_text(checksum_file, record)
    except OSError as error:  # a shared cache is often read-only
        logger.debug("Could not write %s (%s). The download will be verified again next time.", checksum_file, error)
