"""The data loader of rows and shards: batches, worker processes, and the read position after each batch."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import signal_handling

from open_clip import device
from open_clip.transform import collate_patches
from training import children, ranks
from training.batches import Normalization
from training.data.position import Position
from training.data.sampling import SharedEpoch, stable_hash
from training.data.shared_memory import stack
from training.data.skips import SkipCounter
from training.data.variable_text import variable_text_of
from training.signals import Agreement, Stopped

logger = logging.getLogger(__name__)

_PREFETCHED_BATCHES = 2  # per worker
_WORKER_EXIT_TIMEOUT = 2.0  # seconds, before they are killed
AFTER = "__after__"  # in a batch from a data set of shards: the read position after it
ENDS_STEP = "__ends_step__"  # in a micro-batch: whether it is the last one of its step
KEY = "key"  # in a batch: list of str, the name of each sample
TEXT = "text"  # in a batch: captions, or their token ids [B, L]
TEXT_VALID = "text_valid"  # in a batch of variable text: bool [B, L], False for padding


@dataclass
class DataInfo:
    """A data loader and its state. `skipped` counts bad samples in this process and the loader's workers."""

    dataloader: DataLoader
    sampler: Sampler | None = None
    shared_epoch: SharedEpoch | None = None
    skipped: SkipCounter | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines order and augmentation of the next iteration."""
        if self.shared_epoch is not None:
            self.shared_epoch.set_value(epoch)
        if self.sampler is not None and hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's read position after the last batch that the training loop received: numbers and tensors.

        Prefetched batches do not count. See `training.data.position`.

        Raises:
            TypeError: this is not training data.
        """
        return self._position().state_dict()

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Make the next iteration start at a saved position. A later `set_epoch` with another epoch discards it.

        Args:
            states: the state dicts of all ranks of the run that saved them, in the order of the ranks.
        """
        self._position().load_state_dict(states)
        self.dataloader.close()  # type: ignore[attr-defined]  # workers get the position when they start

    def _position(self) -> Position:
        position = getattr(self.dataloader, "position", None)
        if position is None:
            raise TypeError("Only the training data of training.data have a read position to save.")
        return position


class Loader(DataLoader):
    """A DataLoader of batches that are dicts. Its workers live until `close` or the end of the process.

    Attributes:
        num_samples: of an epoch, over all ranks.
        num_batches: of an epoch, on this rank.
        steps_per_epoch: of the training loop, if the data decide which batches form a step. Then each batch has an
            entry ENDS_STEP, and `num_batches` counts steps.
        classes: class names, if the data are a folder of classes.
        members: if set, a batch is the list of these entries of the dict.
        normalization: what `training.batches.to_device` does to the images; None for nothing.
        agreement: makes the ranks stop before the same batch of training data. By default no signal stops them.
    """

    steps_per_epoch: int | None = None
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
        collate: Callable[[Any], Any],
        batch_sampler: Sampler | None = None,
        classes: list[str] | None = None,
        position: Position | None = None,
    ) -> None:
        world = ranks.world()
        options: dict[str, Any] = {"pin_memory": device.get(world.device).pin_memory}
        if options["pin_memory"] and _torch_version() < (2, 9):
            options["pin_memory_device"] = world.device.type  # from 2.9 on, torch takes the current accelerator
        if workers > 0:
            options |= {"persistent_workers": True, "prefetch_factor": _PREFETCHED_BATCHES}
            options["multiprocessing_context"] = _worker_context()
        if batch_sampler is None:
            options["batch_size"] = None  # the data set yields batches
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=_init_worker,
            # without it, DataLoader draws the workers' base seed from the global generator
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
        self._is_single_rank = not world.distributed

    @property
    def ends_steps(self) -> bool:
        """Whether the data decide which batches form a step."""
        return self.steps_per_epoch is not None

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.members is None:
            return self._epoch_batches()
        return ([batch[name] for name in self.members or ()] for batch in self._epoch_batches())

    def _epoch_batches(self) -> Iterator[dict[str, Any]]:
        if self.position is not None:
            yield from self._training_batches(self.position)
            return
        skipped_before = self.skipped.total()
        is_empty = True
        for batch in self._batches():
            if batch is not None:  # None: all its samples were bad
                batch.pop(AFTER, None)
                is_empty = False
                yield batch
        if is_empty and self.skipped.total() > skipped_before:
            message = f"{self.source}: not one usable sample. Skipped, by cause: {self.skipped.counts()}."
            if self._is_single_rank:
                raise ValueError(f"{message} The log names the first ones.")
            logger.error("%s Other ranks may have usable samples.", message)

    def _training_batches(self, position: Position) -> Iterator[dict[str, Any]]:
        position.begin_epoch()
        batches = self._batches()
        while True:
            batch = self.agreement.take(lambda: next(batches, None), self._is_next_ready, position.may_end_early)
            if batch is None:
                batches.close()
                return
            # A step of several micro-batches comes from a worker as a list, so ranks never stop within one.
            micro_batches = batch if isinstance(batch, list) else [batch]
            position.record_batch(micro_batches[-1].pop(AFTER, None))
            yield from micro_batches

    def _batches(self) -> Generator[dict[str, Any] | None, None, None]:
        previous = self._iterator
        try:
            batches = super().__iter__()
            if self._iterator is not previous:  # new workers, which ignore the SIGTERM that ends those of torch
                atexit.register(_close_at_exit, weakref.ref(self))
            yield from batches
        except (GeneratorExit, Stopped):  # the epoch ends early, or the run saves first: keep the workers
            raise
        except BaseException:
            self.close()
            raise

    def _is_next_ready(self) -> bool:
        """Whether workers have finished the next batch; False if that is unknown."""
        iterator: Any = self._iterator
        try:
            task = iterator._task_info[iterator._rcvd_idx]
            if len(task) == 2:  # it arrived early, and torch has stored it
                return True
            # A worker returns its batches in order: if any of its pending batches is in the queue, the next one is.
            pending = sum(other == task for other in iterator._task_info.values())
            return iterator._tasks_outstanding - iterator._data_queue.qsize() < pending
        except (AttributeError, KeyError, NotImplementedError):  # no workers, the end, or qsize is not implemented
            return False

    def close(self) -> None:
        """End the workers, blocked ones with SIGKILL. The next iteration starts new ones.

        If the garbage collector did this, their queues might be gone first, and torch would wait 5 seconds for each.
        """
        iterator: Any = self._iterator
        self._iterator = None
        if iterator is None:
            return
        # Otherwise torch reports a killed worker as a failure.
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
        killer = threading.Timer(_WORKER_EXIT_TIMEOUT, children.kill, [iterator._workers])
        killer.daemon = True
        killer.start()
        try:
            iterator._shutdown_workers()
        finally:
            killer.cancel()


def _close_at_exit(loader: weakref.ref[Loader]) -> None:
    left = loader()
    if left is not None:
        left.close()


def _worker_context() -> BaseContext | None:
    """Return the context that starts worker processes; None for the default one, if that does not fork."""
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if method != "fork":
        return None
    from training.forking import ForkContext  # which exists only where processes can fork

    return ForkContext()


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _init_worker(worker_id: int) -> None:
    # A signal that stops a run may go to every process. Only the main process handles it, and ends the workers.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # a forked worker inherits that of the main process
    children.lead_group()


def tokenizes_randomly(tokenizer: Any) -> bool:
    """Whether the tokenizer draws random numbers, to shorten long captions.

    Such a tokenizer is called for each sample inside `sample_rng`. Others are called once per batch, which is faster.
    """
    return getattr(tokenizer, "reduction_fn", None) is not None


class Collate:
    """Joins samples to a batch: stacks tensors, pads patches, and tokenizes captions in one call.

    Samples are dicts; None is a dropped sample. The result is a dict such as {"image": float or uint8 [B, 3, H, W],
    "text": int64 [B, L], "key": B strings}, or None if all samples were dropped. With the tokenizer of a model that has
    `variable_text`, captions are padded to the longest one, and the batch has "text_valid", bool [B, L].

    Args:
        tokenizer: list of captions -> int64 [B, L]; None keeps the captions.
        text_pad_multiple: with `variable_text`, the number of columns is a multiple of it.
    """

    def __init__(
        self, tokenizer: Callable[[list[str]], Any] | None = None, text_pad_multiple: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.variable_text = variable_text_of(tokenizer, text_pad_multiple)
        self.column: Callable[..., Any] = stack
        self.patch_length: int | None = None  # to which patches are padded; None: to the longest image of the batch

    def __call__(self, samples: list[dict[str, Any] | None]) -> dict[str, Any] | None:
        kept = [sample for sample in samples if sample is not None]
        if not kept:
            return None
        batch = {key: self._join(key, [sample[key] for sample in kept]) for key in kept[0]}
        if self.variable_text is not None and isinstance(batch.get(TEXT), tuple):
            batch[TEXT], batch[TEXT_VALID] = batch[TEXT]
        return batch

    def _join(self, key: str, values: list[Any]) -> Any:
        if key == KEY:
            return values
        if isinstance(values[0], str):
            tokenizer = self.variable_text or self.tokenizer
            return values if tokenizer is None else tokenizer(values)
        if isinstance(values[0], Mapping):
            return collate_patches(values, self.patch_length, stack=self.column)
        return self.column(tuple(values))


def check_one_batch(num_samples: int, batch_size: int, world_size: int, source: str) -> None:
    """Raise ValueError if the data do not fill one batch on every rank."""
    if num_samples < batch_size * world_size:
        step = f"{batch_size * world_size}"
        if world_size > 1:
            step += f" ({batch_size} on each of {world_size} processes)"
        raise ValueError(
            f"{source} has {num_samples} samples, and one step needs {step}. Use a smaller --batch-size, or more data."
        )
