"""Reading a few samples of evaluation data before training, so that data that cannot be used are found at the start."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

from torch.utils.data import IterableDataset

from training.data.loader import CURSOR, Loader, WholeSamples
from training.data.skips import BAD_IN_A_ROW, NoUsableSamples, SkipCounter, Streak
from training.data.webdataset_data import ShardBatches

SAMPLES = 4  # usable ones, which make one small batch


def read_first_batch(loader: Loader) -> dict[str, Any] | None:
    """A batch of this rank's first usable samples, up to `SAMPLES`; None where this rank has no samples.

    They are read in this process, from a copy of the data set: workers, read positions and counts of bad samples stay
    as they are.

    Raises:
        NoUsableSamples: all samples are bad, or the first 100.
        ValueError, OSError: see the data set.
    """
    dataset: Any = copy.copy(loader.dataset)
    dataset.skipped = SkipCounter(0, loader.skipped.shards)
    is_stream = isinstance(loader.dataset, IterableDataset)
    samples = _first_of_shards(dataset) if is_stream else _first_of_rows(dataset, loader)
    if not samples:
        if dataset.skipped.total():
            raise NoUsableSamples(
                f"{loader.source}: not one usable sample. Skipped, by cause: {dataset.skipped.counts()}. The log has "
                "the first names."
            )
        return None
    batch = loader.collate_fn(samples)
    batch.pop(CURSOR, None)
    return batch


def _first_of_shards(dataset: ShardBatches) -> Any:
    dataset.layout = dataclasses.replace(dataset.layout, workers=1, batch_size=SAMPLES)
    return next(iter(dataset), None)


def _first_of_rows(dataset: WholeSamples, loader: Loader) -> list[dict[str, Any]]:
    streak = dataset.streak = Streak(loader.source)
    refs = itertools.islice(itertools.chain.from_iterable(loader.batch_sampler or ()), BAD_IN_A_ROW)
    usable = (sample for sample in (dataset[ref] for ref in refs) if sample is not None)
    samples = list(itertools.islice(usable, SAMPLES))
    if not samples and streak.first is not None:
        raise streak.error()
    return samples
