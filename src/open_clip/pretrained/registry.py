"""The registry of published weights, and their download.

The registry is `pretrained.json`: model -> tag -> {url, hf_hub, mean, std, interpolation, resize_mode[, quick_gelu]}.
A download gets its final name only when it is complete and, if the URL contains a checksum, verified. Nothing that a
server sends (redirects, headers, file names) decides where a file is written.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import http.client
import importlib.util
import json
import logging
import os
import re
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .. import progress
from ..constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from ..formats.whole_file import write_text
from ..version import __version__

logger = logging.getLogger(__name__)


DEFAULT_CACHE_DIR = "~/.cache/clip"
_CHUNK = 1 << 20  # bytes read at a time
_TIMEOUT = 60  # seconds without a byte before a connection counts as lost
_LOCK_SLICE = 1.0  # seconds between two checks of another process's download
_STALLED = 900.0  # seconds without progress before that download counts as hung; computing a checksum takes less

# File name of a pickle -> usual name of the same weights as safetensors, a format that cannot hold code.
_SAFE_ALTERNATIVE = {
    HF_WEIGHTS_NAME: HF_SAFE_WEIGHTS_NAME,
    "pytorch_model.bin": "pytorch_model.safetensors",
}


@functools.lru_cache(maxsize=1)
def _registry() -> dict[str, dict[str, dict[str, Any]]]:
    table = json.loads((Path(__file__).parents[1] / "pretrained.json").read_text(encoding="utf-8"))
    for tags in table.values():
        for cfg in tags.values():
            cfg["mean"], cfg["std"] = tuple(cfg["mean"]), tuple(cfg["std"])
    return table


def _clean_tag(tag: str) -> str:
    """Normalize a tag for comparison: lower case, `-` becomes `_`."""
    return tag.lower().replace("-", "_")


def list_pretrained(as_str: bool = False) -> list[Any]:
    """List all (model, tag) pairs, as tuples or, with `as_str`, as strings `"model:tag"`."""
    pairs = [(model, tag) for model, tags in _registry().items() for tag in tags]
    return [":".join(pair) for pair in pairs] if as_str else pairs


def list_pretrained_models_by_tag(tag: str) -> list[str]:
    """List the models that have weights with this tag."""
    tag = _clean_tag(tag)
    return [model for model, tags in _registry().items() if tag in map(_clean_tag, tags)]


def list_pretrained_tags_by_model(model: str) -> list[str]:
    """List the tags of a model's weights."""
    return list(_registry().get(model, ()))


def get_pretrained_cfg(model: str, tag: str) -> dict[str, Any]:
    """Return a copy of the registry entry of this model and tag, or an empty dict."""
    tag = _clean_tag(tag)
    for name, cfg in _registry().get(model, {}).items():
        if _clean_tag(name) == tag:
            return dict(cfg)
    return {}


def is_pretrained_cfg(model: str, tag: str) -> bool:
    """Whether the registry has weights of this model with this tag."""
    return bool(get_pretrained_cfg(model, tag))


def get_pretrained_url(model: str, tag: str) -> str:
    """Return the URL of the weights, or "" if there is none (many are on the Hugging Face Hub only)."""
    return get_pretrained_cfg(model, tag).get("url", "")


def nearest_tags(model: str, tag: str, limit: int = 5) -> list[str]:
    """List the model's tags, most similar to `tag` first, for messages about an unknown tag."""
    tags = {_clean_tag(name): name for name in list_pretrained_tags_by_model(model)}
    close = difflib.get_close_matches(_clean_tag(tag), tags, n=limit, cutoff=0.3)
    return [tags[name] for name in [*close, *(name for name in tags if name not in close)][:limit]]


# Download from a URL


