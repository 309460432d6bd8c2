"""Reading a few samples of evaluation data before training, so that data that cannot be used are found at the start."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

from torch.utils.data import IterableDataset

from training.data.loader import CURSOR, Loader, WholeSamples
from training.data.skips import BAD_IN_A_ROW, SkipCounter
from training.data.webdataset_data import ShardBatches

SAMPLES = 4  # usable ones, which make one small batch


def read_first_batch(loader: Loader) -> dict[str, Any] | None:
    """A batch of this rank's first usable samples, up to `SAMPLES`; None where its first 100 samples are all bad.

    They are read in this process, from a copy of the data set: workers, read positions and counts of bad samples stay
    as they are. A rank without samples gives None.

    Raises:
        ValueError, OSError: see the data set.
    """
    dataset: Any = copy.copy(loader.dataset)
    dataset.skipped = SkipCounter(0, loader.skipped.shards)
    is_stream = isinstance(loader.dataset, IterableDataset)
    samples = _first_of_shards(dataset) if is_stream else _first_of_rows(dataset, loader)
    batch = None if samples is None else loader.collate_fn(samples)
    if batch is not None:
        batch.pop(CURSOR, None)
    return batch


def _first_of_shards(dataset: ShardBatches) -> Any:
    dataset.layout = dataclasses.replace(dataset.layout, workers=1, batch_size=SAMPLES)
    return next(iter(dataset), None)


def _first_of_rows(dataset: WholeSamples, loader: Loader) -> list[dict[str, Any]]:
    dataset.streak = copy.copy(dataset.streak)
    refs = itertools.islice(itertools.chain.from_iterable(loader.batch_sampler or ()), BAD_IN_A_ROW)
    usable = (sample for sample in (dataset[ref] for ref in refs) if sample is not None)
    return list(itertools.islice(usable, SAMPLES))
