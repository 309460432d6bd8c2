"""Samples of tar shards in webdataset's format.

A shard is a tar file in which consecutive members with the same name up to the first dot form a sample: `0001.jpg`,
`0001.txt`. The format is webdataset's (https://github.com/webdataset/webdataset), and `webdataset.gopen` opens shards
that are not local files. The tar files are read by `tar`. A damaged shard gives its intact samples, and never an image
with the caption of another one. Members are read into memory, up to a limit, and never unpickled or written to disk.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from training.data.messages import join_first, quote, shorten
from training.data.shards.pairs import DEFAULT_MEMBERS, PairMembers
from training.data.shards.remote import is_local
from training.data.shards.tar import Member, TarStream, open_tar
from training.data.skips import CAPTION_LIMIT, IMAGE_LIMIT, BadSample

_EXIT_STATUS = re.compile(r"\bexit (\d+) \(read\)")  # in webdataset's error of a `pipe:` command
_META_MEMBER = re.compile(r"__[^/]*__($|/)")  # metadata that webdataset writes into a shard

Sample = dict[str, Any]  # "__key__", "__url__", and bytes by extension


def filter_no_caption_or_no_image(sample: Sample) -> bool:
    """Return whether the sample has a caption (txt) and an image."""
    return DEFAULT_MEMBERS.are_in(sample)


def _base_plus_ext(path: str) -> tuple[str | None, str | None]:
    """Split `a/b.c.d` into (`a/b`, `c.d`). Return (None, None) if the file name has no dot or starts with it."""
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
    """Group members {"fname", "data", "__url__"} into samples {"__key__", "__url__", extension: data}.

    A new sample starts at a new key, at another shard, at an extension that the sample already has (neighboring shards
    may repeat names), and at an entry without "fname" (webdataset's end-of-shard marker). The data never cause an
    exception.

    A member with a true "__after_damage__" is not added to the sample before it, even if it has the same key, because
    the damage may have destroyed the end of one sample and the start of another. The sample then has "__torn__". If
    members have an "__offset__", the sample has that of its first member.

    Args:
        data: the members.
        keys: name -> (key, extension); key None drops the member.
        lcase: whether to convert extensions to lower case.
        suffixes: extensions to keep; None keeps all.
        handler: not used; webdataset passes one.
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
    """Replaces the contents of a member that are above the limit and were not read."""

    size: int


def read_shard(
    url: str,
    wanted: Collection[str] | None = None,
    offset: int = 0,
    is_first: bool = True,
    members: PairMembers = DEFAULT_MEMBERS,
) -> Iterator[Sample]:
    """Yield the samples of one shard, each with its "__offset__".

    A sample whose image and caption are not adjacent is yielded in two parts, and the second part has "__apart__".
    Contents above the limits are `TooLarge`.

    Args:
        url: the shard.
        wanted: extensions whose contents are read; others are b"". None reads all.
        offset: "__offset__" of the sample to start with. This is a seek in a local tar; a compressed tar or a pipe is
            read up to there.
        is_first: whether that is the first sample of the shard.
        members: the members that are images and captions.

    Raises:
        BadSample: missing_shard, empty_shard or corrupt_shard, after all intact samples.
    """
    reader, incomplete = _MemberReader(url, wanted, offset, is_first, members), _IncompleteSamples(members)
    for sample in group_by_keys_nothrow(reader.members()):
        # an incomplete sample at the end of a truncated shard is not counted in addition to the shard
        if reader.error is None or members.are_in(sample):
            if incomplete.is_second_part(sample):
                sample["__apart__"] = True
            yield sample
    reader.raise_if_bad()


class _IncompleteSamples:
    """The keys of a shard that had an image without a caption, or a caption without an image."""

    _LIMIT = 1 << 18  # of stored keys: about 20 MB

    def __init__(self, members: PairMembers) -> None:
        self._members = members
        self._has_image: dict[int, bool] = {}  # by the key's hash

    def is_second_part(self, sample: Sample) -> bool:
        """Return whether the sample is the missing part of an earlier one, so the two parts are not adjacent."""
        has_image = self._members.image_key(sample) is not None
        has_caption = self._members.text_key(sample) is not None
        if has_image == has_caption or "__torn__" in sample:
            return False
        key = hash(sample["__key__"])
        earlier = self._has_image.get(key)
        if earlier is None and len(self._has_image) < self._LIMIT:
            self._has_image[key] = has_image
        return earlier is not None and earlier != has_image


def unsorted_shard(sample: Sample) -> BadSample:
    """Return the error of a shard, from a sample of it that has "__apart__"."""
    reason = f"the members of {shorten(sample['__key__'], 60)!r} are not adjacent; write it with `tar --sort=name`"
    return BadSample("unsorted_shard", sample["__url__"], reason)


def find_unsorted(url: str, members: PairMembers) -> BadSample | None:
    """Read the names in a local shard. Return an error if the members of a sample are not adjacent, otherwise None."""
    if not is_local(url):
        return None
    with contextlib.suppress(BadSample):
        for sample in read_shard(url, wanted=(), members=members):
            if "__apart__" in sample:
                return unsorted_shard(sample)
    return None


class _MemberReader:
    """Reads a shard once, from `offset` to the end, and keeps the error that occurred."""

    def __init__(
        self, url: str, wanted: Collection[str] | None, offset: int, is_first: bool, pair: PairMembers
    ) -> None:
        self.url = url
        self.wanted = wanted
        self.offset = offset
        self.is_first = is_first
        self.pair = pair
        self.count = 0
        self.stream: TarStream | None = None
        self.error: Exception | None = None

    def members(self) -> Iterator[Sample]:
        """Yield the regular files up to the first error.

        Each is a dict {"fname", "data", "__url__", "__offset__", "__after_damage__"}.
        """
        damage = False
        try:
            with open_tar(self.url) as stream:
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
        limit = CAPTION_LIMIT if extension in self.pair.text_keys else IMAGE_LIMIT
        return TooLarge(member.size) if member.size > limit else stream.contents()

    def raise_if_bad(self) -> None:
        """Raise BadSample unless the whole shard was read."""
        if self.error is not None:
            raise self._to_bad_sample(self.error) from self.error
        assert self.stream is not None
        if self.stream.is_empty:
            raise BadSample("empty_shard", self.url, "it has 0 bytes")
        if self.stream.damaged_blocks:
            blocks = self.stream.damaged_blocks
            reason = f"{blocks} blocks of 512 bytes are not tar headers; {self.count} files around them are read"
            raise BadSample("corrupt_shard", self.url, reason)
        if not self.stream.has_end_mark:
            raise BadSample("corrupt_shard", self.url, f"truncated after {self.count} files: it has no end mark")
        if not self.count and self.is_first:
            raise BadSample("empty_shard", self.url, "there are no files in it")

    def _to_bad_sample(self, error: Exception) -> BadSample:
        if isinstance(error, FileNotFoundError):
            return BadSample("missing_shard", self.url, "there is no such file")
        status = _EXIT_STATUS.search(str(error))
        if status is None:
            reason = f"{type(error).__name__}: {error}"
        else:  # webdataset's message has the arguments of Popen
            reason = f"the command ended with exit status {status.group(1)}"
            reason += ": there is no such command" if status.group(1) == "127" else ""
        is_reading_error = isinstance(error, (tarfile.TarError, gzip.BadGzipFile))
        if self.count == 0 and isinstance(error, OSError) and not is_reading_error:
            return BadSample("missing_shard", self.url, f"cannot be opened ({reason})")
        return BadSample("corrupt_shard", self.url, f"it cannot be read after {self.count} files ({reason})")


def why_unusable(sample: Sample, members: PairMembers = DEFAULT_MEMBERS) -> BadSample | None:
    """Return why a sample of `read_shard` is not a pair of an image and a caption; None if it is."""
    name = f"{sample['__url__']}/{sample['__key__']}"
    text, image = members.text_key(sample), members.image_key(sample)
    caption = b"" if text is None else sample[text]
    if text is not None and isinstance(caption, TooLarge):
        return too_large(sample, text, members)
    if image is not None and isinstance(sample[image], TooLarge):
        return too_large(sample, image, members)
    if "__torn__" in sample and (image is None or not caption.strip()):
        reason = f"the shard is damaged inside it; intact before that: {_describe_members(sample, members)}"
        return BadSample("torn_sample", name, reason)
    if not caption.strip():
        expected = ", ".join(members.text_keys)
        reason = f"no caption, or an empty one ({expected}); the sample has: {_describe_members(sample, members)}"
        return BadSample("no_caption", name, reason)
    if image is None:
        reason = f"no image ({', '.join(members.image_keys)}); the sample has: {_describe_members(sample, members)}"
        return BadSample("no_image", name, reason)
    return None


def _describe_members(sample: Sample, members: PairMembers) -> str:
    """Return a few extensions of the sample, for a message."""
    extensions = [key for key in sample if not key.startswith("__")]
    if not extensions:
        return "nothing"
    usable = members.extensions
    if any("." in extension and extension.rpartition(".")[2] in usable for extension in extensions):
        return f"{join_first(extensions, 2, 25)} (the names have dots: the key ends at the first dot)"
    folder = sample["__key__"].rpartition("/")[0]
    hint = f" (an image and its caption must be in one folder; this is {quote(folder, 30)})" if folder else ""
    return join_first(extensions, 5, 15) + hint


def too_large(sample: Sample, key: str, members: PairMembers = DEFAULT_MEMBERS) -> BadSample:
    """Return the error for a member of the sample that is `TooLarge`."""
    is_caption = key in members.text_keys
    cause, limit = ("huge_caption", CAPTION_LIMIT) if is_caption else ("huge_image", IMAGE_LIMIT)
    name = f"{sample['__url__']}/{sample['__key__']}.{key}"
    return BadSample(cause, name, f"{sample[key].size} bytes, the limit is {limit}; it was not read")
