"""Samples of tar shards in webdataset's format.

A shard is a tar file whose consecutive members with one name up to the first dot are one sample: `0001.jpg`,
`0001.txt`. The format is webdataset's (https://github.com/webdataset/webdataset), and `webdataset.gopen` opens what is
not a local file. Reading is ours (`training.data.archives`): a torn shard gives what is whole in it and never an image
with another one's caption, the empty samples that webdataset 1.x puts at a shard's end are no crash, members are only
ever read into memory, within limits, and never unpickled or written anywhere.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from training.data.archives import Member, TarStream, opened
from training.data.messages import join, quote, shorten
from training.data.remote import is_local
from training.data.skips import BadSample

logger = logging.getLogger(__name__)

IMAGE_KEYS = ("jpg", "png", "jpeg", "webp", "tif", "tiff")  # the first that a sample has is its image
CAPTION_KEY = "txt"
CAPTION_LIMIT = 1 << 20  # bytes; what is larger is not read
IMAGE_LIMIT = 1 << 28

_EXIT_STATUS = re.compile(r"\bexit (\d+) \(read\)")  # in webdataset's error of a `pipe:` command
_META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset's own notes inside a shard

Sample = dict[str, Any]  # "__key__", "__url__", and bytes by extension


def log_and_continue(exn: Exception) -> bool:
    """webdataset handler: logs the exception and returns True, "go on"."""
    logger.warning("Handling webdataset error (%s). Ignoring.", shorten(repr(exn), 400))
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

    A member with a true "__after_damage__" adds nothing to the sample before, though it has its key: what was lost
    between may have been the end of one sample and the begin of another. The sample then has "__torn__". A sample has
    the "__offset__" of its first member where members have one.

    keys: name -> (key, extension), key None to leave the member out. lcase: lower-case extensions. suffixes: which to
    keep.
    """
    wanted = None if suffixes is None else set(suffixes)
    current: Sample = {}
    damage = False
    for member in data:
        name = member.get("fname")
        if name is None:
            if current:
                yield current
            current = {}
            continue
        damage = bool(member.get("__after_damage__")) or damage
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
            current, damage = {"__key__": key, "__url__": url}, False
            if "__offset__" in member:
                current["__offset__"] = member["__offset__"]
        if damage:
            current["__torn__"] = True
        elif wanted is None or extension in wanted:
            current[extension] = member["data"]
    if current:
        yield current


@dataclass(frozen=True)
class TooLarge:
    """Stands for a member's contents that are above the limit and were not read."""

    size: int


def read_shard(
    url: str, wanted: Collection[str] | None = None, offset: int = 0, is_begin: bool = True
) -> Iterator[Sample]:
    """The samples of one shard, each with its "__offset__".

    A sample whose image and caption are not adjacent comes in two parts. The second part has "__apart__".

    wanted: extensions whose contents are read, the others are b""; None reads all. offset: of the sample to begin with,
    as an earlier reading gave it; one seek in a local tar, reading up to it in a compressed one or a pipe. `is_begin`:
    whether that is the first sample. Contents above the limits are `TooLarge`.

    Raises:
        BadSample: missing_shard, empty_shard or corrupt_shard, after everything that is whole.
    """
    reading, parts = _Reading(url, wanted, offset, is_begin), _Parts()
    for sample in group_by_keys_nothrow(reading.members()):
        # what a shard breaks off in is counted with the shard
        if reading.error is None or filter_no_caption_or_no_image(sample):
            if parts.completes_earlier(sample):
                sample["__apart__"] = True
            yield sample
    reading.check()


class _Parts:
    """Which keys of a shard had an image without a caption, or a caption without an image."""

    _LIMIT = 1 << 18  # keys that are remembered: about 20 MB

    def __init__(self) -> None:
        self._has_image: dict[int, bool] = {}  # by the key's hash

    def completes_earlier(self, sample: Sample) -> bool:
        """Whether it is the other part of a sample that came earlier, so that the two are not adjacent."""
        has_image, has_caption = any(key in sample for key in IMAGE_KEYS), CAPTION_KEY in sample
        if has_image == has_caption or "__torn__" in sample:
            return False
        key = hash(sample["__key__"])
        earlier = self._has_image.get(key)
        if earlier is None and len(self._has_image) < self._LIMIT:
            self._has_image[key] = has_image
        return earlier is not None and earlier != has_image


def unsorted_shard(sample: Sample) -> BadSample:
    """The error of a shard, from a sample of it that is "__apart__"."""
    reason = f"the members of {shorten(sample['__key__'], 60)!r} are not adjacent; write it with `tar --sort=name`"
    return BadSample("unsorted_shard", sample["__url__"], reason)


def find_unsorted(url: str) -> BadSample | None:
    """Read the names in a local shard; the error where members of a sample are not adjacent, else None."""
    if not is_local(url):
        return None
    with contextlib.suppress(BadSample):
        for sample in read_shard(url, wanted=()):
            if "__apart__" in sample:
                return unsorted_shard(sample)
    return None


