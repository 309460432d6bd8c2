"""Downloads from the Hugging Face Hub."""

from __future__ import annotations

import importlib.util
import os
import re
import textwrap
import time
from pathlib import Path

from ..constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from .checksum import compute_sha256

# File name of a pickle -> usual name of the same weights as safetensors, a format that cannot hold code.
_SAFE_ALTERNATIVE = {
    HF_WEIGHTS_NAME: HF_SAFE_WEIGHTS_NAME,
    "pytorch_model.bin": "pytorch_model.safetensors",
}


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
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and is_new and compute_sha256(blob) != blob.name:
        Path(found).unlink()
        blob.unlink()
        raise RuntimeError(
            f"{filename} of {model_id} was downloaded, but its SHA-256 is not {blob.name}, which the hub publishes. "
            "The file was deleted. Try again."
        )
    return found
