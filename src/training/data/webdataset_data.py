"""Image-caption pairs from webdataset shards.

Readers are the workers of all ranks. In one pass each shard goes to one reader (reader i of N: shards i, i + N, ... of
the epoch's order); where there are fewer shards than readers, every reader goes through all of them and takes each
N-th sample. A reader's sequence of samples is a function of (seed, epoch, reader, N): see `training.data.reading`.
Every batch carries the place behind it: see `training.data.position`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from training import distributed
from training.data.images import load_image
from training.data.loader import CURSOR, Collate, DataInfo, Loader, check_one_batch, tokenizes_randomly
from training.data.messages import quote, shorten
from training.data.namespace import SHARDS, takes_namespace
from training.data.position import Handover, Layout, ShardPlace, ShardPosition, fresh_place
from training.data.reading import Collection, Cursor, Pass, Reader
from training.data.remote import check_schemes, is_local
from training.data.sampling import SharedEpoch, sample_rng
from training.data.shard_lists import expand_urls, get_dataset_size, shard_sizes
from training.data.shards import CAPTION_KEY, IMAGE_KEYS, Sample
from training.data.skips import BadSample, SkipCounter


class ShardBatch(NamedTuple):
    """Samples, and the place behind them: (worker, *Cursor)."""

    samples: list[Sample]
    cursor: tuple[int, ...]


class ShardBatches(IterableDataset):
    """Batches of this rank's readers. In training as many as the layout says, going round if need be.

    Every sample has random numbers of its own, from (seed, epoch, shard, key, visit). Bad samples and shards are
    counted and left out.
    """

    def __init__(
        self,
        collection: Collection,
        layout: Layout,
        *,
        transform: Callable[[Any], Any] | None,
        tokenizer: Callable[[list[str]], Any] | None,
        shared_epoch: SharedEpoch,
        handover: Handover,
        source: str,
        skipped: SkipCounter,
    ) -> None:
        super().__init__()
        self.collection = collection
        self.layout = layout
        self.transform = transform
        self.tokenizer = tokenizer
        self.shared_epoch = shared_epoch
        self.handover = handover
        self.source = source
        self.skipped = skipped

    def __iter__(self) -> Iterator[ShardBatch]:
        info = get_worker_info()
        epoch = self.shared_epoch.get_value()
        place = self.handover.due() or fresh_place(epoch, self.layout)
        # batches come from the workers in turn, and the first worker's is the first
        worker = (place.next_worker + (0 if info is None else info.id)) % self.layout.workers
        samples = self._encoded(place, worker)
        batches = self._batches(self._decoded(samples, epoch), worker)
        return itertools.islice(batches, place.left(worker) if self.collection.endless else None)

    def _encoded(self, place: ShardPlace, worker: int) -> Iterator[tuple[Sample, Cursor]]:
        reader, readers = self.layout.reader(worker), self.layout.readers
        order_key: tuple[object, ...] = (self.collection.seed, place.epoch)
        if self.collection.resampled:  # two readers may draw one shard
            order_key += (reader, readers, place.salt)
        passes: Callable[[int], Pass | None] = functools.partial(self._regular_pass, place, reader, readers)
        give_up_after = readers if self.collection.endless else None
        if place.passes is not None:
            passes, give_up_after = dict(enumerate(place.passes[worker])).get, None
        reading = Reader(self.collection, passes, order_key, self.source, self.skipped)
        return reading.samples(place.cursors[worker], give_up_after)

    def _regular_pass(self, place: ShardPlace, reader: int, readers: int, turn: int) -> Pass | None:
        return self.collection.regular_pass(place.epoch, turn, reader, readers, place.salt)

    def _batches(self, samples: Iterator[tuple[Sample, Cursor]], worker: int) -> Iterator[ShardBatch]:
        """Of whole batches in training: ranks compare them."""
        while batch := list(itertools.islice(samples, self.layout.batch_size)):
            if len(batch) == self.layout.batch_size or not self.collection.endless:
                yield ShardBatch([sample for sample, _ in batch], (worker, *batch[-1][1]))

    def _decoded(self, encoded: Iterator[tuple[Sample, Cursor]], epoch: int) -> Iterator[tuple[Sample, Cursor]]:
        streak = self.collection.streak(self.source)
        for sample, cursor in encoded:
            name = f"{sample['__url__']}/{sample['__key__']}"
            try:
                with sample_rng(self.collection.seed, epoch, name, sample["__visit__"]):
                    decoded = self._decode(sample, name)
            except BadSample as bad:
                self.skipped.add(bad, sample["__shard__"])
                streak.add(bad, sample["__shard__"])
                continue
            streak.good()
            self.skipped.good()
            yield decoded, cursor

    def _decode(self, sample: Sample, name: str) -> Sample:
        try:
            caption = sample[CAPTION_KEY].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample("corrupt_caption", name, f"the caption is not UTF-8 ({error.reason})") from error
        key = next(key for key in IMAGE_KEYS if key in sample)
        image = load_image(sample[key], self.transform, f"{name}.{key}")
        text = caption if self.tokenizer is None else self.tokenizer([caption])[0]
        decoded = {"image": image, "text": text, "key": name}
        if not self.collection.endless:  # in evaluation equal images are one image with several captions
            decoded["image_id"] = int.from_bytes(hashlib.blake2b(sample[key], digest_size=8).digest(), "big") >> 1
        return decoded


class _ShardCollate(Collate):
    """`Collate` of a ShardBatch; the batch keeps its cursor until `Loader` takes it."""

    def __call__(self, batch: Any) -> dict[str, Any] | None:
        collated = super().__call__(batch.samples)
        return None if collated is None else {**collated, CURSOR: batch.cursor}


@takes_namespace(SHARDS)
def get_wds_dataset(
    args: Any,
    preprocess_img: Callable[[Any], Any],
    is_train: bool,
    epoch: int = 0,
    floor: bool = False,
    tokenizer: Any = None,
) -> DataInfo:
    """The loader of `args.train_data` or `args.val_data`, webdataset shards. args: params.DataConfig, or a namespace.

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
    _check_present(urls, str(source))
    here = distributed.world()
    num_batches, num_samples = _epoch_size(args, urls, source, is_train, resampled, floor)
    seed = getattr(args, "seed", 0)
    collection = Collection(urls, seed, is_train, resampled, weights, shard_sizes(urls), alone=not here.distributed)
    layout = Layout(here.rank, here.world_size, max(1, args.workers), args.batch_size, num_batches)
    source = shorten(source)  # for messages
    skipped = SkipCounter(args.workers, urls, getattr(args, "max_bad_fraction", 1.0))
    shared_epoch, handover = SharedEpoch(epoch), Handover()
    dataset = ShardBatches(
        collection,
        layout,
        transform=preprocess_img,
        tokenizer=tokenizer if tokenizes_randomly(tokenizer) else None,
        shared_epoch=shared_epoch,
        handover=handover,
        source=source,
        skipped=skipped,
    )
    loader = Loader(
        dataset,
        source=source,
        workers=args.workers,
        seed=seed,
        num_samples=num_samples,
        num_batches=num_batches,
        skipped=skipped,
        collate=_ShardCollate(tokenizer),
        position=ShardPosition(collection, layout, shared_epoch, handover, source) if is_train else None,
    )
    return DataInfo(loader, shared_epoch=shared_epoch, skipped=skipped)


