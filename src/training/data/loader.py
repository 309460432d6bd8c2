"""From a dataset to batches: collating, workers, and samples that cannot be used."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.data._utils import signal_handling

from open_clip import device
from training import children, distributed
from training.batches import Normalization
from training.data.position import Position, RowPosition
from training.data.sampling import EvalSampler, SampleRef, SharedEpoch, TrainSampler, sample_rng, stable_hash
from training.data.skips import BAD_IN_A_ROW, BadSample, SkipCounter, Streak
from training.signals import Agreement, Stopped

logger = logging.getLogger(__name__)

_PREFETCHED_BATCHES = 2  # per worker
_END_WORKERS_WITHIN = 2.0  # seconds, before they are killed
CURSOR = "__cursor__"  # in a batch on its way here: the place behind it
KEY = "key"  # in a batch: list of str, what names each sample


@dataclass
class DataInfo:
    """A loader and what steers it. `skipped` counts bad samples by cause, in this process and the loader's workers."""

    dataloader: DataLoader
    sampler: Sampler | None = None
    shared_epoch: SharedEpoch | None = None
    skipped: SkipCounter | None = None

    def set_epoch(self, epoch: int) -> None:
        """Order and augmentation of the next pass over the loader follow from the epoch."""
        if self.shared_epoch is not None:
            self.shared_epoch.set_value(epoch)
        if self.sampler is not None and hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """This rank's place behind the batch that the loop received last: a few numbers and tensors; of training data.

        What workers have prefetched does not count. See `training.data.position` for what a place is good for.
        """
        return self._position().state_dict()

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """The next pass begins at a place that was saved. states: of all ranks of that run, in their order.

        `set_epoch` with the same epoch keeps the place; another epoch begins at its begin.
        """
        self._position().load_state_dict(states)
        self.dataloader.close()  # type: ignore[attr-defined]  # workers learn of it when they start

    def _position(self) -> Position:
        position = getattr(self.dataloader, "position", None)
        if position is None:
            raise TypeError("Only training data of training.data have a place to save.")
        return position


class Loader(DataLoader):
    """A DataLoader of dict batches with `num_samples` (of an epoch, over all ranks) and `num_batches` (this rank's).

    Workers live until `close` or the end of the process. `classes` are the class names of a folder of classes.
    With `members`, names of a batch's members, it gives a list of these instead of each dict.
    `normalization`: what `training.batches.to_device` is to do to the images; None if nothing.
    `agreement`: how the ranks stop before the same batch of training data; by default no signal stops them.
    """

    members: tuple[str, ...] | None = None
    normalization: Normalization | None = None

    def __init__(
        self,
        dataset: Dataset,
        *,
        source: str,
        workers: int,
        seed: int,
        num_samples: int,
        num_batches: int,
        skipped: SkipCounter,
        collate: Collate,
        batch_sampler: Sampler | None = None,
        classes: list[str] | None = None,
        position: Position | None = None,
    ) -> None:
        world = distributed.world()
        options: dict[str, Any] = {"pin_memory": device.get(world.device).pin_memory}
        if options["pin_memory"] and _torch_version() < (2, 9):
            options["pin_memory_device"] = world.device.type  # later, that of the current accelerator
        if workers > 0:
            options |= {"persistent_workers": True, "prefetch_factor": _PREFETCHED_BATCHES}
        if batch_sampler is None:
            options["batch_size"] = None  # the dataset itself yields batches
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=_init_worker,
            # of its own, as DataLoader draws its workers' base seed from the global one otherwise
            generator=torch.Generator().manual_seed(stable_hash("loader", seed)),
            **options,
        )
        self.source = source
        self.num_samples = num_samples
        self.num_batches = num_batches
        self.skipped = skipped
        self.classes = classes
        self.position = position
        self.agreement = Agreement()
        self._alone = not world.distributed

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.members is None:
            return self._whole_batches()
        return ([batch[name] for name in self.members or ()] for batch in self._whole_batches())

    def _whole_batches(self) -> Iterator[dict[str, Any]]:
        if self.position is not None:
            yield from self._training_batches(self.position)
            return
        skipped_before = self.skipped.total()
        empty = True
        for batch in self._batches():
            if batch is not None:  # None: every sample of it was bad
                batch.pop(CURSOR, None)
                empty = False
                yield batch
        if empty and self.skipped.total() > skipped_before:
            message = f"{self.source}: not one usable sample. Skipped, by cause: {self.skipped.counts()}."
            if self._alone:
                raise ValueError(f"{message} The log has the first names.")
            logger.error("%s This is this rank's part; the others may have more.", message)

    def _training_batches(self, position: Position) -> Iterator[dict[str, Any]]:
        position.begin()
        batches = self._batches()
        while True:
            batch = self.agreement.take(lambda: next(batches, None), self._is_next_ready, position.may_end_early)
            if batch is None:
                batches.close()  # type: ignore[attr-defined]  # a generator
                return
            position.received(batch.pop(CURSOR, None))
            yield batch

    def _batches(self) -> Iterator[dict[str, Any] | None]:
        try:
            yield from super().__iter__()
        except (GeneratorExit, Stopped):  # the epoch is left early, or saved first: the workers stay
            raise
        except BaseException:
            self.close()
            raise

    def _is_next_ready(self) -> bool:
        """Whether workers have made the next batch already; False where that cannot be told."""
        iterator: Any = self._iterator
        try:
            task = iterator._task_info[iterator._rcvd_idx]
            if len(task) == 2:  # it came before its turn
                return True
            # A worker gives its batches in order: unless all that it owes are missing, the next one is there.
            owed = sum(other == task for other in iterator._task_info.values())
            return iterator._tasks_outstanding - iterator._data_queue.qsize() < owed
        except (AttributeError, KeyError, NotImplementedError):  # no workers, the end, a queue that cannot be counted
            return False

    def close(self) -> None:
        """Ends the workers, by SIGKILL those that are blocked. The next pass would start new ones.

        Left to the garbage collector, their queues may go before them, and each is waited for in vain for 5 seconds.
        """
        iterator: Any = self._iterator
        self._iterator = None
        if iterator is None:
            return
        # torch waits 5 s for each worker, and reports one that was killed as a failure.
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
        killer = threading.Timer(_END_WORKERS_WITHIN, children.kill, [iterator._workers])
        killer.daemon = True
        killer.start()
        try:
            iterator._shutdown_workers()
        finally:
            killer.cancel()


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _init_worker(worker_id: int) -> None:
    # Signals that stop a run may go to every process: the main one alone answers them, and ends the workers.
    # (That torch computes with one thread in a worker is DataLoader's own doing.)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # a forked worker has the main process's
    children.lead_group()


