"""The read position in the training data: how it is saved in a checkpoint, and how a run resumes at it.

With the number of ranks and workers and the batch size that it was saved with, a resumed run gets exactly the batches
that the uninterrupted run would have got, from any position in an epoch. With others:

* At the end of an epoch there is no difference, because the order of an epoch depends on (seed, epoch) only.
* Within an epoch, samples that were read are not read again in the rest of the epoch, and no sample is repeated in the
  rest. Rows (CSV, folders): the rest lacks less than one global batch, as every epoch does. Shards: what the old
  readers had left is divided among the new ones. All ranks stop when the first one has no more batches, so the rest may
  lack what the other ranks have left: about a block (2,048 samples), a shard and a batch per reader. With resampling,
  the rest consists of new draws, as many as were missing. Other options of length bucketing are another layout, too: a
  partly read pool is read to its end in the order in which it was started.
* Steps of different sizes (--naflex-variable-batch) are only continued with the same schedule and ranks. Anything else
  is an error, unless the checkpoint is from the end of an epoch.
* With other data or another seed a position is meaningless: the epoch starts from the beginning, with a warning.

(If an epoch of shards has more samples than a reader's part of the shards, the reader starts over and repeats samples.
This also holds for uninterrupted runs.)

`Position` is the interface. `training.data.rows.position` and `training.data.shards.position` implement it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

StateDict = dict[str, Any]


@dataclass
class EpochState:
    """How far an epoch has been read."""

    epoch: int


StateT = TypeVar("StateT", bound=EpochState)


class OtherSteps(ValueError):
    """A position within an epoch cannot be continued, because its steps have other sizes than those of this run."""


def _copy(state: StateT | None) -> StateT | None:
    if state is None:
        return None
    copied = replace(state)
    vars(copied).update({name: list(value) for name, value in vars(state).items() if isinstance(value, list)})
    return copied


class Position(ABC, Generic[StateT]):
    """The read position of a training loader."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._current: StateT | None = None  # of the running epoch, or of the latest one
        self._loaded: StateT | None = None
        self._marked: tuple[StateT | None, StateT | None] = (None, None)

    @property
    def may_end_early(self) -> bool:
        """Whether the epoch may have fewer batches on one rank than on another: the ranks must agree on its end."""
        return False

    def begin_epoch(self) -> None:
        """Start an epoch: at the loaded position if that is in this epoch, otherwise at the start of the epoch."""
        epoch = self._epoch()
        is_resumed = self._loaded is not None and self._loaded.epoch == epoch
        self._current, self._loaded = (self._loaded if is_resumed else self._initial_state(epoch)), None
        assert self._current is not None
        self._start(self._current, is_resumed)

    @abstractmethod
    def record_batch(self, after: Any) -> None:
        """Record that the training loop gets the next batch. `after` is the position that came with the batch."""

    def mark(self) -> None:
        """Remember the current position for `rewind`."""
        self._marked = _copy(self._current), _copy(self._loaded)

    def rewind(self) -> None:
        """Return to the position of the last `mark`: the batches since then do not count as received."""
        self._current, self._loaded = self._marked

    def state_dict(self) -> StateDict:
        epoch = self._epoch()
        known = [state for state in (self._loaded, self._current) if state is not None and state.epoch == epoch]
        return self._to_state_dict(known[0] if known else self._initial_state(epoch))

    def load_state_dict(self, states: Sequence[StateDict]) -> None:
        """Load the states of all ranks of the run that saved them. Reading of their epoch starts at that position.

        Raises:
            OtherSteps: the run that saved them, or this one, has steps of different sizes, and not the same ones. That
                is no error if this run starts at a later epoch.
        """
        is_finished = states[0]["epoch"] < self._epoch()
        self._set_epoch(states[0]["epoch"])
        self._current = self._loaded = None
        expected = self._to_state_dict(self._initial_state(states[0]["epoch"]))
        different = [key for key in ("form", "seed", "size", "resampled") if states[0][key] != expected[key]]
        if not different:
            try:
                self._loaded = self._from_state_dicts(states)
            except OtherSteps:
                if not is_finished:
                    raise
            return
        changes = ", ".join(f"{key} {states[0][key]} -> {expected[key]}" for key in different)
        logger.warning(
            "%s is not the data that the checkpoint was trained on (%s). The saved read position is ignored, and epoch "
            "%d starts from the beginning.", self.source, changes, states[0]["epoch"],
        )  # fmt: skip

    @abstractmethod
    def _epoch(self) -> int: ...

    @abstractmethod
    def _set_epoch(self, epoch: int) -> None: ...

    @abstractmethod
    def _initial_state(self, epoch: int) -> StateT: ...

    @abstractmethod
    def _start(self, state: StateT, is_resumed: bool) -> None:
        """Make the sampler or the data set start at `state`."""

    @abstractmethod
    def _to_state_dict(self, state: StateT) -> StateDict:
        """Return plain values and tensors. "size" is the number of rows or shards, which must be equal at a resume."""

    @abstractmethod
    def _from_state_dicts(self, states: Sequence[StateDict]) -> StateT: ...
