"""Where published weights are, by model and tag, and how they get here.

The table is `pretrained.json`: model -> tag -> {url, hf_hub, mean, std, interpolation, resize_mode[, quick_gelu]}.
Downloads land under their final name only when they are whole and, where the address tells the checksum, verified.
Nothing that a server says (redirects, headers, file names) decides where a file is written.
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

from . import aliases, progress
from .constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from .version import __version__
from .whole_file import write_text

logger = logging.getLogger(__name__)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

DEFAULT_CACHE_DIR = "~/.cache/clip"
_CHUNK = 1 << 20  # bytes read at a time
_TIMEOUT = 60  # seconds without a byte after which a connection counts as dead
_LOCK_SLICE = 1.0  # seconds between two looks at another process's download
_STALLED = 900.0  # seconds without progress after which that counts as dead; a checksum takes less

# The same weights in a format that holds no code, under the name it usually has beside the pickle.
_SAFE_ALTERNATIVE = {
    HF_WEIGHTS_NAME: HF_SAFE_WEIGHTS_NAME,
    "pytorch_model.bin": "pytorch_model.safetensors",
}


@functools.lru_cache(maxsize=1)
def _registry() -> dict[str, dict[str, dict[str, Any]]]:
    table = json.loads((Path(__file__).parent / "pretrained.json").read_text(encoding="utf-8"))
    for tags in table.values():
        for cfg in tags.values():
            cfg["mean"], cfg["std"] = tuple(cfg["mean"]), tuple(cfg["std"])
    return table


def _clean_tag(tag: str) -> str:
    """Tags are compared in lower case, and `-` is `_`."""
    return tag.lower().replace("-", "_")


def list_pretrained(as_str: bool = False) -> list[Any]:
    """All pairs of model and tag: tuples, or with `as_str` strings `"model:tag"`."""
    pairs = [(model, tag) for model, tags in _registry().items() for tag in tags]
    return [":".join(pair) for pair in pairs] if as_str else pairs


def list_pretrained_models_by_tag(tag: str) -> list[str]:
    """Names of the models that have weights under this tag."""
    tag = _clean_tag(tag)
    return [model for model, tags in _registry().items() if tag in map(_clean_tag, tags)]


def list_pretrained_tags_by_model(model: str) -> list[str]:
    """Tags of this model's weights, an empty list for a model without any."""
    return list(_registry().get(model, ()))


def get_pretrained_cfg(model: str, tag: str) -> dict[str, Any]:
    """The row of this model and tag (a copy), or an empty dict."""
    tag = _clean_tag(tag)
    for name, cfg in _registry().get(model, {}).items():
        if _clean_tag(name) == tag:
            return dict(cfg)
    return {}


def is_pretrained_cfg(model: str, tag: str) -> bool:
    """Whether there are weights of this model under this tag."""
    return bool(get_pretrained_cfg(model, tag))


def get_pretrained_url(model: str, tag: str) -> str:
    """Address of the weights, or an empty string where there is none (many are on Hugging Face's hub only)."""
    return get_pretrained_cfg(model, tag).get("url", "")


def nearest_tags(model: str, tag: str, limit: int = 5) -> list[str]:
    """The model's tags, those first that look like `tag`; for messages about a tag that does not exist."""
    tags = {_clean_tag(name): name for name in list_pretrained_tags_by_model(model)}
    close = difflib.get_close_matches(_clean_tag(tag), tags, n=limit, cutoff=0.3)
    return [tags[name] for name in [*close, *(name for name in tags if name not in close)][:limit]]


# ------------------------------------------------------------------------------------------- download from an address