def _epoch_size(
    args: Any, urls: list[str], source: str, is_train: bool, resampled: bool, floor: bool
) -> tuple[int, int]:
    """(batches a rank, samples over all ranks); in evaluation what is known, else 0."""
    workers, global_batch = max(1, args.workers), args.batch_size * distributed.world().world_size
    num_samples = args.train_num_samples if is_train else args.val_num_samples
    if num_samples is None:
        num_samples = get_dataset_size(urls)[0]
    if not is_train:
        return math.ceil((num_samples or 0) / global_batch), num_samples or 0
    if num_samples is None:
        raise ValueError(
            f"The number of samples in {shorten(source)} is unknown: give --train-num-samples, or put a sizes.json "
            '({"00000.tar": 1000, ...}), img2dataset\'s _stats.json of every shard, or a file __len__ with the total '
            "number next to the shards."
        )
    if not resampled:
        check_one_batch(num_samples, args.batch_size, distributed.world().world_size, shorten(source))
    whole = math.floor if floor else math.ceil
    batches = whole(num_samples / global_batch)
    per_worker = whole(batches / workers)
    if per_worker == 0:
        raise ValueError(f"{shorten(source)}: {batches} batches an epoch for {workers} workers: lower --workers.")
    return per_worker * workers, per_worker * workers * global_batch


def _check_present(urls: list[str], source: str) -> None:
    if not urls:
        raise ValueError(f"{quote(source)} names no shards.")
    check_schemes(urls, source)
    if all(is_local(url) for url in urls) and not any(os.path.exists(url) for url in urls):
        first = shorten(os.path.abspath(urls[0]))
        raise FileNotFoundError(
            f"None of the {len(urls)} shards of {shorten(source)} exists; the first should be {first}."
        )