def tokenizes_randomly(tokenizer: Any) -> bool:
    """Whether the tokenizer draws random numbers (reduces long captions at random).

    Such a one is called sample by sample inside `sample_rng`; any other is called once a batch, which is faster.
    """
    return getattr(tokenizer, "reduction_fn", None) is not None


class Collate:
    """Samples (dicts, None for a dropped one) to a batch: tensors stacked, captions tokenised in one call.

    Returns a dict such as {"image": float or uint8 [B, 3, H, W], "text": int64 [B, L], "key": B strings}, or None if no
    sample is left.
    """

    def __init__(self, tokenizer: Callable[[list[str]], Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.column: Callable[..., Any] = default_collate  # in a worker: straight into shared memory

    def __call__(self, samples: list[dict[str, Any] | None]) -> dict[str, Any] | None:
        whole = [sample for sample in samples if sample is not None]
        if not whole:
            return None
        return {key: self._join(key, [sample[key] for sample in whole]) for key in whole[0]}

    def _join(self, key: str, values: list[Any]) -> Any:
        if key == KEY:
            return values
        if isinstance(values[0], str):
            return values if self.tokenizer is None else self.tokenizer(values)
        return self.column(tuple(values))


class WholeSamples(Dataset):
    """Samples of a map-style dataset with random numbers of their own and bad ones dealt with.

    In training a bad sample is replaced by another, drawn from (seed, epoch, row): the same on any number of workers
    and ranks. In evaluation it becomes None, which `Collate` drops.
    """

    def __init__(self, dataset: Dataset, *, source: str, seed: int, is_train: bool, skipped: SkipCounter) -> None:
        self.dataset = dataset
        self.length = len(dataset)  # type: ignore[arg-type]
        self.source = source
        self.seed = seed
        self.is_train = is_train
        self.skipped = skipped
        # (of this worker's copy)
        self.streak = Streak(source, None if distributed.world().distributed else BAD_IN_A_ROW)

    def __getattr__(self, name: str) -> Any:
        """The attributes of the data set that is read, such as `classes` and `captions`."""
        if name.startswith("__") or "dataset" not in vars(self):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, ref: SampleRef) -> dict[str, Any] | None:
        row, epoch = ref
        streak = Streak(self.source) if self.is_train else self.streak
        for attempt in range(BAD_IN_A_ROW):
            try:
                with sample_rng(self.seed, epoch, row):
                    sample = self.dataset[row]
            except BadSample as bad:
                self.skipped.add(bad)
                streak.add(bad)
            else:
                streak.good()
                self.skipped.good()
                return sample
            if not self.is_train:
                return None
            row = stable_hash("replacement", self.seed, epoch, ref.row, attempt) % self.length
        raise AssertionError("Streak.add raises before")


def map_loader(
    dataset: Dataset,
    args: Any,
    *,
    is_train: bool,
    source: str,
    epoch: int = 0,
    tokenizer: Any = None,
    classes: list[str] | None = None,
) -> DataInfo:
    """The loader of a map-style dataset: shuffled and of equal length on all ranks in training, in order otherwise.

    args: batch_size, workers, seed (params.DataConfig).

    Raises:
        ValueError: training data of fewer samples than one batch on every rank.
    """
    world = distributed.world()
    seed = getattr(args, "seed", 0)
    skipped = SkipCounter(args.workers, max_bad_fraction=getattr(args, "max_bad_fraction", 1.0))
    size = len(dataset)  # type: ignore[arg-type]
    sampler: TrainSampler | EvalSampler
    position = None
    if is_train:
        check_one_batch(size, args.batch_size, world.world_size, source)
        sampler = TrainSampler(size, args.batch_size, world.rank, world.world_size, seed, epoch)
        position = RowPosition(sampler, source)
    else:
        sampler = EvalSampler(size, args.batch_size, world.rank, world.world_size)
    loader = Loader(
        WholeSamples(dataset, source=source, seed=seed, is_train=is_train, skipped=skipped),
        source=source,
        workers=args.workers,
        seed=seed,
        num_samples=size,
        num_batches=len(sampler),
        skipped=skipped,
        collate=Collate(tokenizer),
        batch_sampler=sampler,
        classes=classes,
        position=position,
    )
    return DataInfo(loader, sampler=sampler, skipped=skipped)


def check_one_batch(num_samples: int, batch_size: int, world_size: int, source: str) -> None:
    """Raises ValueError where the data do not fill one batch on every rank."""
    if num_samples < batch_size * world_size:
        step = f"{batch_size * world_size}"
        if world_size > 1:
            step += f" ({batch_size} on each of {world_size} processes)"
        raise ValueError(
            f"{source} has {num_samples} samples, fewer than one step takes, {step}. Lower --batch-size, or add data."
        )