def _file_name(url: str) -> str:
    """Return the last component of the URL's path. Raise ValueError if it is not a plain file name."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{url!r} is not an http(s) URL. To load a local file, pass pretrained=PATH.")
    name = unquote(parts.path.rsplit("/", 1)[-1])
    if not name or name.startswith(".") or re.search(r"[/\\:\x00-\x1f]", name):
        raise ValueError(f"{url!r} does not end in a plain file name, so there is no safe path to download it to.")
    return name


def _expected_sha256(url: str) -> str:
    """Return the SHA-256 that the URL contains: 64 digits, a prefix of them, or "".

    OpenAI's URLs have it as the last folder. Many other URLs have its first digits at the end of the file name
    (`-455df137.pt`). A suffix without a letter is taken for a date.
    """
    *_, folder, name = ("/" + urlsplit(url).path).split("/")
    if re.fullmatch(r"[0-9a-f]{64}", folder):
        return folder
    suffix = re.search(r"-([0-9a-f]{8,64})\.[^.]+$", name)
    return suffix[1] if suffix and re.search(r"[a-f]", suffix[1]) else ""


def _compute_sha256(path: Path) -> str:
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


def _is_verified(path: Path, expected: str) -> bool:
    """Whether an existing file has the expected checksum, if one is known.

    A checksum file records the result, so that later runs do not read gigabytes again.
    """
    if not expected:
        return True
    checksum_file, record = _checksum_file(path, expected)
    if checksum_file.is_file() and checksum_file.read_text(encoding="utf-8", errors="replace") == record:
        return True
    is_verified = _compute_sha256(path).startswith(expected)
    if is_verified:
        _write_checksum_file(path, expected)
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


def _write_checksum_file(path: Path, expected: str) -> None:
    checksum_file, record = _checksum_file(path, expected)
    try:
        write_text(checksum_file, record)
    except OSError as error:  # a shared cache is often read-only
        logger.debug("Could not write %s (%s). The download will be verified again next time.", checksum_file, error)


def _open_url(url: str, offset: int) -> Any:
    headers = {"User-Agent": f"open_clip/{__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)


def _continues_at(response: Any, offset: int) -> bool:
    """Whether the response starts at `offset`; a server may send the whole file instead."""
    content_range = response.headers.get("Content-Range", "")
    return response.status == 206 and content_range.startswith(f"bytes {offset}-")


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


def _cache_path(url: str, cache_dir: str | os.PathLike | None) -> Path:
    return Path(cache_dir or DEFAULT_CACHE_DIR).expanduser() / _file_name(url)


def _is_cached(url: str, target: Path) -> bool:
    return target.is_file() and _is_verified(target, _expected_sha256(url))


def _download_locked(url: str, target: Path) -> None:
    """Download `target`, with the lock held, unless another process has done it meanwhile."""
    expected, part = _expected_sha256(url), target.with_name(f"{target.name}.part")
    if target.is_file():
        if _is_verified(target, expected):
            return
        logger.warning("%s does not have the SHA-256 %s. Downloading it again.", target, expected)
        target.unlink()
    _download_and_verify(url, part, expected)
    os.replace(part, target)
    if expected:
        _write_checksum_file(target, expected)


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
    if expected and not (found := _compute_sha256(part)).startswith(expected):
        part.unlink()
        # open_clip repeats the "not", and programs search for these words.
        raise RuntimeError(
            f"{url} was downloaded, but its checksum does not not match: the SHA-256 is {found}, not {expected}. "
            "The file was deleted. Try again."
        )


# Download from the Hugging Face Hub


def has_hf_hub(necessary: bool = False) -> bool:
    """Whether huggingface_hub is installed. With `necessary`, raise RuntimeError if it is not."""
    present = importlib.util.find_spec("huggingface_hub") is not None
    if necessary and not present:
        raise RuntimeError(
            "Weights on the Hugging Face Hub need the package huggingface_hub. Install it: pip install huggingface_hub."
        )
    return present


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that huggingface_hub raises if the hub, the network or the disk fails.

    These are OSError and the base classes of its HTTP library, which depends on the version of huggingface_hub.
    """
    from huggingface_hub.utils import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def shorten_error(error: BaseException) -> str:
    """Format an error in at most 200 characters: those of the hub continue with advice that does not apply here."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__


def _check_hub_name(model_id: str, filename: str | None, revision: str | None) -> None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_id, re.ASCII) or ".." in model_id:
        raise ValueError(
            f"{model_id!r} is not the name of a repository on the Hugging Face Hub. Expected ORGANISATION/NAME."
        )
    for name in (filename, revision):
        parts = name.split("/") if name else ()
        if any(part in ("", ".", "..") or re.search(r"[\\:\x00-\x1f]", part) for part in parts):
            raise ValueError(
                f"{name!r} is not a valid file or revision of {model_id}: it would point outside the repository."
            )


def download_pretrained_from_hf(
    model_id: str,
    filename: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> str:
    """Download a file of a repository if it is not in the hub's cache, and return its path.

    If the hub publishes the file's SHA-256 (it does for large files), a download is verified, and deleted if it does
    not match. huggingface_hub's settings apply: HF_ENDPOINT for a mirror, HF_HUB_OFFLINE, HF_HOME, HF_TOKEN.

    Args:
        model_id: repository, ORGANISATION/NAME.
        filename: file in the repository; the weights by default. Weights in a pickle are replaced by the same weights
            as safetensors if the repository has them.
        revision: branch, tag or commit.
        cache_dir: folder for downloads; the hub's cache by default.

    Raises:
        ValueError: a name is invalid, or points outside the repository.
        FileNotFoundError: the file is not in the cache and cannot be downloaded.
        RuntimeError: the downloaded file does not have the SHA-256 that the hub publishes, or huggingface_hub is not
            installed.
    """
    has_hf_hub(necessary=True)
    _check_hub_name(model_id, filename, revision)
    from huggingface_hub.utils import EntryNotFoundError

    filename = filename or HF_WEIGHTS_NAME
    candidates = [_SAFE_ALTERNATIVE[filename], filename] if filename in _SAFE_ALTERNATIVE else [filename]
    reasons: list[str] = []
    last: Exception | None = None
    for candidate in candidates:
        # After one timeout, search only the cache: another request would wait as long.
        is_offline = last is not None and _is_unreachable(last)
        try:
            return _fetch_from_hub(model_id, candidate, revision, cache_dir, local_files_only=is_offline)
        except hub_errors() as error:
            last = error
            if not is_offline:
                reasons.append(shorten_error(_reason(error)))
            if not isinstance(error, EntryNotFoundError):
                break  # the next candidate would fail for the same reason: no access, no repository, a full disk
    at = f"{model_id}@{revision}" if revision else model_id
    raise FileNotFoundError(
        f"No {' or '.join(candidates)} of {at} in the local cache or on the Hugging Face Hub ({'; '.join(reasons)}). "
        "Set HF_ENDPOINT=https://... to use a mirror, or download the file elsewhere and pass its path."
    ) from last


def _reason(error: Exception) -> BaseException:
    """Return the cause of a "not in the cache" error: why the hub was not contacted, or what it answered."""
    return (error.__cause__ if isinstance(error, FileNotFoundError) else None) or error


def _is_unreachable(error: Exception) -> bool:
    """Whether the hub gave no answer, or a server error, which says nothing about the file."""
    response = getattr(_reason(error), "response", None)
    return isinstance(error, FileNotFoundError) and (response is None or response.status_code >= 500)


def _fetch_from_hub(
    model_id: str, filename: str, revision: str | None, cache_dir: str | os.PathLike | None, local_files_only: bool
) -> str:
    """Return the path of a file in the hub's cache; verify it if this call downloaded it.

    The cache names a file by the hub's identifier of its content: the SHA-256, for files in large file storage.
    """
    from huggingface_hub import hf_hub_download

    started_at = time.time()
    found = hf_hub_download(
        model_id,
        filename,
        revision=revision,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        local_files_only=local_files_only,
    )
    blob = Path(found).resolve()
    is_new = blob.stat().st_mtime >= started_at - 1
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and is_new and _compute_sha256(blob) != blob.name:
        Path(found).unlink()
        blob.unlink()
        raise RuntimeError(
            f"{filename} of {model_id} was downloaded, but its SHA-256 is not {blob.name}, which the hub publishes. "
            "The file was deleted. Try again."
        )
    return found


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