def _file_name(url: str) -> str:
    """Last component of the address's path, refused where it is not a plain file name."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(
            f"{url!r} is not an http(s) address. A file that is already here is loaded with pretrained=PATH."
        )
    name = unquote(parts.path.rsplit("/", 1)[-1])
    if not name or name.startswith(".") or re.search(r"[/\\:\x00-\x1f]", name):
        raise ValueError(f"{url!r} does not end in a plain file name, so there is no safe place to download it to.")
    return name


def _expected_sha256(url: str) -> str:
    """What the address tells of the file's SHA-256: all 64 digits, a prefix of it, or an empty string.

    OpenAI's addresses have it as the last folder. Many other weights have its first digits at the end of the file's
    name, `-455df137.pt`; a suffix without a letter is taken for a date.
    """
    *_, folder, name = ("/" + urlsplit(url).path).split("/")
    if re.fullmatch(r"[0-9a-f]{64}", folder):
        return folder
    suffix = re.search(r"-([0-9a-f]{8,64})\.[^.]+$", name)
    return suffix[1] if suffix and re.search(r"[a-f]", suffix[1]) else ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, progress.Task(f"Verifying {path.name}", path.stat().st_size, "B") as task:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            task.advance(len(chunk))
    return digest.hexdigest()


def _note(path: Path, expected: str) -> tuple[Path, str]:
    """The small file beside a download that says "this very file was verified", and what it has to say for that."""
    stat = path.stat()
    return path.with_name(path.name + ".sha256"), f"{expected} {stat.st_size} {stat.st_mtime_ns}"


def _is_verified(path: Path, expected: str) -> bool:
    """Whether an existing file has the expected checksum, if one is known.

    The file is read once: a note beside it then vouches for it. Without, every start of a run would read
    gigabytes first.
    """
    if not expected:
        return True
    note, identity = _note(path, expected)
    if note.is_file() and note.read_text(encoding="utf-8", errors="replace") == identity:
        return True
    verified = _sha256(path).startswith(expected)
    if verified:
        _write_note(path, expected)
    return verified


def is_unchanging(path: str | os.PathLike) -> bool:
    """Whether a downloaded file stays as it is, so that it may be mapped: its name or a note tells its checksum.

    That is so for files in the hub's cache, which are kept under their checksum, and for downloads that were verified.
    """
    blob = Path(path).resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return True
    note = blob.with_name(blob.name + ".sha256")
    try:
        expected, _, _ = note.read_text(encoding="utf-8", errors="replace").partition(" ")
        return bool(expected) and note.read_text(encoding="utf-8", errors="replace") == _note(blob, expected)[1]
    except OSError:
        return False


def _write_note(path: Path, expected: str) -> None:
    note, identity = _note(path, expected)
    try:
        write_text(note, identity)
    except OSError as error:  # a shared cache that others fill is often read-only
        logger.debug("%s could not be written (%s): the file will be verified again next time", note, error)


def _open_url(url: str, offset: int) -> Any:
    headers = {"User-Agent": f"open_clip/{__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)


def _continues_at(response: Any, offset: int) -> bool:
    """Whether the server's answer starts at the byte that was asked for (it may send the whole file instead)."""
    content_range = response.headers.get("Content-Range", "")
    return response.status == 206 and content_range.startswith(f"bytes {offset}-")


def _fetch(url: str, part: Path) -> None:
    """Download into `part`, continuing what an interrupted download left there."""
    offset = part.stat().st_size if part.exists() else 0
    try:
        response = _open_url(url, offset)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not offset:  # 416: nothing lies behind the offset; the part is whole or of another file
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
        raise ConnectionError(f"the connection ended after {size} of {total} bytes")


def _copy(response: Any, part: Path, offset: int, total: int | None) -> None:
    with (
        part.open("r+b" if offset else "wb") as file,
        progress.Task(f"Downloading {part.stem}", total, "B", is_shown=True) as task,  # in scripts, too
    ):
        file.seek(offset)
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            task.move_to(file.tell())
        file.flush()
        os.fsync(file.fileno())


