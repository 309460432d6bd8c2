"""Tar shards in webdataset's format: their names, sizes and contents.

A shard is a tar file whose consecutive members with one name up to the first dot are one sample: `0001.jpg`,
`0001.txt`. The format is webdataset's (https://github.com/webdataset/webdataset), so are brace expansion and, through
`webdataset.gopen`, what is not a local file. Reading is ours: a torn shard gives what is whole in it, the empty
samples that webdataset 1.x puts at a shard's end are no crash, and the order is a function of the shards alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

from training.data.skips import BadSample

logger = logging.getLogger(__name__)

IMAGE_KEYS = ("jpg", "png", "jpeg", "webp", "tif", "tiff")  # the first that a sample has is its image
CAPTION_KEY = "txt"

_META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset's own notes inside a shard

Sample = dict[str, Any]  # "__key__", "__url__", and bytes by extension


def expand_urls(
    urls: str | Sequence[str], weights: str | Sequence[float] | None = None
) -> tuple[list[str], list[float] | None]:
    """Expands braces and `::` to a list of shards, with each source's weight for each of its shards.

    `weights`: as many numbers as sources, joined by `::`, or for a list of shards a list; None gives None.

    Raises:
        ValueError: not one weight a source, or not numbers above 0.
    """
    from braceexpand import braceexpand

    if not isinstance(urls, str):
        if isinstance(weights, str):
            raise ValueError("Weights (--train-data-upsampling-factors) need the shards as one string, joined by '::'.")
        return list(urls), None if weights is None else list(weights)
    sources = [list(braceexpand(source)) for source in urls.split("::")]
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


def get_dataset_size(shards: str | Sequence[str]) -> tuple[int | None, int]:
    """(samples, shards): the number of samples from `sizes.json` or `__len__` beside the shards, None where unknown.

    sizes.json is {"00000.tar": samples, ...}; `__len__` holds one number for all shards of its folder.

    Raises:
        ValueError: one of these files cannot be read as such.
    """
    names, _ = expand_urls(shards)
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, base = os.path.split(name)
        folders.setdefault(folder, []).append(base)
    sizes = [_folder_size(folder, bases) for folder, bases in folders.items()]
    known = [size for size in sizes if size is not None]
    return (sum(known) if len(known) == len(sizes) else None), len(names)


def _folder_size(folder: str, bases: list[str]) -> int | None:
    sizes_file, len_file = os.path.join(folder, "sizes.json"), os.path.join(folder, "__len__")
    try:
        if os.path.exists(sizes_file):
            with open(sizes_file, encoding="utf-8") as file:
                sizes = json.load(file)
            missing = [base for base in bases if base not in sizes]
            if missing:
                logger.warning("%s lacks %d shards, first %r: it is not used.", sizes_file, len(missing), missing[0])
                return None
            return sum(int(sizes[base]) for base in bases)
        if os.path.exists(len_file):
            with open(len_file, encoding="utf-8") as file:
                return int(file.read())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: sizes.json or __len__ is not a table of numbers or a number ({error}).") from error
    return None


def is_local(url: str) -> bool:
    """Whether it is a path, rather than `pipe:COMMAND` or `scheme://...`."""
    return not url.startswith("pipe:") and "://" not in url and not url.startswith("file:")


def log_and_continue(exn: Exception) -> bool:
    """webdataset handler: logs the exception and returns True, "go on"."""
    logger.warning("Handling webdataset error (%r). Ignoring.", exn)
    return True


def filter_no_caption_or_no_image(sample: Sample) -> bool:
    """Whether the sample has a caption (txt) and an image."""
    return CAPTION_KEY in sample and any(key in sample for key in IMAGE_KEYS)


def _base_plus_ext(path: str) -> tuple[str | None, str | None]:
    """`a/b.c.d` -> (`a/b`, `c.d`): the sample and its extension. (None, None) where the name has no dot, or no name."""
    folder, slash, base = path.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension) if dot and stem else (None, None)


def group_by_keys_nothrow(
    data: Iterable[Sample],
    keys: Callable[[str], tuple[str | None, str | None]] = _base_plus_ext,
    lcase: bool = True,
    suffixes: Iterable[str] | None = None,
    handler: Callable[[Exception], bool] | None = None,
) -> Iterator[Sample]:
    """Groups members {"fname", "data", "__url__"} into samples {"__key__", "__url__", extension: data}.

    A new sample begins with a new key, another shard, an extension that the sample has already (names may repeat in
    neighbouring shards), and at an entry without "fname" (webdataset's end-of-shard marker). Never raises for what the
    data are; `handler` is unused and there because webdataset hands one over.

    keys: name -> (key, extension), key None to leave the member out. lcase: lower-case extensions. suffixes: which to
    keep.
    """
    wanted = None if suffixes is None else set(suffixes)
    current: Sample = {}
    for member in data:
        name = member.get("fname")
        if name is None:
            if current:
                yield current
            current = {}
            continue
        key, extension = keys(name)
        if key is None or extension is None:
            continue
        if lcase:
            extension = extension.lower()
        url = member.get("__url__")
        if current and (key != current["__key__"] or url != current["__url__"] or extension in current):
            yield current
            current = {}
        if not current:
            current = {"__key__": key, "__url__": url}
        if wanted is None or extension in wanted:
            current[extension] = member["data"]
    if current:
        yield current


def read_shard(url: str) -> Iterator[Sample]:
    """The samples of one shard.

    Raises:
        BadSample: missing_shard, empty_shard or corrupt_shard, after everything that is whole.
    """
    reading = _Reading(url)
    for sample in group_by_keys_nothrow(reading.members()):
        # what a shard breaks off in is counted with the shard
        if reading.error is None or filter_no_caption_or_no_image(sample):
            yield sample
    reading.check()


class _NotingTarInfo(tarfile.TarInfo):
    """Notes blocks that are no header, and the end mark: tarfile passes over damage and a missing end in silence."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.InvalidHeaderError:  # type: ignore[attr-defined]
            tar.damaged_blocks += 1
            raise
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.has_end_mark = True
            raise


class _Tar(tarfile.TarFile):
    tarinfo = _NotingTarInfo
    damaged_blocks = 0
    has_end_mark = False


class _Reading:
    """One pass over a shard, from begin to end, and what went wrong on the way."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.count = 0
        self.damaged_blocks = 0
        self.has_end_mark = False
        self.error: Exception | None = None

    def members(self) -> Iterator[Sample]:
        """The regular files of the tar, compressed or not: {"fname", "data", "__url__"}. Ends at an error."""
        try:
            # ignore_zeros: behind damaged blocks and early end marks, reading goes on at the next whole header
            with _opened(self.url) as stream, _Tar.open(fileobj=stream, mode="r|*", ignore_zeros=True) as tar:
                while (member := tar.next()) is not None:
                    if member.isreg() and not _META_MEMBER.match(member.name):
                        yield {"fname": member.name, "data": _contents(tar, member), "__url__": self.url}
                        self.count += 1
                    tar.members = []  # type: ignore[attr-defined]  # it remembers every member otherwise
                self.damaged_blocks = tar.damaged_blocks
                self.has_end_mark = tar.has_end_mark
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            self.error = error

    def check(self) -> None:
        """Raises BadSample unless all of the shard was read."""
        if self.error is not None:
            raise self._bad(self.error) from self.error
        if self.damaged_blocks:
            reason = f"{self.damaged_blocks} blocks of 512 bytes are no tar; {self.count} files around them are read"
            raise BadSample("corrupt_shard", self.url, reason)
        if not self.has_end_mark:
            raise BadSample("corrupt_shard", self.url, f"truncated after {self.count} files: it has no end mark")
        if not self.count:
            raise BadSample("empty_shard", self.url, "there are no files in it")

    def _bad(self, error: Exception) -> BadSample:
        if isinstance(error, FileNotFoundError):
            return BadSample("missing_shard", self.url, "there is no such file")
        reason = f"{type(error).__name__}: {error}"
        if self.count == 0 and isinstance(error, OSError) and not isinstance(error, tarfile.TarError):
            return BadSample("missing_shard", self.url, f"cannot be opened ({reason})")
        if self.count == 0 and is_local(self.url) and os.path.getsize(self.url) == 0:
            return BadSample("empty_shard", self.url, "the file has 0 bytes")
        return BadSample("corrupt_shard", self.url, f"breaks off after {self.count} files ({reason})")


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a regular file has contents
    data = file.read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"unexpected end of data in {member.name}")
    return data


@contextlib.contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    if is_local(url):
        with open(url, "rb") as local:
            yield local
        return
    from webdataset.gopen import gopen

    stream = gopen(url)
    try:
        yield stream
    except tarfile.TarError:
        stream.close()  # where the command of a pipe failed, that is the error
        raise
    except BaseException:
        # An epoch may end inside a shard: that the command of a pipe then complains is to be expected.
        with contextlib.suppress(OSError):
            stream.close()
        raise
    else:
        stream.close()


def tarfile_to_samples_nothrow(
    src: Iterable[Sample], handler: Callable[[Exception], bool] = log_and_continue
) -> Iterator[Sample]:
    """Pipeline stage: shards {"url"} to the samples in them. After an exception, `handler(exception)` False ends it."""
    for shard in src:
        try:
            yield from read_shard(shard["url"])
        except BadSample as bad:
            if not handler(bad):
                break
