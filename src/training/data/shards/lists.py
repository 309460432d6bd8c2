"""Lists the shards of a source (braces, wildcards, folders, lists in files) and the number of their samples.

Input of the user is trusted: `pipe:COMMAND` is run. The contents of files are not: a list of shards in a file may only
contain paths and plain URLs, and sizes must be numbers.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import re
from collections.abc import Sequence

from training.data.messages import join_first, quote, shorten
from training.data.shards.remote import is_fsspec, is_local, open_stream, openable

logger = logging.getLogger(__name__)

SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")

_LIST = re.compile(r"\.(txt|list)$")
_WILDCARD = re.compile(r"[*?\[]")
# Schemes that a list may contain. The pattern excludes URLs that a downloading program could read as an option or a
# command, and chains of fsspec filesystems.
_PLAIN_SCHEMES = ("http", "https", "gs", "s3", "hf", "ais")
_PLAIN_URL = re.compile(rf"({'|'.join(_PLAIN_SCHEMES)})://\w((?!::)[\w./:@%+=,~?&-])*")
_TEXT_LIMIT = 1 << 26  # bytes of a list or of sizes.json


def expand_urls(
    urls: str | Sequence[str], weights: str | Sequence[float] | None = None
) -> tuple[list[str], list[float] | None]:
    """Expand braces, `::`, wildcards and folders to a list of shards. Each shard gets the weight of its source.

    A source that ends in .txt or .list is a file with one shard per line (see `read_list`). A local path with `*`, `?`
    or `[` is a pattern, and a folder stands for its .tar files; both give shards in sorted order.

    Args:
        urls: the sources joined by `::`, or a list of shards, which is returned unchanged.
        weights: one number per source, joined by `::`; a list if `urls` is a list. None gives None.

    Raises:
        ValueError: there is not one weight per source, a weight is not above 0, or a line of a list is refused.
        FileNotFoundError: a list does not exist, or a pattern or folder gives no shard.
    """
    if not isinstance(urls, str):
        if isinstance(weights, str):
            raise ValueError("Weights as text (--train-data-upsampling-factors) need shards as text, joined by '::'.")
        return list(urls), None if weights is None else list(weights)
    sources = [_expand_source(source) for source in urls.split("::")]
    shards = [shard for source in sources for shard in source]
    if weights is None:
        return shards, None
    if not isinstance(weights, str):
        raise ValueError(f"Weights as a list ({shorten(weights)}) need shards as a list. Join the weights by '::'.")
    try:
        factors = [float(weight) for weight in weights.split("::")]
    except ValueError as error:
        raise ValueError(
            f"--train-data-upsampling-factors: {quote(weights)} must be numbers joined by '::'."
        ) from error
    if len(factors) != len(sources):
        raise ValueError(
            f"--train-data-upsampling-factors has {len(factors)} numbers ({shorten(weights)}) for {len(sources)} "
            f"sources ({shorten(urls)}). Write one number per source, joined by '::'."
        )
    if not all(factor > 0 for factor in factors):
        raise ValueError(f"--train-data-upsampling-factors: {quote(weights)} must be numbers above 0.")
    return shards, [factor for factor, source in zip(factors, sources, strict=True) for _ in source]


def _expand_source(source: str) -> list[str]:
    if is_list(source):
        return read_list(source)
    from braceexpand import braceexpand

    try:
        expanded = list(braceexpand(source))
    except ValueError:
        raise ValueError(f"{quote(source)} has unbalanced braces. Write shards as {{00000..00099}}.tar.") from None
    return [shard for item in expanded for shard in _expand_path(item)]


def _expand_path(path: str) -> list[str]:
    """Return the shards in a folder or those that match a pattern. Any other path or URL is returned unchanged."""
    if not is_local(path):
        if "*" in path and not path.startswith("pipe:"):
            raise ValueError(f"{quote(path)}: wildcards in URLs are not expanded. Use braces, as {{00000..00099}}.tar.")
        return [path]
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if name.endswith(SHARD_ENDINGS))
        if not names:
            raise FileNotFoundError(f"The folder {quote(path)} has no {', '.join(SHARD_ENDINGS)} files.")
        return [os.path.join(path, name) for name in names]
    if not _WILDCARD.search(path) or os.path.exists(path):
        return [path]
    found = sorted(glob.glob(path))
    if not found:
        raise FileNotFoundError(f"No file matches {quote(path)} (looked for {shorten(os.path.abspath(path))}).")
    return found


def is_list(source: str) -> bool:
    """Whether a source of shards is a file that lists them."""
    return _LIST.search(source) is not None and not source.startswith("pipe:")


def read_list(path: str) -> list[str]:
    """Read a list of shards, one path or URL per line. `#` starts a comment. Braces are not expanded.

    Raises:
        ValueError: a line would run a command (`pipe:`) or is not a plain URL, or the file is not UTF-8 text.
        FileNotFoundError: there is no such file.
    """
    try:
        lines = _read_text(path).splitlines()
    except FileNotFoundError:
        looked = shorten(os.path.abspath(path))
        raise FileNotFoundError(f"{shorten(path)}: no such list of shards (looked for {looked}).") from None
    except ValueError as error:
        raise ValueError(f"{shorten(path)} is not a list of shards: {error}. It needs one path per line.") from error
    shards = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if "\0" in line:
            raise ValueError(f"{shorten(path)}, line {number}: {quote(line)} has a zero byte. The list is damaged.")
        if line.lower().startswith(("pipe:", "file:")) or ("://" in line and not _PLAIN_URL.fullmatch(line)):
            raise ValueError(
                f"{shorten(path, 80)}, line {number}: {quote(line, 100)} is refused. A list of shards may name paths "
                f"and plain URLs ({', '.join(openable(list(_PLAIN_SCHEMES)))}), not commands, because others may write "
                "the list. Type such a source in --train-data or --val-data itself."
            )
        shards.append(line)
    return shards


def _read_text(path: str) -> str:
    """Read a small text file next to the data.

    Raises:
        ValueError: the file is too large, or not UTF-8.
    """
    with contextlib.closing(open_stream(path) if is_fsspec(path) else open(path, "rb")) as file:
        data = file.read(_TEXT_LIMIT + 1)
    if len(data) > _TEXT_LIMIT:
        raise ValueError(f"it has more than {_TEXT_LIMIT >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error


def get_dataset_size(shards: str | Sequence[str]) -> tuple[int | None, int]:
    """Return (number of samples or None if unknown, number of shards).

    The number of samples is read from files next to the shards: `sizes.json` with {"00000.tar": samples, ...},
    `__len__` with one number for all shards of the folder, or img2dataset's `00000_stats.json` per shard with
    {"successes": samples, ...}.

    Raises:
        ValueError: one of these files is not valid.
    """
    names, _ = expand_urls(shards)
    sizes, total = shard_sizes(names), 0
    for folder, urls in _by_folder(names).items():
        known = [sizes[url] for url in urls if url in sizes]
        size = sum(known) if len(known) == len(urls) else _folder_size(folder)
        if size is None and not known:
            size = _size_by_stats(folder, urls)
        if size is None:
            return None, len(names)
        total += size
    return total, len(names)


def shard_sizes(urls: Sequence[str]) -> dict[str, int]:
    """Return the number of samples of each shard that is in the `sizes.json` of its folder.

    Raises:
        ValueError: a `sizes.json` is not a table of numbers.
    """
    found: dict[str, int] = {}
    for folder, inside in _by_folder(urls).items():
        path = os.path.join(folder, "sizes.json")
        text = _text_or_none(path)
        if text is None:
            continue
        try:
            sizes = _json_table(text)
            bases = {url: os.path.basename(url) for url in inside}
            found |= {url: _count(sizes[base]) for url, base in bases.items() if base in sizes}
        except ValueError as error:
            raise ValueError(f"{shorten(path)} is not a table of numbers ({shorten(error)}).") from error
        missing = [os.path.basename(url) for url in inside if url not in found]
        if missing:
            logger.warning("%s has no size for %d shards: %s.", shorten(path), len(missing), join_first(missing, 3))
    return found


def _size_by_stats(folder: str, urls: Sequence[str]) -> int | None:
    """Sum the successes in img2dataset's files. Return None if a shard has no such file."""
    total, missing = 0, []
    for url in urls:
        stem, ending = os.path.splitext(url)
        path = f"{stem}_stats.json"
        text = _text_or_none(path) if ending == ".tar" else None
        if text is None:
            missing.append(os.path.basename(url))
            continue
        try:
            total += _count(_json_table(text).get("successes"))
        except ValueError as error:
            reason = shorten(error)
            raise ValueError(f'{shorten(path)} has no number under "successes" ({reason}).') from error
    if missing and len(missing) < len(urls):
        logger.warning(
            "%s: %d of %d shards have no _stats.json: %s. The number of samples is unknown.",
            shorten(folder) or ".", len(missing), len(urls), join_first(missing, 3),
        )  # fmt: skip
    return None if missing else total


