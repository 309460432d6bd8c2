"""Classes and functions of open_clip_train.data for scripts: pipeline stages, and data sets of pairs.

The stages also work in a `webdataset.DataPipeline`. Nothing in this project imports this module; `training.data` gives
its names to scripts.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from training import ranks
from training.batches import num_samples
from training.data.messages import shorten
from training.data.rows import csv_file, synthetic
from training.data.sampling import SharedEpoch, stable_hash
from training.data.shards.lists import expand_urls
from training.data.shards.samples import Sample, TooLarge, read_shard, too_large
from training.data.skips import BadSample

logger = logging.getLogger(__name__)


def pytorch_worker_seed(increment: int = 0) -> int:
    """Return a seed that differs between workers and ranks."""
    worker = get_worker_info()
    rank = ranks.world().rank
    if worker is not None:
        return worker.seed + increment * max(1, worker.num_workers) + rank * worker.num_workers
    return rank + increment


def log_and_continue(exn: Exception) -> bool:
    """Log the exception and return True, which tells webdataset to continue."""
    logger.warning("Handling webdataset error (%s). Ignoring.", shorten(repr(exn), 400))
    return True


def tarfile_to_samples_nothrow(
    src: Iterable[Sample], handler: Callable[[Exception], bool] = log_and_continue
) -> Iterator[Sample]:
    """Yield the samples of shards {"url": ...}. If `handler(exception)` returns False, the iteration ends."""
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


def _epoch_value(epoch: int | SharedEpoch) -> int:
    return epoch.get_value() if isinstance(epoch, SharedEpoch) else epoch


class detshuffle2:
    """Pipeline stage that shuffles a stream with a buffer. The order depends on the seed and the epoch.

    Args:
        bufsize: maximum number of items in the buffer.
        initial: number of items in the buffer before the first one is yielded.
        seed: a negative seed stands for `pytorch_worker_seed()`.
        epoch: a SharedEpoch, or an int that grows by 1 with each run; so -1 makes the first epoch 0.
    """

    def __init__(self, bufsize: int = 1000, initial: int = 100, seed: int = 0, epoch: int | SharedEpoch = -1) -> None:
        self.bufsize = bufsize
        self.initial = min(initial, bufsize)
        self.seed = seed
        self.epoch = epoch

    def run(self, src: Iterable[Any]) -> Iterator[Any]:
        if isinstance(self.epoch, int):
            self.epoch += 1
        epoch = _epoch_value(self.epoch)
        rng = random.Random(stable_hash("shuffle", pytorch_worker_seed() if self.seed < 0 else self.seed, epoch))
        return self._shuffled(iter(src), rng)

    __call__ = run

    def _shuffled(self, src: Iterator[Any], rng: random.Random) -> Iterator[Any]:
        buffer: list[Any] = []
        for item in src:
            buffer.append(item)
            if len(buffer) < self.initial:
                continue
            if len(buffer) < self.bufsize:
                buffer.extend(itertools.islice(src, 1))  # add two for each one that is taken, until the buffer is full
            yield self._take(buffer, rng)
        while buffer:
            yield self._take(buffer, rng)

    @staticmethod
    def _take(buffer: list[Any], rng: random.Random) -> Any:
        chosen = rng.randrange(len(buffer))
        buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
        return buffer.pop()


class ResampledShards2(IterableDataset):
    """Draws shards with replacement: yields {"url": shard}.

    Args:
        urls: as for `expand_urls`, or a list.
        weights: proportional to the probabilities; a list if `urls` is a list.
        nshards: number of draws.
        worker_seed: function of the epoch; `pytorch_worker_seed` by default.
        deterministic: whether the draws depend on `worker_seed(epoch)` and the epoch only. Otherwise they are random.
        epoch: a SharedEpoch, or an int that grows by 1 with each iteration.
    """

    def __init__(
        self,
        urls: str | list[str],
        weights: str | list[float] | None = None,
        nshards: int = 2**63 - 1,
        worker_seed: Callable[[int], int] | None = None,
        deterministic: bool = False,
        epoch: int | SharedEpoch = -1,
    ) -> None:
        super().__init__()
        self.weights: list[float] | None
        if isinstance(urls, str) and (weights is None or isinstance(weights, str)):
            self.urls, self.weights = expand_urls(urls, weights)
        else:
            self.urls, self.weights = list(urls), None if weights is None else [float(weight) for weight in weights]
        if self.weights is not None and len(self.weights) != len(self.urls):
            raise ValueError(f"{len(self.weights)} weights for {len(self.urls)} shards. Give one per shard.")
        self.nshards = nshards
        self.worker_seed = pytorch_worker_seed if worker_seed is None else worker_seed
        self.deterministic = deterministic
        self.epoch = epoch

    def __iter__(self) -> Iterator[Sample]:
        if isinstance(self.epoch, int):
            self.epoch += 1
        epoch = _epoch_value(self.epoch)
        seed = stable_hash("resampled", self.worker_seed(epoch), epoch) if self.deterministic else None
        rng = random.Random(seed)
        cumulative = None if self.weights is None else list(itertools.accumulate(self.weights))
        for _ in range(self.nshards):
            yield {"url": rng.choices(self.urls, cum_weights=cumulative)[0]}


def count_samples(dataloader: Iterable[Any]) -> tuple[int, int]:
    """Count the samples and batches of a loader whose batches are dicts, or sequences with the images first."""
    samples = batches = 0
    for batch in dataloader:
        batches += 1
        samples += num_samples(batch) if isinstance(batch, Mapping) else len(batch[0])
    return samples, batches


class CsvDataset(csv_file.CsvDataset):
    """The rows of a CSV file as pairs `(transforms(PIL image), tokenizer([caption])[0])`."""

    def __init__(
        self,
        input_filename: str,
        transforms: Callable[[Any], Any] | None,
        img_key: str,
        caption_key: str,
        sep: str = "\t",
        tokenizer: Callable[[list[str]], Any] | None = None,
    ) -> None:
        super().__init__(input_filename, transforms, img_key, caption_key, sep, tokenizer)
        self.tokenize = tokenizer

    def __getitem__(self, index: int) -> tuple[Any, Any]:  # type: ignore[override]
        sample = super().__getitem__(index)
        return sample["image"], sample["text"]


class SyntheticDataset(synthetic.SyntheticDataset):
    """The same pair `(transform(PIL image), tokenizer(caption)[0])` for every index."""

    tokenizer: Any

    def __getitem__(self, index: int) -> tuple[Any, Any]:  # type: ignore[override]
        image = self.image if self.transform is None else self.transform(self.image)
        text = self.caption if self.tokenizer is None else self.tokenizer(self.caption)[0]
        return image, text
