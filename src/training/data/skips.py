"""Samples that cannot be used: why, how many of each kind, and when to stop."""

from __future__ import annotations

import logging

import torch
from torch.utils.data import get_worker_info

logger = logging.getLogger(__name__)

# What is counted. The order is the layout of the shared table.
CAUSES = (
    "missing_image",  # the file is not there
    "corrupt_image",  # cannot be decoded: truncated, not an image, a decompression bomb
    "no_image",  # the row or sample names or has none
    "no_caption",  # none, or an empty one
    "corrupt_caption",  # not UTF-8
    "missing_shard",  # cannot be opened
    "corrupt_shard",  # breaks off or is no tar: what came before is used
    "empty_shard",  # has no samples
)

BAD_IN_A_ROW = 100  # a run whose first samples are all bad stops after so many
_LOGGED_PER_CAUSE = 3


class BadSample(Exception):
    """A sample (or a shard) that is skipped and counted.

    cause: one of CAUSES; name: the file, row or shard; reason: one sentence for the log.
    """

    def __init__(self, cause: str, name: str, reason: str) -> None:
        super().__init__(f"{cause}: {name}: {reason}")
        self.cause = cause
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple:
        return BadSample, (self.cause, self.name, self.reason)


class SkipCounter:
    """How often each cause occurred in this process and its data loader's workers.

    A table in shared memory with a row for this process and each worker, so that everybody writes to a row of his own:
    no lock that a killed worker could keep, and it is inherited by fork and handed over by spawn alike.
    """

    def __init__(self, workers: int = 0) -> None:
        self._table = torch.zeros(workers + 1, len(CAUSES), dtype=torch.int64).share_memory_()

    def add(self, bad: BadSample) -> None:
        """Counts one; the first few of each cause are logged with their name."""
        column = CAUSES.index(bad.cause)
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id % max(1, len(self._table) - 1)
        row = min(row, len(self._table) - 1)
        self._table[row, column] += 1
        seen = int(self._table[:, column].sum())
        if seen <= _LOGGED_PER_CAUSE:
            last = " (further ones are only counted)" if seen == _LOGGED_PER_CAUSE else ""
            logger.warning("Skipped, %s: %s: %s%s", bad.cause, bad.name, bad.reason, last)

    def counts(self) -> dict[str, int]:
        """Count by cause; causes that did not occur are left out."""
        return {cause: n for cause, n in zip(CAUSES, self._table.sum(0).tolist(), strict=True) if n}

    def total(self) -> int:
        return int(self._table.sum())


class NoUsableSamples(ValueError):
    """Nothing but bad samples came.

    DataLoader builds a worker's exception anew from the text of its traceback: only the sentence is kept of that.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{NoUsableSamples.__name__}: ")[2].strip())


class Streak:
    """Raises where nothing but bad samples comes from the start, so that useless data is an error and not a hang.

    Bad samples after a good one are the counters' business: one bad shard must not end a run of days.
    """

    def __init__(self, source: str, limit: int = BAD_IN_A_ROW) -> None:
        self.source = source
        self.limit = limit
        self.any_good = False
        self.bad = 0
        self.first: BadSample | None = None

    def good(self) -> None:
        self.any_good = True

    def add(self, bad: BadSample) -> None:
        """Raises NoUsableSamples when the limit is reached without a good sample."""
        if self.any_good:
            return
        self.bad += 1
        self.first = self.first or bad
        if self.bad >= self.limit:
            raise self.error() from self.first

    def error(self) -> NoUsableSamples:
        if self.first is None:
            return NoUsableSamples(f"{self.source}: there are no samples.")
        return NoUsableSamples(
            f"{self.source}: not one usable sample, and {self.bad} that are not. The first: {self.first.name}: "
            f"{self.first.reason} ({self.first.cause})."
        )
