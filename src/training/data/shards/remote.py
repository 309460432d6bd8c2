"""Opens shards that are not local files, and checks that their URLs can be opened.

`webdataset.gopen` opens some schemes (`pipe:`, https, gs, ...). fsspec opens those for which a filesystem is installed,
such as s3 with s3fs. Any other scheme is an error before the first step.
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
    """Whether `url` is a path, and not `pipe:COMMAND` or `scheme://...`."""
    return not url.startswith("pipe:") and "://" not in url and not url.startswith("file:")


def scheme_of(url: str) -> str | None:
    """Return the scheme of `scheme://...`, "pipe" or "file" for their URLs, and None for a path."""
    if url.startswith(("pipe:", "file:")):
        return url[:4]
    found = _SCHEME.match(url)
    return None if found is None else found.group(1).lower()


def is_fsspec(url: str) -> bool:
    """Whether fsspec opens the URL, because webdataset does not and a filesystem for fsspec is installed."""
    scheme = scheme_of(url)
    if scheme is None or _webdataset_opens(scheme):
        return False
    try:
        importlib.import_module("fsspec").get_filesystem_class(scheme)
    except (ImportError, ValueError):  # not installed, or an unknown scheme
        return False
    return True


def check_schemes(urls: list[str], source: str) -> None:
    """Check that each URL can be opened.

    Raises:
        ValueError: no installed package opens a scheme. The message shows the `pipe:` command to use.
    """
    for url in {scheme_of(url): url for url in reversed(urls)}.values():
        scheme = scheme_of(url)
        if scheme is None or _webdataset_opens(scheme) or is_fsspec(url):
            continue
        typed = source if scheme_of(source) == scheme and "::" not in source else url
        command = _COMMANDS.get(scheme, "COMMAND {url}").format(url=shorten(typed))
        needs = "" if scheme in _COMMANDS else " with a COMMAND that writes the shard to its standard output"
        raise ValueError(
            f"{quote(url)} cannot be opened: neither webdataset nor fsspec opens {scheme}:// here. Write "
            f"--train-data or --val-data as 'pipe:{command}'{needs}, or install fsspec's package for "
            f"{scheme}{' (s3fs)' if scheme == 's3' else ''}."
        )


def openable(schemes: list[str]) -> list[str]:
    """Return those of the schemes that can be opened."""
    return [scheme for scheme in schemes if _webdataset_opens(scheme) or is_fsspec(f"{scheme}://")]


def open_stream(url: str) -> Any:
    """Open a URL as a binary stream."""
    if is_fsspec(url):
        return _FsspecStream(url)
    from webdataset.gopen import gopen

    return gopen(url)


class _FsspecStream:
    """A file of an fsspec filesystem. The exceptions of all filesystems are converted to OSError.

    The URL is never parsed as a chain of filesystems (`a::b`), so a list of shards cannot reach local files.
    """

    def __init__(self, url: str) -> None:
        with _raise_os_errors():
            self._file = importlib.import_module("fsspec").filesystem(scheme_of(url)).open(url, "rb")

    def read(self, size: int = -1) -> bytes:
        with _raise_os_errors():
            return self._file.read(size)

    def close(self) -> None:
        with _raise_os_errors():
            self._file.close()


@contextlib.contextmanager
def _raise_os_errors() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _webdataset_opens(scheme: str) -> bool:
    if scheme in ("pipe", "file"):
        return True
    # not an import statement, because `webdataset.gopen` is also the name of a function
    try:
        return scheme in importlib.import_module("webdataset.gopen").gopen_schemes
    except ImportError:
        return False
