"""Downloads of weights, from URLs or the hub.

A download gets its final name only when it is complete and, if the URL contains a checksum, verified. Nothing that a
server sends (redirects, headers, file names) decides where a file is written.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import re
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .. import progress
from ..version import __version__
from .checksum import compute_sha256, expected_sha256, is_verified, write_checksum_file
from .hub import download_pretrained_from_hf, has_hf_hub

logger = logging.getLogger(__name__)

DEFAULT_CACHE_DIR = "~/.cache/clip"
_CHUNK = 1 << 20  # bytes read at a time
_TIMEOUT = 60  # seconds without a byte before a connection counts as lost
_LOCK_SLICE = 1.0  # seconds between two checks of another process's download
_STALLED = 900.0  # seconds without progress before that download counts as hung; computing a checksum takes less


def download_pretrained(
    cfg: dict[str, Any],
    prefer_hf_hub: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> str:
    """Download the weights of a registry entry if they are not in a cache, and return their path.

    An entry with both sources uses, in this order: the file of its URL if it is in `cache_dir`, the hub, its URL.

    Args:
        cfg: registry entry. `hf_hub` is `ORGANISATION/NAME/`, followed by the file name if it is not the usual one.
        prefer_hf_hub: whether the hub comes before the URL. It does not if huggingface_hub is not installed.
        cache_dir: folder for downloads.

    Returns:
        The path; "" for an entry without a source.
    """
    url, hf_hub = cfg.get("url", ""), cfg.get("hf_hub", "")
    if url and _is_cached(url, cached := _cache_path(url, cache_dir)):
        return str(cached)
    if hf_hub and (not url or (prefer_hf_hub and has_hf_hub())):
        model_id, _, filename = hf_hub.rpartition("/")
        return download_pretrained_from_hf(model_id, filename or None, cache_dir=cache_dir)
    return download_pretrained_from_url(url, cache_dir) if url else ""


def download_pretrained_from_url(url: str, cache_dir: str | os.PathLike | None = None) -> str:
    """Download a file if it is not in the cache, and return its path.

    The next call continues an interrupted download. If several processes need the same file, one downloads it and the
    others wait, as long as it makes progress. If the URL contains the SHA-256, the file is verified, and deleted if it
    does not match.

    Args:
        url: http(s) URL that ends in a plain file name.
        cache_dir: folder for the file, `~/.cache/clip` by default.

    Raises:
        ValueError: `url` is not such a URL.
        RuntimeError: the download failed, the checksum does not match, or the download by another process hangs.
    """
    target = _cache_path(url, cache_dir)
    if target.exists() and not target.is_file():
        raise RuntimeError(f"{target} exists and is not a file, so {url} cannot be downloaded to it. Remove it.")
    if _is_cached(url, target):
        return str(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _download_lock(target):
            _download_locked(url, target)
    except OSError as error:
        raise RuntimeError(f"{target.parent} cannot be written ({error}). Pass another folder as cache_dir.") from error
    return str(target)


def _file_name(url: str) -> str:
    """Return the last component of the URL's path. Raise ValueError if it is not a plain file name."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{url!r} is not an http(s) URL. To load a local file, pass pretrained=PATH.")
    name = unquote(parts.path.rsplit("/", 1)[-1])
    if not name or name.startswith(".") or re.search(r"[/\\:\x00-\x1f]", name):
        raise ValueError(f"{url!r} does not end in a plain file name, so there is no safe path to download it to.")
    return name


def _cache_path(url: str, cache_dir: str | os.PathLike | None) -> Path:
    return Path(cache_dir or DEFAULT_CACHE_DIR).expanduser() / _file_name(url)


def _is_cached(url: str, target: Path) -> bool:
    return target.is_file() and is_verified(target, expected_sha256(url))


