"""The loader of data sets whose samples have an index, and the replacement of bad samples."""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch.utils.data import Dataset

from training import ranks
from training.data.bucketing import LengthBuckets
from training.data.loader import Collate, DataInfo, Loader, check_one_batch
from training.data.naflex import planned
from training.data.rows.bucket_sampler import BucketSampler, Captions, RowLengths
from training.data.rows.naflex_rows import RowSteps, plan_steps
from training.data.rows.position import RowPosition
from training.data.sampling import EvalSampler, SampleRef, TrainSampler, sample_rng, stable_hash
from training.data.skips import BAD_IN_A_ROW, BadSample, BadStreak, SkipCounter
from training.params import DataConfig


class IndexedSamples(Protocol):
    """A map-style data set. Its items are dicts, and bad ones raise `BadSample`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class SkipBadSamples(Dataset):
    """A map-style data set without bad samples, whose random transforms depend on (seed, epoch, row) only.

    In training a bad sample is replaced by another one, drawn from (seed, epoch, row), so the result does not depend on
    the number of workers and ranks. In evaluation it becomes None, which `Collate` drops.
    """

    def __init__(
        self, dataset: IndexedSamples, *, source: str, seed: int, is_train: bool, skipped: SkipCounter
    ) -> None:
        self.dataset = dataset
        self.length = len(dataset)
        self.source = source
        self.seed = seed
        self.is_train = is_train
        self.skipped = skipped
        self.streak = BadStreak(source, None if ranks.world().distributed else BAD_IN_A_ROW)  # one per worker

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped data set, such as `classes` and `captions`."""
        if name.startswith("__") or "dataset" not in vars(self):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, ref: SampleRef) -> dict[str, Any] | None:
        row, epoch = ref
        streak = BadStreak(self.source) if self.is_train else self.streak
        for attempt in range(BAD_IN_A_ROW):
            try:
                with sample_rng(self.seed, epoch, row):
                    sample = self.dataset[row]
            except BadSample as bad:
                self.skipped.add_bad(bad)
                streak.add_bad(bad)
            else:
                streak.add_good()
                self.skipped.add_good()
                return sample
            if not self.is_train:
                return None
            row = stable_hash("replacement", self.seed, epoch, ref.row, attempt) % self.length
        raise AssertionError("BadStreak.add_bad raises first.")


def make_row_loader(
    dataset: IndexedSamples,
    cfg: DataConfig,
    *,
    is_train: bool,
    source: str,
    epoch: int = 0,
    tokenizer: Any = None,
    classes: list[str] | None = None,
    preprocess: Any = None,
) -> DataInfo:
    """Return the loader of a map-style data set.

    In training it is shuffled and has the same length on all ranks. In evaluation the samples come in order.

    Args:
        dataset: samples by index.
        cfg: batch_size, workers, seed, max_bad_fraction and text_pad_multiple are used.
        is_train: whether the loader is for training.
        source: name of the data for messages.
        epoch: the first epoch.
        tokenizer: list of captions -> int64 [B, L]; None keeps the captions.
        classes: class names, for `Loader.classes`.
        preprocess: the transform of the images, if it may have a plan (see `training.data.naflex`).

    Raises:
        ValueError: the training data have fewer samples than one batch on every rank.
    """
    world = ranks.world()
    skipped = SkipCounter(cfg.workers, max_bad_fraction=cfg.max_bad_fraction)
    samples = SkipBadSamples(dataset, source=source, seed=cfg.seed, is_train=is_train, skipped=skipped)
    collate = Collate(tokenizer, cfg.text_pad_multiple)
    if is_train:
        steps = _training_steps(samples, cfg, collate, epoch, preprocess)
    else:
        sampler = EvalSampler(len(dataset), cfg.batch_size, world.rank, world.world_size)
        steps = RowSteps(sampler, sampler, None, samples, collate, len(dataset))
    loader = Loader(
        steps.samples,
        source=source,
        workers=cfg.workers,
        seed=cfg.seed,
        num_samples=steps.num_samples,
        num_batches=len(steps.batches),
        skipped=skipped,
        collate=steps.collate,
        batch_sampler=steps.batches,
        classes=classes,
        position=steps.position,
    )
    if steps.is_planned:
        loader.steps_per_epoch = len(steps.batches)
    return DataInfo(loader, sampler=steps.sampler, skipped=skipped)


def _training_steps(
    samples: SkipBadSamples, cfg: DataConfig, collate: Collate, epoch: int, preprocess: Any
) -> RowSteps:
    size = len(samples)
    transform = planned(preprocess)
    if transform is None or not transform.is_variable:
        check_one_batch(size, cfg.batch_size, ranks.world().world_size, samples.source)
    sampler = _train_sampler(samples.dataset, cfg, collate.tokenizer, epoch)
    position = RowPosition(sampler, samples.source)
    if transform is None:
        return RowSteps(sampler, sampler, position, samples, collate, size)
    return plan_steps(transform, sampler, position, samples, collate)


def _train_sampler(dataset: IndexedSamples, cfg: DataConfig, tokenizer: Any, epoch: int) -> TrainSampler:
    world = ranks.world()
    arguments = len(dataset), cfg.batch_size, world.rank, world.world_size, cfg.seed, epoch
    buckets = LengthBuckets.from_options(cfg, cfg.batch_size * world.world_size)
    if buckets is None:
        return TrainSampler(*arguments)
    lengths = RowLengths(cast("Captions", dataset), tokenizer)
    return BucketSampler(*arguments, buckets=buckets, lengths=lengths)