def download_pretrained_from_url(url: str, cache_dir: str | os.PathLike | None = None) -> str:
    """Download a file once and return its path, `cache_dir/NAME` (default `~/.cache/clip`).

    An interrupted download is continued by the next call. Processes that want the same file wait for one of them, as
    long as it makes progress.
    Where the address tells the SHA-256, the file is verified, and one that is wrong is deleted.

    Raises:
        ValueError: not an http(s) address that ends in a plain file name.
        RuntimeError: the download failed, its checksum is not the address's, or another process's download of it has
            stopped.
    """
    target = _place_of(url, cache_dir)
    if target.exists() and not target.is_file():
        raise RuntimeError(f"{target} exists and is not a file: {url} cannot be downloaded to it.")
    if _is_here(url, target):
        return str(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _download_lock(target):
            _bring(url, target)
    except OSError as error:
        raise RuntimeError(f"{target.parent} cannot be written ({error}). Give another folder as cache_dir.") from error
    return str(target)


@contextlib.contextmanager
def _download_lock(target: Path) -> Iterator[None]:
    """Held by the one process that downloads `target`; the others wait while its partial file grows.

    The operating system releases the lock of a process that has died. That of one that hangs is never released.
    """
    from filelock import FileLock, Timeout  # a dependency of torch

    lock, part = FileLock(target.with_name(f"{target.name}.lock")), target.with_name(f"{target.name}.part")
    size, grown_at, is_logged = -1, time.monotonic(), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=_LOCK_SLICE)  # polls, so that signals get through
        except Timeout:
            if not is_logged:
                logger.info("Another process downloads %s: waiting for it.", target)
                is_logged = True
            found = part.stat().st_size if part.exists() else 0
            if found != size:
                size, grown_at = found, time.monotonic()
            elif time.monotonic() - grown_at > _STALLED:
                raise RuntimeError(
                    f"Another process holds {lock.lock_file}, and its download of {target.name} has not grown for "
                    f"{_STALLED:.0f} s. End that process, or give another folder as cache_dir."
                ) from None
    try:
        yield
    finally:
        lock.release()


def _place_of(url: str, cache_dir: str | os.PathLike | None) -> Path:
    return Path(cache_dir or DEFAULT_CACHE_DIR).expanduser() / _file_name(url)


def _is_here(url: str, target: Path) -> bool:
    return target.is_file() and _is_verified(target, _expected_sha256(url))


def _bring(url: str, target: Path) -> None:
    """Download under the lock, unless another process did so meanwhile or the file is there and is right."""
    expected, part = _expected_sha256(url), target.with_name(f"{target.name}.part")
    if target.is_file():
        if _is_verified(target, expected):
            return
        logger.warning("%s does not have the SHA-256 %s: it is downloaded again.", target, expected)
        target.unlink()
    _download(url, part, expected)
    os.replace(part, target)
    if expected:
        _write_note(target, expected)


def _download(url: str, part: Path, expected: str) -> None:
    """Fetch into `part` and verify it; a wrong file is deleted."""
    logger.info("downloading %s", url)
    try:
        _fetch(url, part)
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
        there = part.stat().st_size if part.exists() else 0
        mend = f"Call again to continue where it stopped ({there} bytes are there); on" if there else "On"
        raise RuntimeError(
            f"{url} could not be downloaded to {part.parent}: {error}. {mend} a host without network, download it "
            "elsewhere and pass the file's path as `pretrained`."
        ) from error
    if expected and not (found := _sha256(part)).startswith(expected):
        part.unlink()
        # The repeated "not" is open_clip's: programs look for these words.
        raise RuntimeError(
            f"{url} was downloaded, but its checksum does not not match: the SHA-256 is {found}, not {expected}. "
            "The file was deleted; try again."
        )


# ----------------------------------------------------------------------------------------- download from Hugging Face


def has_hf_hub(necessary: bool = False) -> bool:
    """Whether huggingface_hub is installed; with `necessary`, its absence is a RuntimeError."""
    present = importlib.util.find_spec("huggingface_hub") is not None
    if necessary and not present:
        raise RuntimeError(
            "Weights on Hugging Face's hub need the package huggingface_hub: pip install huggingface_hub"
        )
    return present


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the hub, the way to it or the disk fails: OSErrors, and what its HTTP library
    raises (which that is depends on its version).
    """
    from huggingface_hub.utils import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def in_short(error: BaseException) -> str:
    """An error in a line of at most 200 characters: the hub's go on with advice that does not fit here."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__


def _check_hub_name(model_id: str, filename: str | None, revision: str | None) -> None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_id, re.ASCII) or ".." in model_id:
        raise ValueError(
            f"{model_id!r} is not the name of a repository on Hugging Face's hub: ORGANISATION/NAME is expected."
        )
    for name in (filename, revision):
        parts = name.split("/") if name else ()
        if any(part in ("", ".", "..") or re.search(r"[\\:\x00-\x1f]", part) for part in parts):
            raise ValueError(f"{name!r} is refused as a file or revision of {model_id}: it would point outside of it.")


