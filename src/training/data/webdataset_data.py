"""Image-caption pairs from webdataset shards.

Readers are the workers of all ranks. In one pass each shard goes to one reader (reader i of N: shards i, i + N, ... of
the epoch's order); where there are fewer shards than readers, every reader goes through all of them and takes each
N-th sample. A reader's sequence of samples is a function of (seed, epoch, reader, N): its position is one number.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from training import distributed
from training.data.images import load_image
from training.data.loader import Collate, DataInfo, Loader, check_one_batch, tokenizes_randomly
from training.data.sampling import SharedEpoch, sample_rng, stable_hash
from training.data.shards import (
    CAPTION_KEY,
    IMAGE_KEYS,
    Sample,
    expand_urls,
    get_dataset_size,
    is_local,
    read_shard,
)
from training.data.skips import BadSample, SkipCounter, Streak
from training.data.stages import ResampledShards2, detshuffle2

logger = logging.getLogger(__name__)

# Samples (still encoded) that a reader holds to draw from, and how many it waits for before the first.
_SAMPLE_SHUFFLE_SIZE = 5000
_SAMPLE_SHUFFLE_INITIAL = 1000


class ShardBatches(IterableDataset):
    """Batches (lists of samples) of this rank's readers. In training `num_batches` a worker, going round if need be.

    Every sample has random numbers of its own, from (seed, epoch, shard, key, earlier visits to the shard).
    Bad samples and shards are counted and left out.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        transform: Callable[[Any], Any] | None,
        tokenizer: Callable[[list[str]], Any] | None,
        batch_size: int,
        seed: int,
        shared_epoch: SharedEpoch,
        rank: int,
        world_size: int,
        source: str,
        skipped: SkipCounter,
        num_batches: int | None,
        resampled: bool = False,
        weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.urls = urls
        self.transform = transform
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.shared_epoch = shared_epoch
        self.rank = rank
        self.world_size = world_size
        self.source = source
        self.skipped = skipped
        self.num_batches = num_batches
        self.resampled = resampled
        self.weights = weights

    def __iter__(self) -> Iterator[list[Sample]]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        reader, readers = self.rank + self.world_size * worker_id, self.world_size * workers
        epoch = self.shared_epoch.get_value()
        samples = self._decoded(self._encoded(epoch, reader, readers), epoch)
        return itertools.islice(self._batches(samples), self.num_batches)

    def _batches(self, samples: Iterator[Sample]) -> Iterator[list[Sample]]:
        while batch := list(itertools.islice(samples, self.batch_size)):
            yield batch

    def _encoded(self, epoch: int, reader: int, readers: int) -> Iterator[Sample]:
        """This reader's samples with image and caption, still encoded: one pass, or passes without end in training."""
        streak = Streak(self.source)
        visits: Counter[str] = Counter()
        for turn in itertools.count():
            # In the next pass another reader's share: after N passes a reader has met everything that there is.
            share = (reader + turn) % readers
            shards = self._shards(epoch, turn // readers, share, readers)
            samples = self._one_pass(shards, share, readers, streak, visits)
            if self.num_batches is None:
                yield from samples
                return
            # pass by pass, or a small collection would meet itself in the buffer: samples twice, others not at all
            seed = stable_hash("samples", self.seed, reader, readers, turn)
            yield from detshuffle2(_SAMPLE_SHUFFLE_SIZE, _SAMPLE_SHUFFLE_INITIAL, seed, self.shared_epoch).run(samples)
            if turn + 1 >= readers and not streak.any_good:
                raise streak.error()

    def _one_pass(
        self, shards: Iterable[str], share: int, readers: int, streak: Streak, visits: Counter[str]
    ) -> Iterator[Sample]:
        """The usable samples of `shards`: all, or where the readers go through the same shards, this share's."""
        split_samples = self._splits_samples(readers)
        position = 0  # among all samples of the pass
        for number, url in enumerate(shards):
            try:
                for sample in read_shard(url):
                    position += 1
                    if split_samples and (position - 1) % readers != share:
                        continue
                    if (unusable := _unusable(sample)) is not None:
                        self.skipped.add(unusable)
                        streak.add(unusable)
                        continue
                    streak.good()
                    sample["__visit__"] = visits[url]
                    yield sample
            except BadSample as bad:
                if not split_samples or number % readers == share:
                    self.skipped.add(bad)
                streak.add(bad)
            visits[url] += 1

    def _splits_samples(self, readers: int) -> bool:
        return not self.resampled and len(self.urls) < readers

    def _shards(self, epoch: int, round_: int, share: int, readers: int) -> Iterable[str]:
        """The shards of one share of a pass."""
        if self.resampled:
            return (draw["url"] for draw in self._draws(share, readers))
        order = list(self.urls)
        if self.num_batches is not None:
            random.Random(stable_hash("shards", self.seed, epoch, round_)).shuffle(order)
        return order if self._splits_samples(readers) else order[share::readers]

    def _draws(self, reader: int, readers: int) -> ResampledShards2:
        """Shards without end, for this reader in this epoch."""
        seed = stable_hash("draws", self.seed, reader, readers)
        return ResampledShards2(
            self.urls, self.weights, worker_seed=lambda _: seed, deterministic=True, epoch=self.shared_epoch
        )

    def _decoded(self, encoded: Iterator[Sample], epoch: int) -> Iterator[Sample]:
        streak = Streak(self.source)
        for sample in encoded:
            name = f"{sample['__url__']}/{sample['__key__']}"
            try:
                with sample_rng(self.seed, epoch, name, sample["__visit__"]):
                    decoded = self._decode(sample, name)
            except BadSample as bad:
                self.skipped.add(bad)
                streak.add(bad)
                continue
            streak.good()
            yield decoded

    def _decode(self, sample: Sample, name: str) -> Sample:
        try:
            caption = sample[CAPTION_KEY].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample("corrupt_caption", name, f"the caption is not UTF-8 ({error.reason})") from error
        key = next(key for key in IMAGE_KEYS if key in sample)
        image = load_image(sample[key], self.transform, f"{name}.{key}")
        return {"image": image, "text": caption if self.tokenizer is None else self.tokenizer([caption])[0]}


def _unusable(sample: Sample) -> BadSample | None:
    name = f"{sample['__url__']}/{sample['__key__']}"
    has = ", ".join(key for key in sample if not key.startswith("__")) or "nothing"
    if not sample.get(CAPTION_KEY, b"").strip():
        return BadSample("no_caption", name, f"no caption, or an empty one ({CAPTION_KEY}); the sample has: {has}")
    if not any(key in sample for key in IMAGE_KEYS):
        return BadSample("no_image", name, f"no image ({', '.join(IMAGE_KEYS)}); the sample has: {has}")
    return None


def get_wds_dataset(
    args: Any,
    preprocess_img: Callable[[Any], Any],
    is_train: bool,
    epoch: int = 0,
    floor: bool = False,
    tokenizer: Any = None,
) -> DataInfo:
    """The loader of `args.train_data` or `args.val_data`, webdataset shards. args: params.DataConfig.

    In training an epoch has the samples of --train-num-samples (or of sizes.json, `__len__`), rounded up (`floor`:
    down) to the same number of whole batches for every worker of every rank. In evaluation, every sample once.

    Raises:
        FileNotFoundError: of local shards, not one is there.
        ValueError: no shards, an unknown number of samples in training, or fewer than a batch.
    """
    source = args.train_data if is_train else args.val_data
    if not source:
        raise ValueError(f"No shards: {'--train-data' if is_train else '--val-data'} is not given.")
    factors = getattr(args, "train_data_upsampling_factors", None) if is_train else None
    resampled = is_train and getattr(args, "dataset_resampled", False)
    if factors is not None and not resampled:
        raise ValueError("--train-data-upsampling-factors needs --dataset-resampled.")
    urls, weights = expand_urls(source, factors)
    _check_present(urls, source)
    world = distributed.world()
    per_worker, num_batches, num_samples = _epoch_size(args, urls, source, is_train, resampled, floor)
    seed = getattr(args, "seed", 0)
    skipped = SkipCounter(args.workers)
    shared_epoch = SharedEpoch(epoch)
    dataset = ShardBatches(
        urls,
        transform=preprocess_img,
        tokenizer=tokenizer if tokenizes_randomly(tokenizer) else None,
        batch_size=args.batch_size,
        seed=seed,
        shared_epoch=shared_epoch,
        rank=world.rank,
        world_size=world.world_size,
        source=source,
        skipped=skipped,
        num_batches=per_worker,
        resampled=resampled,
        weights=weights,
    )
    loader = Loader(
        dataset,
        source=source,
        workers=args.workers,
        seed=seed,
        num_samples=num_samples,
        num_batches=num_batches,
        skipped=skipped,
        collate=Collate(tokenizer),
    )
    return DataInfo(loader, shared_epoch=shared_epoch, skipped=skipped)


def _epoch_size(
    args: Any, urls: list[str], source: str, is_train: bool, resampled: bool, floor: bool
) -> tuple[int | None, int, int]:
    """(batches a worker, batches a rank, samples over all ranks); in evaluation None and what is known, else 0."""
    workers, global_batch = max(1, args.workers), args.batch_size * distributed.world().world_size
    num_samples = args.train_num_samples if is_train else args.val_num_samples
    if num_samples is None:
        num_samples = get_dataset_size(urls)[0]
    if not is_train:
        return None, math.ceil((num_samples or 0) / global_batch), num_samples or 0
    if num_samples is None:
        raise ValueError(
            f"The number of samples in {source} is unknown: give --train-num-samples, or put a sizes.json "
            '({"00000.tar": 1000, ...}) or a file __len__ with their total beside the shards.'
        )
    if not resampled:
        check_one_batch(num_samples, args.batch_size, distributed.world().world_size, source)
    whole = math.floor if floor else math.ceil
    batches = whole(num_samples / global_batch)
    per_worker = whole(batches / workers)
    if per_worker == 0:
        raise ValueError(f"{source}: {batches} batches an epoch for {workers} workers: lower --workers.")
    return per_worker, per_worker * workers, per_worker * workers * global_batch


def _check_present(urls: list[str], source: str) -> None:
    if not urls:
        raise ValueError(f"{source!r} names no shards.")
    if all(is_local(url) for url in urls) and not any(os.path.exists(url) for url in urls):
        first = os.path.abspath(urls[0])
        raise FileNotFoundError(f"None of the {len(urls)} shards of {source} is there; the first should be {first}.")
