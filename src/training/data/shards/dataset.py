"""Image-caption pairs from webdataset shards.

The workers of all ranks are the readers. Reader i of N reads the shards i, i + N, ... of the epoch's order. If there
are fewer shards than readers, every reader reads all of them and takes every N-th sample. The samples of a reader are a
function of (seed, epoch, reader, N): see `reader`. Every batch contains the read position after it: see `position`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from training import ranks
from training.data.bucketing import CaptionLengths, LengthBuckets
from training.data.images import load_image
from training.data.loader import AFTER, Collate, DataInfo, Loader, check_one_batch, tokenizes_randomly
from training.data.messages import quote, shorten
from training.data.naflex import SLOT, PlannedCollate, PlannedTransform, planned
from training.data.naflex_plan import Plan, Slot, VariablePlan
from training.data.sampling import SharedEpoch, sample_rng, stable_hash
from training.data.shards.lists import expand_urls, get_dataset_size, shard_sizes
from training.data.shards.pairs import PairMembers
from training.data.shards.position import (
    ReaderLayout,
    ResumeRequest,
    ShardPosition,
    ShardState,
    VariableShardPosition,
)
from training.data.shards.reader import ReadPosition, ShardPlan, ShardReader, ShardSet
from training.data.shards.remote import check_schemes, is_local
from training.data.shards.samples import Sample
from training.data.skips import BadSample, SkipCounter
from training.params import DataConfig


class ShardBatch(NamedTuple):
    """Samples, and the position after them: (worker, *ReadPosition)."""

    samples: list[Sample]
    after: tuple[int, ...]


class ShardBatches(IterableDataset):
    """The batches of this rank's readers. In training, the layout gives their number, and the data repeat if necessary.

    The random numbers of a sample depend on (seed, epoch, shard, key, read_id) only. Bad samples and shards are counted
    and dropped.
    """

    def __init__(
        self,
        shards: ShardSet,
        layout: ReaderLayout,
        *,
        transform: Callable[[Any], Any] | None,
        tokenizer: Callable[[list[str]], Any] | None,
        shared_epoch: SharedEpoch,
        resume: ResumeRequest,
        source: str,
        skipped: SkipCounter,
        max_image_pixels: int | None = None,
        caption_lengths: CaptionLengths | None = None,
    ) -> None:
        super().__init__()
        self.shards = shards
        self.layout = layout
        self.transform = transform
        self.tokenizer = tokenizer
        self.shared_epoch = shared_epoch
        self.resume = resume
        self.source = source
        self.skipped = skipped
        self.max_image_pixels = max_image_pixels
        self.caption_lengths = caption_lengths or CaptionLengths(tokenizer)

    def __iter__(self) -> Iterator[ShardBatch]:
        info = get_worker_info()
        epoch = self.shared_epoch.get_value()
        state = self.resume.pending_state() or ShardState.at_start(epoch, self.layout)
        # torch takes batches from the workers in turn, starting with worker 0: it must make the next batch
        worker = (state.next_worker + (0 if info is None else info.id)) % self.layout.workers
        samples = self._encoded_samples(state, worker)
        batches = self._batches(self._decoded_samples(samples, epoch), worker)
        return itertools.islice(batches, state.remaining_batches(worker) if self.shards.endless else None)

    def _encoded_samples(self, state: ShardState, worker: int) -> Iterator[tuple[Sample, ReadPosition]]:
        reader, readers = self.layout.reader(worker), self.layout.readers
        order_key: tuple[object, ...] = (self.shards.seed, state.epoch)
        if self.shards.resampled:  # two readers may draw the same shard
            order_key += (reader, readers, state.draw_key)
        get_plan: Callable[[int], ShardPlan | None]
        if state.plans is None:
            get_plan = functools.partial(self._regular_plan, state, reader, readers)
            give_up_after = readers if self.shards.endless else None
        else:
            get_plan, give_up_after = dict(enumerate(state.plans[worker])).get, None
        shard_reader = ShardReader(
            self.shards, get_plan, order_key, self.source, self.skipped, functools.partial(self._lengths, state.epoch)
        )
        return shard_reader.samples(state.positions[worker], give_up_after)

    def _regular_plan(self, state: ShardState, reader: int, readers: int, number: int) -> ShardPlan | None:
        return self.shards.plan(state.epoch, number, reader, readers, state.draw_key)

    def _batches(self, samples: Iterator[tuple[Sample, ReadPosition]], worker: int) -> Iterator[ShardBatch]:
        while batch := list(itertools.islice(samples, self.layout.batch_size)):
            # training needs full batches, because the loss compares those of all ranks
            if len(batch) == self.layout.batch_size or not self.shards.endless:
                yield ShardBatch([sample for sample, _ in batch], (worker, *batch[-1][1]))

    def _decoded_samples(
        self, encoded: Iterator[tuple[Sample, ReadPosition]], epoch: int
    ) -> Iterator[tuple[Sample, ReadPosition]]:
        streak = self.shards.bad_streak(self.source)
        for sample, after in encoded:
            name, random_key = self._identify(sample, epoch)
            try:
                caption = self._caption(sample, name, random_key)
                with sample_rng(*random_key):
                    decoded = self._decode(sample, name, caption)
            except BadSample as bad:
                self.skipped.add_bad(bad, sample["__shard__"])
                streak.add_bad(bad, sample["__shard__"])
                continue
            streak.add_good()
            self.skipped.add_good()
            yield decoded, after

    def _identify(self, sample: Sample, epoch: int) -> tuple[str, tuple[object, ...]]:
        """Return the name of a sample, and the key of its random numbers."""
        name = f"{sample['__url__']}/{sample['__key__']}"
        return name, (self.shards.seed, epoch, name, sample["__read_id__"])

    def _lengths(self, epoch: int, samples: Sequence[Sample]) -> list[int]:
        captions = []
        for sample in samples:
            try:
                captions.append(self._caption(sample, *self._identify(sample, epoch)))
            except BadSample:  # counted and dropped when it is decoded
                captions.append("")
        return self.caption_lengths(captions)

    def _caption(self, sample: Sample, name: str, random_key: tuple[object, ...]) -> str:
        # A generator of its own: the augmentation of the image does not depend on how captions are chosen.
        return self.shards.members.caption(sample, name, random.Random(stable_hash("caption", *random_key)))

    def _decode(self, sample: Sample, name: str, caption: str) -> Sample:
        key = self.shards.members.image_key(sample)
        assert key is not None, "Samples without an image are dropped before."
        image = load_image(sample[key], self.transform, f"{name}.{key}", self.max_image_pixels)
        text = caption if self.tokenizer is None else self.tokenizer([caption])[0]
        decoded = {"image": image, "text": text, "key": name}
        if not self.shards.endless:  # in evaluation, equal images are one image with several captions
            decoded["image_id"] = int.from_bytes(hashlib.blake2b(sample[key], digest_size=8).digest(), "big") >> 1
        return decoded


class PlannedShardBatches(ShardBatches):
    """The steps of this rank's readers, whose images have planned shapes (see `training.data.naflex`).

    A batch has the samples of one step.
    """

    def __init__(self, *args: Any, plan: Plan, transform: PlannedTransform, **kwargs: Any) -> None:
        super().__init__(*args, transform=transform, **kwargs)
        self.plan = plan
        self.planned = transform
        self._steps: Iterator[list[Slot]] = iter(())
        self._free: list[Slot] = []  # slots of the current step without a sample

    def _encoded_samples(self, state: ShardState, worker: int) -> Iterator[tuple[Sample, ReadPosition]]:
        first = state.samples_before // self.layout.global_batch + worker
        numbers = itertools.count(first + self.layout.workers * state.batches_read[worker], self.layout.workers)
        self._steps = (self.plan.slots(state.epoch, number) for number in numbers)
        self._free = []
        return super()._encoded_samples(state, worker)

    def _batches(self, samples: Iterator[tuple[Sample, ReadPosition]], worker: int) -> Iterator[ShardBatch]:
        batch = []
        for sample, after in samples:
            batch.append(sample)
            if not self._free:
                yield ShardBatch(batch, (worker, *after))
                batch = []

    def _decode(self, sample: Sample, name: str, caption: str) -> Sample:
        if not self._free:
            self._free = next(self._steps)[::-1]
        self.planned.place(self._free[-1])
        decoded = super()._decode(sample, name, caption)
        return {**decoded, SLOT: self._free.pop()}  # not before the sample has turned out to be usable


class _PlannedCollate:
    """Joins the samples of a ShardBatch to micro-batches. `Loader` removes the position from the last one."""

    def __init__(self, collate: PlannedCollate) -> None:
        self.collate = collate

    def __call__(self, batch: ShardBatch) -> list[dict[str, Any]]:
        micro_batches = self.collate(batch.samples)
        micro_batches[-1][AFTER] = batch.after
        return micro_batches


class _ShardCollate(Collate):
    """Joins the samples of a ShardBatch. `Loader` removes the position from the batch."""

    def __call__(self, batch: Any) -> dict[str, Any] | None:
        collated = super().__call__(batch.samples)
        return None if collated is None else {**collated, AFTER: batch.after}


def make_shard_loader(
    cfg: DataConfig,
    preprocess: Callable[[Any], Any],
    is_train: bool,
    epoch: int = 0,
    floor: bool = False,
    tokenizer: Any = None,
) -> DataInfo:
    """Return the loader of webdataset shards; see `training.data.datasets.get_wds_dataset`."""
    shards, source = _find_shards(cfg, is_train)
    planned_transform = planned(preprocess) if is_train else None
    plan = None
    if planned_transform is None:
        num_batches, num_samples = _epoch_size(cfg, shards, source, floor)
    else:
        plan, num_batches, num_samples = _planned_epoch(planned_transform, cfg, shards, source, floor)
    world = ranks.world()
    layout = ReaderLayout(world.rank, world.world_size, max(1, cfg.workers), cfg.batch_size, num_batches)
    skipped = SkipCounter(cfg.workers, shards.urls, cfg.max_bad_fraction)
    shared_epoch, resume = SharedEpoch(epoch), ResumeRequest()
    create: Any = ShardBatches if plan is None else functools.partial(PlannedShardBatches, plan=plan)
    dataset = create(
        shards,
        layout,
        transform=preprocess,
        tokenizer=tokenizer if tokenizes_randomly(tokenizer) else None,
        shared_epoch=shared_epoch,
        resume=resume,
        source=source,
        skipped=skipped,
        max_image_pixels=cfg.max_image_pixels,
        caption_lengths=CaptionLengths(tokenizer),
    )
    collate: Any = _ShardCollate(tokenizer, cfg.text_pad_multiple)
    make_position: Callable[..., ShardPosition] = ShardPosition
    if planned_transform is not None and plan is not None:
        collate = _PlannedCollate(planned_transform.make_collate(Collate(tokenizer, cfg.text_pad_multiple), plan))
        if isinstance(plan, VariablePlan):
            make_position = functools.partial(VariableShardPosition, schedule=plan.fingerprint())
    loader = Loader(
        dataset,
        source=source,
        workers=cfg.workers,
        seed=cfg.seed,
        num_samples=num_samples,
        num_batches=num_batches,
        skipped=skipped,
        collate=collate,
        position=make_position(shards, layout, shared_epoch, resume, source) if is_train else None,
    )
    if plan is not None:
        loader.steps_per_epoch = num_batches
    return DataInfo(loader, shared_epoch=shared_epoch, skipped=skipped)


def _planned_epoch(
    transform: PlannedTransform, cfg: DataConfig, shards: ShardSet, source: str, floor: bool
) -> tuple[Plan, int, int]:
    """Return (plan, steps per rank, samples over all ranks) of an epoch with planned shapes."""
    is_counted_in_patches = transform.cfg.train_num_image_tokens is not None
    plan = transform.make_plan(None if is_counted_in_patches else _num_training_samples(cfg, shards, source))
    if isinstance(plan, VariablePlan):
        return plan, len(plan.schedule), plan.num_samples()
    if not is_counted_in_patches:
        return plan, *_epoch_size(cfg, shards, source, floor)
    num_steps = plan.num_steps(0)
    return plan, num_steps, num_steps * cfg.batch_size * ranks.world().world_size


def _find_shards(cfg: DataConfig, is_train: bool) -> tuple[ShardSet, str]:
    """Return the shards of the training or validation data, and the name of the data for messages."""
    source = cfg.train_data if is_train else cfg.val_data
    if not source:
        raise ValueError(f"No shards: {'--train-data' if is_train else '--val-data'} is not given.")
    factors = cfg.train_data_upsampling_factors if is_train else None
    resampled = is_train and cfg.dataset_resampled
    if factors is not None and not resampled:
        raise ValueError("--train-data-upsampling-factors needs --dataset-resampled.")
    urls, weights = expand_urls(source, factors)
    _check_present(urls, str(source))
    single_rank = not ranks.world().distributed
    members = PairMembers.from_options(cfg)
    buckets = LengthBuckets.from_options(cfg, cfg.batch_size) if is_train else None
    shards = ShardSet(urls, cfg.seed, is_train, resampled, weights, shard_sizes(urls), single_rank, members, buckets)
    return shards, shorten(source)


def _epoch_size(cfg: DataConfig, shards: ShardSet, source: str, floor: bool) -> tuple[int, int]:
    """Return (batches per rank, samples over all ranks). In evaluation, both are 0 if unknown."""
    world_size, workers = ranks.world().world_size, max(1, cfg.workers)
    global_batch = cfg.batch_size * world_size
    if not shards.endless:
        known = get_dataset_size(shards.urls)[0] if cfg.val_num_samples is None else cfg.val_num_samples
        return math.ceil((known or 0) / global_batch), known or 0
    num_samples = _num_training_samples(cfg, shards, source)
    if not shards.resampled:
        check_one_batch(num_samples, cfg.batch_size, world_size, source)
    to_integer = math.floor if floor else math.ceil
    batches = to_integer(num_samples / global_batch)
    per_worker = to_integer(batches / workers)
    if per_worker == 0:
        raise ValueError(f"{source} has {batches} batches per epoch, and --workers is {workers}. Use fewer.")
    return per_worker * workers, per_worker * workers * global_batch


def _num_training_samples(cfg: DataConfig, shards: ShardSet, source: str) -> int:
    num_samples = get_dataset_size(shards.urls)[0] if cfg.train_num_samples is None else cfg.train_num_samples
    if num_samples is None:
        raise ValueError(
            f"The number of samples in {source} is unknown: give --train-num-samples, or put a sizes.json "
            '({"00000.tar": 1000, ...}), img2dataset\'s _stats.json of every shard, or a file __len__ with the total '
            "number next to the shards."
        )
    return num_samples


def _check_present(urls: list[str], source: str) -> None:
    if not urls:
        raise ValueError(f"{quote(source)} names no shards.")
    check_schemes(urls, source)
    if all(is_local(url) for url in urls) and not any(os.path.exists(url) for url in urls):
        first = shorten(os.path.abspath(urls[0]))
        raise FileNotFoundError(
            f"None of the {len(urls)} shards of {shorten(source)} exists; the first should be {first}."
        )