def _by_folder(urls: Sequence[str]) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for url in urls:
        folders.setdefault(os.path.dirname(url), []).append(url)
    return folders


def _text_or_none(path: str) -> str | None:
    """Return the text of a local file or of one that fsspec opens, None if it does not exist.

    Raises:
        ValueError: the file cannot be read, is too large, or is not UTF-8.
    """
    if not is_local(path) and not is_fsspec(path):
        return None
    try:
        return _read_text(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{shorten(path)} cannot be read ({shorten(error.strerror or error)}).") from error
    except ValueError as error:
        raise ValueError(f"{shorten(path)} is not a table of numbers ({error}).") from error


def _folder_size(folder: str) -> int | None:
    if _text_or_none(os.path.join(folder, "sizes.json")) is not None:
        return None
    path = os.path.join(folder, "__len__")
    text = _text_or_none(path)
    if text is None:
        return None
    try:
        return _count(text.strip())
    except ValueError as error:
        raise ValueError(f"{shorten(path)} is not a table of numbers or a number ({shorten(error)}).") from error


def _json_table(text: str) -> dict:
    try:
        table = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(table, dict):
        raise ValueError(f"it holds a {type(table).__name__}")
    return table


def _count(value: object) -> int:
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError(f"{quote(value, 40)} is not a number of samples")
    return value
