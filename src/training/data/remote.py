"""Shards that are not local files: which URLs can be opened, and by what.

`webdataset.gopen` opens its own schemes (`pipe:`, https, gs...). fsspec opens those that it has a filesystem for, such
as s3 with s3fs installed. Any other scheme is an error before the first step.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from typing import Any

from training.data.messages import quote, shorten

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Commands that write an object to their standard output.
_COMMANDS = {
    "s3": "aws s3 cp {url} -",
    "gs": "gsutil cat {url}",
    "oss": "ossutil cat {url}",
    "hdfs": "hdfs dfs -cat {url}",
}


def is_local(url: str) -> bool:
    """Whether it is a path, and not `pipe:COMMAND` or `scheme://...`."""
    return not url.startswith("pipe:") and "://" not in url and not url.startswith("file:")


def scheme_of(url: str) -> str | None:
    """Return the scheme of `scheme://...`, "pipe" or "file" for their URLs, and None for a path."""
    if url.startswith(("pipe:", "file:")):
        return url[:4]
    found = _SCHEME.match(url)
    return None if found is None else found.group(1).lower()


def is_fsspec(url: str) -> bool:
    """Whether fsspec opens the URL, because webdataset does not and fsspec has a filesystem for it here."""
    scheme = scheme_of(url)
    if scheme is None or _webdataset_opens(scheme):
        return False
    try:
        importlib.import_module("fsspec").get_filesystem_class(scheme)
    except (ImportError, ValueError):  # fsspec, or its package for the scheme, is not installed; an unknown scheme
        return False
    return True


def check_schemes(urls: list[str], source: str) -> None:
    """Check that something opens each URL.

    Raises:
        ValueError: a scheme that nothing opens here, with the `pipe:` form to type.
    """
    for url in {scheme_of(url): url for url in reversed(urls)}.values():
        scheme = scheme_of(url)
        if scheme is None or _webdataset_opens(scheme) or is_fsspec(url):
            continue
        typed = source if scheme_of(source) == scheme and "::" not in source else url
        command = _COMMANDS.get(scheme, "COMMAND {url}").format(url=shorten(typed))
        needs = "" if scheme in _COMMANDS else " with a COMMAND that writes the shard to its standard output"
        raise ValueError(
            f"{quote(url)} cannot be opened: neither webdataset nor fsspec opens {scheme}:// here. Give "
            f"--train-data or --val-data as 'pipe:{command}'{needs}, or install fsspec's package for "
            f"{scheme}{' (s3fs)' if scheme == 's3' else ''}."
        )


def openable(schemes: list[str]) -> list[str]:
    """Return the schemes that something opens here."""
    return [scheme for scheme in schemes if _webdataset_opens(scheme) or is_fsspec(f"{scheme}://")]


def open_stream(url: str) -> Any:
    """Open what is not a local path, as a binary stream."""
    if is_fsspec(url):
        return _FsspecStream(url)
    from webdataset.gopen import gopen

    return gopen(url)


class _FsspecStream:
    """A file of an fsspec filesystem, all of whose errors are OSError: each store raises its own.

    The URL is never parsed as a chain of filesystems (`a::b`), so a list of shards cannot reach local files.
    """

    def __init__(self, url: str) -> None:
        with _store_errors():
            self._file = importlib.import_module("fsspec").filesystem(scheme_of(url)).open(url, "rb")

    def read(self, size: int = -1) -> bytes:
        with _store_errors():
            return self._file.read(size)

    def close(self) -> None:
        with _store_errors():
            self._file.close()


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _webdataset_opens(scheme: str) -> bool:
    if scheme in ("pipe", "file"):
        return True
    # `webdataset.gopen` is also the name of a function, hence not an import statement.
    try:
        return scheme in importlib.import_module("webdataset.gopen").gopen_schemes
    except ImportError:
        return False
