"""Samples that cannot be used: why, how many of each kind, in which shards, and when to stop."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import get_worker_info

from training import distributed
from training.data.messages import MESSAGE_LIMIT, shorten

logger = logging.getLogger(__name__)

# What is counted. The order is the layout of the shared table.
SAMPLE_CAUSES = (
    "missing_image",  # the file is not there
    "empty_image",  # it has 0 bytes
    "corrupt_image",  # cannot be decoded: truncated, not an image
    "huge_image",  # more pixels than PIL's limit (a decompression bomb), or more bytes than ours
    "no_image",  # the row or sample names or has none
    "no_caption",  # none, or an empty one
    "corrupt_caption",  # not UTF-8
    "huge_caption",  # more bytes than the limit
    "torn_sample",  # its shard is damaged between its members: they may not belong together
    "lost_sample",  # by sizes.json it should be in its shard, and is not
)
SHARD_CAUSES = (
    "missing_shard",  # cannot be opened
    "corrupt_shard",  # breaks off or is no tar: what is whole in it is used
    "empty_shard",  # has no samples
    "unsorted_shard",  # members of one sample are apart in it, so that neither part is usable
)
CAUSES = SAMPLE_CAUSES + SHARD_CAUSES

BAD_IN_A_ROW = 100  # a run whose first samples are all bad stops after so many
BAD_SHARDS = 5  # ... from so many shards, where there are as many
# ... and a run that had good ones after so many, where a shard that cannot be used counts as _SHARD_WEIGHT samples: one
# bad shard must not end a run of days, but where the storage has gone, no batch would ever come.
_LATER_IN_A_ROW = 100_000
_SHARD_WEIGHT = 1000
_LOGGED_PER_CAUSE = 3
_REPORTED_SHARDS = 5  # the worst ones
_GATHERED_SHARDS = 50  # of each rank
# Characters of a bad sample's name and reason: data may contain anything, and log lines stay short.
_NAME_LIMIT = 200
_REASON_LIMIT = 180
# Below so many samples (or shards) a fraction says little.
_LEAST_SAMPLES = 200
_LEAST_SHARDS = 20


class BadSample(Exception):
    """A sample (or a shard) that is skipped and counted.

    cause: one of CAUSES; name: the file, row or shard; reason: one sentence for the log. Long ones are shortened.
    """

    def __init__(self, cause: str, name: str, reason: str) -> None:
        self.cause = cause
        self.name = shorten(name, _NAME_LIMIT)
        self.reason = shorten(reason, _REASON_LIMIT)
        super().__init__(f"{cause}: {self.name}: {self.reason}")

    def __reduce__(self) -> tuple:
        return BadSample, (self.cause, self.name, self.reason)


class SkipCounter:
    """How often each cause occurred in this process and its data loader's workers, and in which of the `shards`.

    Tables in shared memory with a row for this process and each worker, so that everybody writes to a row of his own:
    no lock that a killed worker could keep, and it is inherited by fork and handed over by spawn alike.

    Counts are of what was read, which is what the loop received and what lies prefetched. They begin at 0 in every
    process; a resumed run counts anew what it reads again.
    """

    def __init__(self, workers: int = 0, shards: Sequence[str] = (), max_bad_fraction: float = 1.0) -> None:
        self.shards = shards
        self.max_bad_fraction = max_bad_fraction
        rows = workers + 1
        self._table = torch.zeros(rows, len(CAUSES), dtype=torch.int64).share_memory_()
        self._read = torch.zeros(rows, 2, dtype=torch.int64).share_memory_()  # good samples, shards
        self._by_shard = torch.zeros(rows, len(shards), dtype=torch.int32).share_memory_()

    def add(self, bad: BadSample, shard: int | None = None, times: int = 1) -> None:
        """Counts it, in its shard too; the first few of each cause are logged with their name."""
        column, row = CAUSES.index(bad.cause), self._row()
        seen = int(self._table[:, column].sum())
        self._table[row, column] += times
        if shard is not None:
            self._by_shard[row, shard] += times
        if seen < _LOGGED_PER_CAUSE:
            last = " (further ones are only counted)" if seen + times >= _LOGGED_PER_CAUSE else ""
            logger.warning("Skipped, %s: %s: %s%s", bad.cause, bad.name, bad.reason, last)

    def good(self) -> None:
        """Counts a sample that can be used."""
        self._read[self._row(), 0] += 1

    def opened(self) -> None:
        """Counts a shard that is about to be read, whatever comes of it."""
        self._read[self._row(), 1] += 1

    def _row(self) -> int:
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id % max(1, len(self._table) - 1)
        return min(row, len(self._table) - 1)

    def counts(self) -> dict[str, int]:
        """Count by cause; causes that did not occur are left out."""
        return {cause: n for cause, n in zip(CAUSES, self._table.sum(0).tolist(), strict=True) if n}

    def total(self) -> int:
        return int(self._table.sum())

    def read(self) -> tuple[int, int]:
        """(samples that can be used, shards)."""
        good, shards = self._read.sum(0).tolist()
        return good, shards

    def worst(self, count: int) -> dict[str, int]:
        """The shards with the most bad samples (one that cannot be read at all counts as one), and how many."""
        by_shard = self._by_shard.sum(0)
        top = torch.topk(by_shard, min(count, len(by_shard)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return {self.shards[shard]: n for shard, n in pairs if n}


class TooManyBadSamples(ValueError):
    """More of the data is bad than --max-bad-fraction allows."""


@dataclass(frozen=True)
class SkipReport:
    """What was skipped on all ranks. samples: good and bad ones; fraction: how much of the data is bad."""

    counts: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    shards: int = 0
    worst: dict[str, int] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        return sum(self.counts.get(cause, 0) for cause in SAMPLE_CAUSES)

    @property
    def fraction(self) -> float:
        """The larger of bad samples among the samples, and shards without any among the shards.

        0 where too few were read to tell. What a missing shard would have had is known only from a sizes.json.
        """
        unread = self.counts.get("missing_shard", 0) + self.counts.get("empty_shard", 0)
        by_sample = self.bad / self.samples if self.samples >= _LEAST_SAMPLES else 0.0
        by_shard = unread / self.shards if self.shards >= _LEAST_SHARDS else 0.0
        return max(by_sample, min(by_shard, 1.0))

    def __str__(self) -> str:
        """For a line of log; empty where nothing was skipped."""
        if not self.counts:
            return ""
        causes = ", ".join(f"{cause} {n}" for cause, n in self.counts.items())
        worst = ", ".join(f"{shorten(name, 50)} ({n})" for name, n in self.worst.items())
        skipped = f"Skipped: {causes} of {self.samples} samples" + (f"; most in {worst}" if worst else "")
        return skipped if len(skipped) <= MESSAGE_LIMIT else skipped[: MESSAGE_LIMIT - 4] + " ..."


def report(data: Any) -> SkipReport:
    """What was skipped of `data` (a DataInfo) on all ranks so far. Collective: every rank calls it at the same time.

    Raises:
        TooManyBadSamples: on all ranks alike, where the bad fraction is above --max-bad-fraction.
    """
    skipped: SkipCounter | None = data.skipped
    if skipped is None:
        return SkipReport()
    mine = (skipped.counts(), skipped.read(), skipped.worst(_GATHERED_SHARDS))
    counts: Counter[str] = Counter()
    worst: Counter[str] = Counter()
    good = shards = 0
    for their_counts, (their_good, their_shards), their_worst in distributed.all_gather_object(None, mine):
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
            "Fix the data, or give a higher --max-bad-fraction (1: never stop)."
        )
    return found


class NoUsableSamples(ValueError):
    """Nothing but bad samples came.

    DataLoader builds a worker's exception anew from the text of its traceback: only the sentence is kept of that.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{NoUsableSamples.__name__}: ")[2].strip())


class Streak:
    """Raises where nothing but bad samples comes, so that useless data is an error and not a hang.

    From the start, after `limit` of them from `least_shards` shards: with hundreds of readers, one of them may well
    begin with a bad shard. (None: never. The bad samples may be one rank's, whom the others wait for in the end.) After
    a good one, only with `endless` (the data go round), and late: single bad shards are the counters' business.
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
        self.first: BadSample | None = None  # of those in a row
        self.shards: set[int | None] = set()  # that they are from, as far as that matters

    def good(self) -> None:
        self.any_good = True
        self.bad = 0
        self.first = None

    def add(self, bad: BadSample, shard: int | None = None) -> None:
        """Raises NoUsableSamples when the limit is reached without a good sample."""
        if self.any_good and not self.endless:
            return
        if len(self.shards) < self.least_shards:
            self.shards.add(shard)
        self.bad += _SHARD_WEIGHT if self.any_good and bad.cause in SHARD_CAUSES else 1
        # (that a shard is unsorted explains why its samples have no captions)
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
                f"{source}: only bad samples follow the good ones, thousands in a row. Is the storage there? {first}"
            )
        return NoUsableSamples(f"{source}: not one usable sample, and {self.bad} that are not. {first}")
