"""Which shards there are, and how many samples they have: braces, lists in files, `sizes.json`.

What the user types is trusted: `pipe:COMMAND` runs. What files contain is not: a list of shards in a file names paths
and plain URLs, and sizes are numbers.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence

logger = logging.getLogger(__name__)

_LIST = re.compile(r"\.(txt|list)$")
# Nothing of it can be an option or part of a command for the programs that fetch such URLs.
_PLAIN_URL = re.compile(r"(https?|gs|s3|hf|ais)://\w[\w./:@%+=,~?&-]*")
_NOTES_LIMIT = 1 << 26  # bytes of a list or of sizes.json


def expand_urls(
    urls: str | Sequence[str], weights: str | Sequence[float] | None = None
) -> tuple[list[str], list[float] | None]:
    """Expands braces and `::` to a list of shards, with each source's weight for each of its shards.

    A source that ends in .txt or .list is a file with one shard a line (see `read_list`). `weights`: as many numbers as
    sources, joined by `::`, or for a list of shards a list; None gives None.

    Raises:
        ValueError: not one weight a source, or not numbers above 0; a list that names what only a user may.
        FileNotFoundError: no such list.
    """
    from braceexpand import braceexpand

    if not isinstance(urls, str):
        if isinstance(weights, str):
            raise ValueError("Weights (--train-data-upsampling-factors) need the shards as one string, joined by '::'.")
        return list(urls), None if weights is None else list(weights)
    sources = [read_list(source) if is_list(source) else list(braceexpand(source)) for source in urls.split("::")]
    shards = [shard for source in sources for shard in source]
    if weights is None:
        return shards, None
    if not isinstance(weights, str):
        raise ValueError(f"Weights as a list ({weights}) are for shards as a list: join them by '::'.")
    try:
        factors = [float(weight) for weight in weights.split("::")]
    except ValueError as error:
        raise ValueError(f"--train-data-upsampling-factors: {weights!r} should be numbers joined by '::'.") from error
    if len(factors) != len(sources):
        raise ValueError(
            f"--train-data-upsampling-factors has {len(factors)} numbers ({weights}) for {len(sources)} sources "
            f"({urls}): give one number a source, joined by '::'."
        )
    if not all(factor > 0 for factor in factors):
        raise ValueError(f"--train-data-upsampling-factors: {weights!r} should be numbers above 0.")
    return shards, [factor for factor, source in zip(factors, sources, strict=True) for _ in source]


def is_list(source: str) -> bool:
    """Whether a source of shards is a file that lists them."""
    return _LIST.search(source) is not None and not source.startswith("pipe:")


def read_list(path: str) -> list[str]:
    """The shards that a file names, one a line: paths (as they stand, braces too) and URLs. `#` begins a comment line.

    Raises:
        ValueError: a line that would run a command (`pipe:`) or is no plain URL; it has to be typed, in --train-data.
        FileNotFoundError: no such file.
    """
    try:
        lines = _read_notes(path).splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such list of shards (looked for {os.path.abspath(path)}).") from None
    shards = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if line.lower().startswith(("pipe:", "file:")) or ("://" in line and not _PLAIN_URL.fullmatch(line)):
            raise ValueError(
                f"{path}, line {number}: {line[:100]!r} is refused. A list of shards may name paths and plain URLs "
                "(https, gs, s3, hf, ais), not commands: whoever writes the list would run them here. Type such a "
                "source in --train-data or --val-data itself."
            )
        shards.append(line)
    return shards


def _read_notes(path: str) -> str:
    """A small text file beside the data. ValueError if it is large, or not UTF-8."""
    with open(path, "rb") as file:
        data = file.read(_NOTES_LIMIT + 1)
    if len(data) > _NOTES_LIMIT:
        raise ValueError(f"{path} has more than {_NOTES_LIMIT >> 20} MiB")
    return data.decode("utf-8")


def get_dataset_size(shards: str | Sequence[str]) -> tuple[int | None, int]:
    """(samples, shards): the number of samples from `sizes.json` or `__len__` beside the shards, None where unknown.

    sizes.json is {"00000.tar": samples, ...}; `__len__` holds one number for all shards of its folder.

    Raises:
        ValueError: one of these files cannot be read as such.
    """
    names, _ = expand_urls(shards)
    sizes, total = shard_sizes(names), 0
    for folder, urls in _by_folder(names).items():
        known = [sizes[url] for url in urls if url in sizes]
        size = sum(known) if len(known) == len(urls) else _folder_size(folder)
        if size is None:
            return None, len(names)
        total += size
    return total, len(names)


def shard_sizes(urls: Sequence[str]) -> dict[str, int]:
    """Samples of each shard of which the `sizes.json` in its folder tells them.

    Raises:
        ValueError: such a file is not a table of numbers.
    """
    found: dict[str, int] = {}
    for folder, inside in _by_folder(urls).items():
        path = os.path.join(folder, "sizes.json")
        if not os.path.exists(path):
            continue
        try:
            sizes = json.loads(_read_notes(path))
            if not isinstance(sizes, dict):
                raise ValueError(f"it holds a {type(sizes).__name__}")
            bases = {url: os.path.basename(url) for url in inside}
            found |= {url: _count(sizes[base]) for url, base in bases.items() if base in sizes}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a table of numbers or a number ({error}).") from error
        missing = [url for url in inside if url not in found]
        if missing:
            logger.warning("%s lacks %d shards, first %r.", path, len(missing), os.path.basename(missing[0]))
    return found


def _by_folder(urls: Sequence[str]) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for url in urls:
        folders.setdefault(os.path.dirname(url), []).append(url)
    return folders


def _folder_size(folder: str) -> int | None:
    path = os.path.join(folder, "__len__")
    if os.path.exists(os.path.join(folder, "sizes.json")) or not os.path.exists(path):
        return None
    try:
        return _count(_read_notes(path).strip())
    except ValueError as error:
        raise ValueError(f"{path} is not a table of numbers or a number ({error}).") from error


def _count(value: object) -> int:
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError(f"{str(value)[:40]!r} is no number of samples")
    return value