def download_pretrained_from_hf(
    model_id: str,
    filename: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> str:
    """Path of a repository's file in the hub's cache, downloaded if it is not there yet.

    Without `filename` these are the weights. Where a repository may have the same weights as safetensors, those are
    preferred. Where the hub tells the SHA-256 (it does for large files), what was downloaded is verified, and deleted
    if it is wrong. huggingface_hub's own settings apply: HF_ENDPOINT for a mirror, HF_HUB_OFFLINE, HF_HOME, HF_TOKEN.

    Raises:
        ValueError: a name that is none, or points outside the repository.
        FileNotFoundError: the file is neither in the cache nor to be had.
        RuntimeError: it was downloaded, and is not the file that the hub announced.
    """
    has_hf_hub(necessary=True)
    _check_hub_name(model_id, filename, revision)
    from huggingface_hub.utils import EntryNotFoundError

    filename = filename or HF_WEIGHTS_NAME
    candidates = [_SAFE_ALTERNATIVE[filename], filename] if filename in _SAFE_ALTERNATIVE else [filename]
    reasons: list[str] = []
    last: Exception | None = None
    for candidate in candidates:
        # A hub that is out of reach is asked once, with all the patience that takes, and then only the cache.
        offline = last is not None and _is_out_of_reach(last)
        try:
            return _fetch_from_hub(model_id, candidate, revision, cache_dir, local_files_only=offline)
        except hub_errors() as error:
            last = error
            if not offline:
                reasons.append(in_short(_reason(error)))
            if not isinstance(error, EntryNotFoundError):
                break  # the next would fail alike: no access, no such repository, a full disk
    at = f"{model_id}@{revision}" if revision else model_id
    raise FileNotFoundError(
        f"No {' or '.join(candidates)} of {at} in the local cache or on Hugging Face's hub ({'; '.join(reasons)}). "
        "A mirror is used with HF_ENDPOINT=https://..., and a file downloaded elsewhere is loaded by its path."
    ) from last


def _reason(error: Exception) -> BaseException:
    """What is behind "not in the cache": why the hub was not asked, or what it said."""
    return (error.__cause__ if isinstance(error, FileNotFoundError) else None) or error


def _is_out_of_reach(error: Exception) -> bool:
    """Whether there was no answer, or one that says nothing about the file."""
    response = getattr(_reason(error), "response", None)
    return isinstance(error, FileNotFoundError) and (response is None or response.status_code >= 500)


def _fetch_from_hub(
    model_id: str, filename: str, revision: str | None, cache_dir: str | os.PathLike | None, local_files_only: bool
) -> str:
    """A file's path in the hub's cache; if it came just now, verified.

    The cache keeps a file under the name that the hub gave its content: the SHA-256, for files in large file storage.
    """
    from huggingface_hub import hf_hub_download

    began = time.time()
    found = hf_hub_download(
        model_id,
        filename,
        revision=revision,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        local_files_only=local_files_only,
    )
    blob = Path(found).resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and blob.stat().st_mtime >= began - 1 and _sha256(blob) != blob.name:
        Path(found).unlink()
        blob.unlink()
        raise RuntimeError(
            f"{filename} of {model_id} was downloaded, but its SHA-256 is not {blob.name}, as the hub says. "
            "It was deleted; try again."
        )
    return found


def download_pretrained(
    cfg: dict[str, Any],
    prefer_hf_hub: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> str:
    """Path of the weights that a row of the registry names, downloaded if need be; "" for a row without any.

    `hf_hub` is `ORG/REPO/`, with the file's name behind it where that is not the usual one. A row with both sources
    uses a file of its address that is in `cache_dir` already; else the hub, or its address if `prefer_hf_hub` is false
    or huggingface_hub is not installed.
    """
    url, hf_hub = cfg.get("url", ""), cfg.get("hf_hub", "")
    if url and _is_here(url, placed := _place_of(url, cache_dir)):
        return str(placed)
    if hf_hub and (not url or (prefer_hf_hub and has_hf_hub())):
        model_id, _, filename = hf_hub.rpartition("/")
        return download_pretrained_from_hf(model_id, filename or None, cache_dir=cache_dir)
    return download_pretrained_from_url(url, cache_dir) if url else ""