@contextlib.contextmanager
def _download_lock(target: Path) -> Iterator[None]:
    """Let one process download `target` and the others wait, as long as its partial file grows.

    The operating system releases the lock of a process that died, but not of one that hangs.
    """
    from filelock import FileLock, Timeout  # a dependency of torch

    lock, part = FileLock(target.with_name(f"{target.name}.lock")), target.with_name(f"{target.name}.part")
    size, grew_at, is_logged = -1, time.monotonic(), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=_LOCK_SLICE)  # with a timeout, so that signals are handled
        except Timeout:
            if not is_logged:
                logger.info("Waiting for another process to download %s.", target)
                is_logged = True
            current_size = part.stat().st_size if part.exists() else 0
            if current_size != size:
                size, grew_at = current_size, time.monotonic()
            elif time.monotonic() - grew_at > _STALLED:
                raise RuntimeError(
                    f"Another process holds {lock.lock_file}, and its download of {target.name} has not grown for "
                    f"{_STALLED:.0f} s. End that process, or pass another folder as cache_dir."
                ) from None
    try:
        yield
    finally:
        lock.release()


def _download_locked(url: str, target: Path) -> None:
    """Download `target`, with the lock held, unless another process has done it meanwhile."""
    expected, part = expected_sha256(url), target.with_name(f"{target.name}.part")
    if target.is_file():
        if is_verified(target, expected):
            return
        logger.warning("%s does not have the SHA-256 %s. Downloading it again.", target, expected)
        target.unlink()
    _download_and_verify(url, part, expected)
    os.replace(part, target)
    if expected:
        write_checksum_file(target, expected)


def _download_and_verify(url: str, part: Path, expected: str) -> None:
    """Download into `part` and verify it. Delete it if the checksum does not match."""
    logger.info("Downloading %s.", url)
    try:
        _download_part(url, part)
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
        size = part.stat().st_size if part.exists() else 0
        advice = f"Call again to continue from byte {size}. " if size else ""
        raise RuntimeError(
            f"{url} could not be downloaded to {part.parent}: {str(error).removesuffix('.')}. {advice}"
            "On a host without network, download it elsewhere and pass the file's path as `pretrained`."
        ) from error
    if expected and not (found := compute_sha256(part)).startswith(expected):
        part.unlink()
        # open_clip repeats the "not", and programs search for these words.
        raise RuntimeError(
            f"{url} was downloaded, but its checksum does not not match: the SHA-256 is {found}, not {expected}. "
            "The file was deleted. Try again."
        )


def _download_part(url: str, part: Path) -> None:
    """Download into `part`, continuing an interrupted download."""
    offset = part.stat().st_size if part.exists() else 0
    try:
        response = _open_url(url, offset)
    except urllib.error.HTTPError as error:
        # 416: the file ends at or before the offset. The part is complete, or of another file.
        if error.code != 416 or not offset:
            raise
        part.unlink()
        offset, response = 0, _open_url(url, 0)
    with response:
        if offset and not _continues_at(response, offset):
            offset = 0
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length else None
        _copy(response, part, offset, total)
    size = part.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"The connection ended after {size} of {total} bytes.")


def _open_url(url: str, offset: int) -> Any:
    headers = {"User-Agent": f"open_clip/{__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    request = sys.modules[__package__].urllib.request  # see there
    return request.urlopen(request.Request(url, headers=headers), timeout=_TIMEOUT)


def _continues_at(response: Any, offset: int) -> bool:
    """Whether the response starts at `offset`; a server may send the whole file instead."""
    content_range = response.headers.get("Content-Range", "")
    return response.status == 206 and content_range.startswith(f"bytes {offset}-")


def _copy(response: Any, part: Path, offset: int, total: int | None) -> None:
    with (
        part.open("r+b" if offset else "wb") as file,
        progress.Task(f"Downloading {part.stem}", total, "B", is_shown=True) as task,  # also in scripts
    ):
        file.seek(offset)
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            task.move_to(file.tell())
        file.flush()
        os.fsync(file.fileno())
