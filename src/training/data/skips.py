"""Bad samples: their causes, counts by cause and shard, and when there are too many of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import get_worker_info

from training import ranks
from training.data.messages import MESSAGE_LIMIT, shorten

logger = logging.getLogger(__name__)

# Causes that are counted. Their order is that of the columns of the shared table.
SAMPLE_CAUSES = (
    "missing_image",  # there is no such file
    "empty_image",  # it has 0 bytes
    "corrupt_image",  # cannot be decoded: truncated, not an image
    "huge_image",  # more pixels than Pillow's limit (a decompression bomb), or more bytes than IMAGE_LIMIT
    "no_image",  # the row names no image, or the sample has none
    "no_caption",  # there is none, or it is empty
    "corrupt_caption",  # not UTF-8
    "huge_caption",  # more bytes than CAPTION_LIMIT
    "torn_sample",  # its shard is damaged between its members, which may not belong together
    "lost_sample",  # sizes.json counts it, and it is not in the shard
)
SHARD_CAUSES = (
    "missing_shard",  # cannot be opened
    "corrupt_shard",  # truncated or not a tar; its intact samples are used
    "empty_shard",  # has no samples
    "unsorted_shard",  # the members of a sample are not adjacent, so neither part can be used
)
CAUSES = SAMPLE_CAUSES + SHARD_CAUSES

CAPTION_LIMIT = 1 << 20  # bytes; larger captions and images are not read
IMAGE_LIMIT = 1 << 28

# If the first samples are all bad, a run stops after BAD_IN_A_ROW of them from at least BAD_SHARDS shards.
BAD_IN_A_ROW = 100
BAD_SHARDS = 5
# After a good sample it stops after _LATER_IN_A_ROW bad ones, and a bad shard counts as _SHARD_WEIGHT samples. One bad
# shard must not end a run of days, but if the storage is gone, there will never be another batch.
_LATER_IN_A_ROW = 100_000
_SHARD_WEIGHT = 1000
_LOGGED_PER_CAUSE = 3
_REPORTED_SHARDS = 5  # those with the most bad samples
_GATHERED_SHARDS = 50  # from each rank
# Limits of a bad sample's name and reason in characters, because data may contain anything.
_NAME_LIMIT = 200
_REASON_LIMIT = 180
# With fewer samples (or shards) than these, the fraction of bad ones is not compared with its limit.
_LEAST_SAMPLES = 200
_LEAST_SHARDS = 20


class BadSample(Exception):
    """A sample (or a shard) that is skipped and counted.

    Args:
        cause: one of CAUSES.
        name: the file, row or shard; shortened if long.
        reason: for the log; shortened if long.
    """

    def __init__(self, cause: str, name: str, reason: str) -> None:
        self.cause = cause
        self.name = shorten(name, _NAME_LIMIT)
        self.reason = shorten(reason, _REASON_LIMIT)
        super().__init__(f"{cause}: {self.name}: {self.reason}")

    def __reduce__(self) -> tuple:
        return BadSample, (self.cause, self.name, self.reason)


class SkipCounter:
    """Counts of bad samples by cause and by shard, in this process and its data loader's workers.

    The counts are tables in shared memory with one row per process. So no lock is needed, which a killed worker could
    keep, and the tables reach forked and spawned workers alike.

    All samples that were read are counted, including prefetched ones. A new process starts at 0, so a resumed run
    counts samples again that it reads again.

    Args:
        workers: of the data loader.
        shards: names, for the counts by shard.
        max_bad_fraction: limit for `report_skips`.
    """

    def __init__(self, workers: int = 0, shards: Sequence[str] = (), max_bad_fraction: float = 1.0) -> None:
        self.shards = shards
        self.max_bad_fraction = max_bad_fraction
        rows = workers + 1
        self._table = torch.zeros(rows, len(CAUSES), dtype=torch.int64).share_memory_()
        self._read = torch.zeros(rows, 2, dtype=torch.int64).share_memory_()  # good samples, shards
        self._by_shard = torch.zeros(rows, len(shards), dtype=torch.int32).share_memory_()

    def add_bad(self, bad: BadSample, shard: int | None = None, times: int = 1) -> None:
        """Count a bad sample or shard. The first few of each cause are logged with their name."""
        column, row = CAUSES.index(bad.cause), self._row()
        seen = int(self._table[:, column].sum())
        self._table[row, column] += times
        if shard is not None:
            self._by_shard[row, shard] += times
        if seen < _LOGGED_PER_CAUSE:
            last = " (further ones are only counted)" if seen + times >= _LOGGED_PER_CAUSE else ""
            logger.warning("Skipped, %s: %s: %s%s", bad.cause, bad.name, bad.reason, last)

    def add_good(self) -> None:
        """Count a usable sample."""
        self._read.numpy()[self._row(), 0] += 1  # faster than torch for one element

    def add_shard(self) -> None:
        """Count a shard that is about to be read, good or bad."""
        self._read[self._row(), 1] += 1

    def _row(self) -> int:
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id % max(1, len(self._table) - 1)
        return min(row, len(self._table) - 1)

    def counts(self) -> dict[str, int]:
        """Return the counts by cause, without causes that did not occur."""
        return {cause: n for cause, n in zip(CAUSES, self._table.sum(0).tolist(), strict=True) if n}

    def total(self) -> int:
        return int(self._table.sum())

    def read(self) -> tuple[int, int]:
        """Return (usable samples, shards)."""
        good, shards = self._read.sum(0).tolist()
        return good, shards

    def worst(self, count: int) -> dict[str, int]:
        """Return the `count` shards with the most bad samples, with their counts. An unreadable shard counts as one."""
        by_shard = self._by_shard.sum(0)
        top = torch.topk(by_shard, min(count, len(by_shard)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return {self.shards[shard]: n for shard, n in pairs if n}


class TooManyBadSamples(ValueError):
    """More of the data are bad than --max-bad-fraction allows."""


@dataclass(frozen=True)
class SkipReport:
    """Counts of all ranks. `samples` are good and bad ones, and `worst` are the shards with the most bad samples."""

    counts: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    shards: int = 0
    worst: dict[str, int] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        return sum(self.counts.get(cause, 0) for cause in SAMPLE_CAUSES)

    @property
    def fraction(self) -> float:
        """The fraction of bad samples, or of missing and empty shards if that is larger; 0 if too few were read.

        Shards are considered because, without a sizes.json, the number of samples in a missing shard is unknown.
        """
        unread = self.counts.get("missing_shard", 0) + self.counts.get("empty_shard", 0)
        by_sample = self.bad / self.samples if self.samples >= _LEAST_SAMPLES else 0.0
        by_shard = unread / self.shards if self.shards >= _LEAST_SHARDS else 0.0
        return max(by_sample, min(by_shard, 1.0))

    def __str__(self) -> str:
        """Return a log line, empty if nothing was skipped."""
        if not self.counts:
            return ""
        causes = ", ".join(f"{cause} {n}" for cause, n in self.counts.items())
        worst = ", ".join(f"{shorten(name, 50)} ({n})" for name, n in self.worst.items())
        skipped = f"Skipped: {causes} of {self.samples} samples" + (f"; most in {worst}" if worst else "")
        return skipped if len(skipped) <= MESSAGE_LIMIT else skipped[: MESSAGE_LIMIT - 4] + " ..."


def report_skips(data: Any) -> SkipReport:
    """Return the counts of `data` (a DataInfo) over all ranks. This is a collective call.

    Raises:
        TooManyBadSamples: on all ranks, if the bad fraction is above --max-bad-fraction.
    """
    skipped: SkipCounter | None = getattr(data, "skipped", None)
    if skipped is None:
        return SkipReport()
    mine = (skipped.counts(), skipped.read(), skipped.worst(_GATHERED_SHARDS))
    counts: Counter[str] = Counter()
    worst: Counter[str] = Counter()
    good = shards = 0
    for their_counts, (their_good, their_shards), their_worst in ranks.all_gather_object(mine):
        counts.update(their_counts)
        worst.update(their_worst)
        good, shards = good + their_good, shards + their_shards
    bad = sum(counts[cause] for cause in SAMPLE_CAUSES)
    found = SkipReport(
        counts={cause: counts[cause] for cause in CAUSES if counts[cause]},
        samples=good + bad,
        shards=shards,
        worst=dict(worst.most_common(_REPORTED_SHARDS)),
    )
    if found.fraction > skipped.max_bad_fraction:
        raise TooManyBadSamples(
            f"{found.fraction:.1%} of the data cannot be used, more than --max-bad-fraction "
            f"{skipped.max_bad_fraction:g} allows. {shorten(found, 300)}. The log has the first names of each cause. "
            "Fix the data, or set a higher --max-bad-fraction (1: never stop)."
        )
    return found


class NoUsableSamples(ValueError):
    """All samples are bad.

    DataLoader makes a worker's exception again from the text of its traceback, of which only the message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{NoUsableSamples.__name__}: ")[2].strip())


