"""Reads a few evaluation samples before training, so that unusable data are an error at the start of a run."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

from torch.utils.data import IterableDataset

from training.data.loader import AFTER, Loader
from training.data.rows.loader import SkipBadSamples
from training.data.shards.dataset import ShardBatches
from training.data.skips import BAD_IN_A_ROW, BadStreak, NoUsableSamples, SkipCounter

SAMPLES = 4  # size of the batch


def read_first_batch(loader: Loader) -> dict[str, Any] | None:
    """Return a batch of this rank's first usable samples, up to `SAMPLES`, or None if this rank has no samples.

    This process reads them from a copy of the data set. Workers, read positions and counts of bad samples do not
    change.

    Raises:
        NoUsableSamples: all samples are bad, or the first 100.
        ValueError, OSError: see the data set.
    """
    dataset: Any = copy.copy(loader.dataset)
    dataset.skipped = SkipCounter(0, loader.skipped.shards)
    is_stream = isinstance(loader.dataset, IterableDataset)
    samples = _read_first_of_shards(dataset) if is_stream else _read_first_of_rows(dataset, loader)
    if not samples:
        if dataset.skipped.total():
            raise NoUsableSamples(
                f"{loader.source}: not one usable sample. Skipped, by cause: {dataset.skipped.counts()}. The log "
                "names the first ones."
            )
        return None
    batch = loader.collate_fn(samples)
    batch.pop(AFTER, None)
    return batch


def _read_first_of_shards(dataset: ShardBatches) -> Any:
    dataset.layout = dataclasses.replace(dataset.layout, workers=1, batch_size=SAMPLES)
    return next(iter(dataset), None)


def _read_first_of_rows(dataset: SkipBadSamples, loader: Loader) -> list[dict[str, Any]]:
    streak = dataset.streak = BadStreak(loader.source)
    refs = itertools.islice(itertools.chain.from_iterable(loader.batch_sampler or ()), BAD_IN_A_ROW)
    usable = (sample for sample in (dataset[ref] for ref in refs) if sample is not None)
    samples = list(itertools.islice(usable, SAMPLES))
    if not samples and streak.first is not None:
        raise streak.error()
    return samples