class _Reading:
    """One pass over a shard, from `offset` to the end, and what went wrong on the way."""

    def __init__(self, url: str, wanted: Collection[str] | None, offset: int, is_begin: bool) -> None:
        self.url = url
        self.wanted = wanted
        self.offset = offset
        self.is_begin = is_begin
        self.count = 0
        self.stream: TarStream | None = None
        self.error: Exception | None = None

    def members(self) -> Iterator[Sample]:
        """The regular files of the tar: {"fname", "data", "__url__", "__offset__", "__after_damage__"}.

        Ends at an error.
        """
        damage = False
        try:
            with opened(self.url) as stream:
                self.stream = stream
                stream.start_at(self.offset)
                for member in stream:
                    damage = damage or member.after_damage
                    if not member.is_file or _META_MEMBER.match(member.name):
                        continue
                    yield {
                        "fname": member.name,
                        "data": self._contents(stream, member),
                        "__url__": self.url,
                        "__offset__": member.offset,
                        "__after_damage__": damage,
                    }
                    self.count += 1
                    damage = False
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            self.error = error

    def _contents(self, stream: TarStream, member: Member) -> bytes | TooLarge:
        extension = (_base_plus_ext(member.name)[1] or "").lower()
        if self.wanted is not None and extension not in self.wanted:
            return b""
        limit = CAPTION_LIMIT if extension == CAPTION_KEY else IMAGE_LIMIT
        return TooLarge(member.size) if member.size > limit else stream.contents()

    def check(self) -> None:
        """Raises BadSample unless all of the shard was read."""
        if self.error is not None:
            raise self._bad(self.error) from self.error
        assert self.stream is not None
        if self.stream.is_empty:
            raise BadSample("empty_shard", self.url, "it has 0 bytes")
        if self.stream.damaged_blocks:
            blocks = self.stream.damaged_blocks
            reason = f"{blocks} blocks of 512 bytes are no tar; {self.count} files around them are read"
            raise BadSample("corrupt_shard", self.url, reason)
        if not self.stream.has_end_mark:
            raise BadSample("corrupt_shard", self.url, f"truncated after {self.count} files: it has no end mark")
        if not self.count and self.is_begin:
            raise BadSample("empty_shard", self.url, "there are no files in it")

    def _bad(self, error: Exception) -> BadSample:
        if isinstance(error, FileNotFoundError):
            return BadSample("missing_shard", self.url, "there is no such file")
        status = _EXIT_STATUS.search(str(error))
        if status is None:
            reason = f"{type(error).__name__}: {error}"
        else:  # webdataset's words are the arguments of Popen
            reason = f"the command ended with exit status {status.group(1)}"
            reason += ": there is no such command" if status.group(1) == "127" else ""
        is_reading_error = isinstance(error, (tarfile.TarError, gzip.BadGzipFile))
        if self.count == 0 and isinstance(error, OSError) and not is_reading_error:
            return BadSample("missing_shard", self.url, f"cannot be opened ({reason})")
        return BadSample("corrupt_shard", self.url, f"breaks off after {self.count} files ({reason})")


def tarfile_to_samples_nothrow(
    src: Iterable[Sample], handler: Callable[[Exception], bool] = log_and_continue
) -> Iterator[Sample]:
    """Pipeline stage: shards {"url"} to the samples in them. After an exception, `handler(exception)` False ends it."""
    for shard in src:
        try:
            for sample in read_shard(shard["url"]):
                large = next((key for key, value in sample.items() if isinstance(value, TooLarge)), None)
                if large is None:
                    yield sample
                elif not handler(too_large(sample, large)):
                    return
        except BadSample as bad:
            if not handler(bad):
                break


def unusable(sample: Sample) -> BadSample | None:
    """Why a sample of `read_shard` is no pair of an image and a caption; None if it is one."""
    name = f"{sample['__url__']}/{sample['__key__']}"
    caption = sample.get(CAPTION_KEY, b"")
    image = next((key for key in IMAGE_KEYS if key in sample), None)
    if isinstance(caption, TooLarge):
        return too_large(sample, CAPTION_KEY)
    if image is not None and isinstance(sample[image], TooLarge):
        return too_large(sample, image)
    if "__torn__" in sample and (image is None or not caption.strip()):
        return BadSample("torn_sample", name, f"the shard is damaged inside it; whole before that: {_members(sample)}")
    if not caption.strip():
        reason = f"no caption, or an empty one ({CAPTION_KEY}); the sample has: {_members(sample)}"
        return BadSample("no_caption", name, reason)
    if image is None:
        reason = f"no image ({', '.join(IMAGE_KEYS)}); the sample has: {_members(sample)}"
        return BadSample("no_image", name, reason)
    return None


def _members(sample: Sample) -> str:
    """What the sample has, for a message: a few of its extensions."""
    extensions = [key for key in sample if not key.startswith("__")]
    if not extensions:
        return "nothing"
    usable = (CAPTION_KEY, *IMAGE_KEYS)
    if any("." in extension and extension.rpartition(".")[2] in usable for extension in extensions):
        return f"{join(extensions, 2, 25)} (the names have dots: the key ends at the first dot)"
    folder = sample["__key__"].rpartition("/")[0]
    hint = f" (an image and its caption must be in one folder; this is {quote(folder, 30)})" if folder else ""
    return join(extensions, 5, 15) + hint


def too_large(sample: Sample, key: str) -> BadSample:
    """Of a member of the sample that is `TooLarge`."""
    is_caption = key == CAPTION_KEY
    cause, limit = ("huge_caption", CAPTION_LIMIT) if is_caption else ("huge_image", IMAGE_LIMIT)
    name = f"{sample['__url__']}/{sample['__key__']}.{key}"
    return BadSample(cause, name, f"{sample[key].size} bytes, the limit is {limit}; it was not read")