class BadStreak:
    """Raises an error after too many bad samples in a row, so that useless data do not look like a hang.

    After a good sample, the limit is high and applies to endless data only, because single bad shards are skipped.

    Args:
        source: name of the data for messages.
        limit: of bad samples before the first good one. None for no limit: if only one rank's data are bad, the other
            ranks would wait for it.
        least_shards: the number of shards that these samples must be from, because a reader may start with a bad shard.
        endless: whether the data repeat, so that an iteration over bad data would never end.
    """

    def __init__(
        self, source: str, limit: int | None = BAD_IN_A_ROW, least_shards: int = 0, endless: bool = False
    ) -> None:
        self.source = source
        self.limit = limit
        self.least_shards = least_shards
        self.endless = endless
        self.any_good = False
        self.bad = 0
        self.first: BadSample | None = None  # of the current streak
        self.shards: set[int | None] = set()  # of the bad samples, up to `least_shards`

    def add_good(self) -> None:
        self.any_good = True
        self.bad = 0
        self.first = None

    def add_bad(self, bad: BadSample, shard: int | None = None) -> None:
        """Count a bad sample. Raises NoUsableSamples when the limit is reached."""
        if self.any_good and not self.endless:
            return
        if len(self.shards) < self.least_shards:
            self.shards.add(shard)
        self.bad += _SHARD_WEIGHT if self.any_good and bad.cause in SHARD_CAUSES else 1
        # an unsorted shard explains why its samples have no captions
        self.first = bad if self.first is None or bad.cause == "unsorted_shard" else self.first
        limit = _LATER_IN_A_ROW if self.any_good else self.limit
        if limit is not None and self.bad >= limit and (self.any_good or len(self.shards) >= self.least_shards):
            raise self.error() from self.first

    def error(self) -> NoUsableSamples:
        source = shorten(self.source, 80)
        if self.first is None:
            return NoUsableSamples(f"{source}: there are no samples.")
        first = f"The first: {shorten(self.first.name)}: {self.first.reason} ({self.first.cause})."
        if self.any_good:
            return NoUsableSamples(
                f"{source}: after the good samples, thousands in a row are bad. Is the storage available? {first}"
            )
        return NoUsableSamples(f"{source}: not one usable sample, and {self.bad} bad ones. {first}")
