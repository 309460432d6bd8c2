"""The place in the data at which a run stands, as a checkpoint keeps it, and how a run goes on from there.

With the ranks, workers and batch size that it was saved with, a run gets exactly the batches that the unbroken one
would have got, wherever in an epoch it was. With others:

* at the end of an epoch nothing differs: each epoch begins from (seed, epoch) alone;
* inside an epoch, what its first part has seen does not come again in the rest of that epoch, and nothing comes twice
  in the rest. Rows (CSV, folders): the rest misses less than one global batch, as every epoch does. Shards: what the
  old readers had left is dealt to the new ones; all ranks stop where the first has nothing more, so the rest may miss
  what the others then have left, about a block (2,048 samples), a shard and a batch for each reader. With resampling
  the rest has new draws, as many as were missing;
* with other data or another seed a place means nothing: the epoch begins anew, with a warning.

(An epoch of shards that is longer than what a reader's share holds goes round and so repeats samples, unbroken too.)
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch

from training.data.reading import Collection, Cursor, Pass, Visit
from training.data.sampling import SharedEpoch, TrainSampler

logger = logging.getLogger(__name__)

State = dict[str, Any]


@dataclass
class RowPlace:
    """How many samples of the epoch's order all ranks together have taken."""

    epoch: int
    samples: int = 0


@dataclass
class ShardPlace:
    """How far this rank's readers are, by worker, in a part of an epoch: all of it, or its rest on a new layout.

    before: samples that all ranks took of the epoch in earlier parts. batches: of this part, a rank. next_worker: whose
    batch is the next. passes: what each worker's reader goes through where that is not the regular order. salt: of a
    resampled part's draws.
    """

    epoch: int
    cursors: list[Cursor]
    done: list[int]  # batches
    batches: int
    before: int = 0
    next_worker: int = 0
    passes: list[list[Pass]] | None = None
    salt: int = 0

    def left(self, worker: int) -> int:
        """Batches that this worker still has to give: they take turns."""
        return -(-(self.batches - worker) // len(self.cursors)) - self.done[worker]


Place = TypeVar("Place", RowPlace, ShardPlace)


def _copy(place: Place | None) -> Place | None:
    if place is None:
        return None
    copied = replace(place)
    vars(copied).update({name: list(value) for name, value in vars(place).items() if isinstance(value, list)})
    return copied


class Position(ABC, Generic[Place]):
    """What a training loader knows of its place.

    may_end_early: this pass may have fewer batches on one rank than on another: they have to agree on its end.
    """

    may_end_early = False

    def __init__(self, source: str) -> None:
        self.source = source
        self._here: Place | None = None  # of the pass that runs, or the latest one
        self._loaded: Place | None = None
        self._marked: tuple[Place | None, Place | None] = (None, None)

    def begin(self) -> None:
        """A pass begins: at the place that was loaded if that is in this epoch, or else at the epoch's begin."""
        epoch = self._epoch()
        is_loaded = self._loaded is not None and self._loaded.epoch == epoch
        self._here, self._loaded = (self._loaded if is_loaded else self._fresh(epoch)), None
        assert self._here is not None
        self._start(self._here, is_loaded)

    @abstractmethod
    def received(self, cursor: Any) -> None:
        """The loop gets the next batch, which came with `cursor`."""

    def mark(self) -> None:
        """Remembers the place for `rewind`."""
        self._marked = _copy(self._here), _copy(self._loaded)

    def rewind(self) -> None:
        """Goes back to where `mark` was called: the batches since then do not count as received."""
        self._here, self._loaded = self._marked

    def state_dict(self) -> State:
        epoch = self._epoch()
        known = [place for place in (self._loaded, self._here) if place is not None and place.epoch == epoch]
        return self._to_state(known[0] if known else self._fresh(epoch))

    def load_state_dict(self, states: Sequence[State]) -> None:
        """Takes the states of all ranks of the run that saved them; the next pass over their epoch begins there."""
        self._set_epoch(states[0]["epoch"])
        self._here = self._loaded = None
        own = self._to_state(self._fresh(states[0]["epoch"]))
        different = [key for key in ("form", "seed", "size", "resampled") if states[0][key] != own[key]]
        if not different:
            self._loaded = self._from_states(states)
            return
        changes = ", ".join(f"{key} {states[0][key]} -> {own[key]}" for key in different)
        logger.warning(
            "%s is not what the checkpoint was trained on (%s): its place in the data means nothing here, and epoch %d "
            "begins anew.", self.source, changes, states[0]["epoch"],
        )  # fmt: skip

    @abstractmethod
    def _epoch(self) -> int: ...

    @abstractmethod
    def _set_epoch(self, epoch: int) -> None: ...

    @abstractmethod
    def _fresh(self, epoch: int) -> Place: ...

    @abstractmethod
    def _start(self, place: Place, is_loaded: bool) -> None:
        """Tells whoever makes the batches."""

    @abstractmethod
    def _to_state(self, place: Place) -> State:
        """Plain values and tensors. size: rows or shards; a place is of use only with the same."""

    @abstractmethod
    def _from_states(self, states: Sequence[State]) -> Place: ...


class RowPosition(Position[RowPlace]):
    """In a shuffled list of rows."""

    def __init__(self, sampler: TrainSampler, source: str) -> None:
        super().__init__(source)
        self.sampler = sampler

    def received(self, cursor: Any) -> None:
        assert self._here is not None
        self._here.samples += self.sampler.batch_size * self.sampler.world_size

    def _epoch(self) -> int:
        return self.sampler.epoch

    def _set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def _fresh(self, epoch: int) -> RowPlace:
        return RowPlace(epoch)

    def _start(self, place: RowPlace, is_loaded: bool) -> None:
        self.sampler.start = place.samples

    def _to_state(self, place: RowPlace) -> State:
        return {
            "form": "rows",
            "seed": self.sampler.seed,
            "size": self.sampler.num_samples,
            "resampled": False,
            "epoch": place.epoch,
            "samples": place.samples,
        }

    def _from_states(self, states: Sequence[State]) -> RowPlace:
        return RowPlace(states[0]["epoch"], max(state["samples"] for state in states))


@dataclass(frozen=True)
class Layout:
    """Who reads: this rank of so many, its workers (1 where there is none), and how many batches a rank's epoch has."""

    rank: int
    world_size: int
    workers: int
    batch_size: int
    batches: int

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    def reader(self, worker: int) -> int:
        return self.rank + self.world_size * worker

    @property
    def readers(self) -> int:
        return self.world_size * self.workers


@dataclass
class Handover:
    """What the workers' copies of the data set know of the place to begin at; they read it when a pass begins.

    The place goes over when they start. Whether it is still to be used they see in shared memory.
    """

    place: ShardPlace | None = None
    is_due: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.bool).share_memory_())

    def due(self) -> ShardPlace | None:
        return self.place if bool(self.is_due) else None


class ShardPosition(Position[ShardPlace]):
    """In shards."""

    def __init__(
        self, collection: Collection, layout: Layout, shared_epoch: SharedEpoch, handover: Handover, source: str
    ) -> None:
        super().__init__(source)
        self.collection = collection
        self.layout = layout
        self.shared_epoch = shared_epoch
        self.handover = handover

    @property
    def may_end_early(self) -> bool:  # type: ignore[override]
        return self._here is not None and self._here.passes is not None

    def received(self, cursor: Any) -> None:
        assert self._here is not None
        worker, *place = cursor
        self._here.cursors[worker] = Cursor(*place)
        self._here.done[worker] += 1
        self._here.next_worker = (worker + 1) % self.layout.workers

    def _epoch(self) -> int:
        return self.shared_epoch.get_value()

    def _set_epoch(self, epoch: int) -> None:
        self.shared_epoch.set_value(epoch)

    def _fresh(self, epoch: int) -> ShardPlace:
        return fresh_place(epoch, self.layout)

    def _start(self, place: ShardPlace, is_loaded: bool) -> None:
        self.handover.is_due.fill_(is_loaded)
        if is_loaded:
            # a copy: without workers the data set would see what is received
            self.handover.place = replace(place, cursors=list(place.cursors), done=list(place.done))

    def _to_state(self, place: ShardPlace) -> State:
        passes = place.passes
        return {
            "form": "shards",
            "seed": self.collection.seed,
            "size": len(self.collection.urls),
            "resampled": self.collection.resampled,
            "epoch": place.epoch,
            "layout": self._layout_state(),
            "cursors": torch.tensor(place.cursors),
            "done": torch.tensor(place.done),
            "batches": place.batches,
            "before": place.before,
            "next_worker": place.next_worker,
            "passes": None if passes is None else [[part.to_state() for part in worker] for worker in passes],
            "salt": place.salt,
        }

    def _layout_state(self) -> State:
        here = self.layout
        return {
            "world_size": here.world_size,
            "workers": here.workers,
            "batch_size": here.batch_size,
            "batches": here.batches,
        }

    def _from_states(self, states: Sequence[State]) -> ShardPlace:
        if all(state["layout"] == self._layout_state() for state in states):
            return _place_of(states[self.layout.rank])
        return self._rest(states)

    def _rest(self, states: Sequence[State]) -> ShardPlace:
        """The rest of an epoch that other readers began."""
        epoch, batch_size = states[0]["epoch"], states[0]["layout"]["batch_size"]
        places = [_place_of(state) for state in states]
        seen = places[0].before + sum(sum(place.done) for place in places) * batch_size
        place = fresh_place(epoch, self.layout)
        if seen == 0:
            return place
        place.before = seen
        place.batches = max(0, self.layout.batches * self.layout.global_batch - seen) // self.layout.global_batch
        if all(sum(old.done) >= old.batches for old in places):
            place.batches = 0
        if self.collection.resampled:
            place.salt = seen
            return place
        begun, whole = _what_is_left(places, states[0]["layout"]["workers"], self.collection)
        place.passes = []
        for worker in range(self.layout.workers):
            reader = self.layout.reader(worker)
            mine = begun[reader :: self.layout.readers]
            # whoever got nothing begun is the first to get a whole shard
            shards = whole[(reader - len(begun)) % self.layout.readers :: self.layout.readers]
            place.passes.append([*mine, Pass(shards)] if shards else mine)
        logger.info(
            "Epoch %d goes on with other readers than it began with: %d samples are seen, %d batches a rank are left "
            "at most; see training.data.position.", epoch, seen, place.batches,
        )  # fmt: skip
        return place


def fresh_place(epoch: int, layout: Layout) -> ShardPlace:
    """The begin of an epoch."""
    return ShardPlace(epoch, [Cursor()] * layout.workers, [0] * layout.workers, layout.batches)


def _place_of(state: State) -> ShardPlace:
    passes = state["passes"]
    return ShardPlace(
        epoch=state["epoch"],
        cursors=[Cursor(*cursor) for cursor in state["cursors"].tolist()],
        done=state["done"].tolist(),
        batches=state["batches"],
        before=state["before"],
        next_worker=state["next_worker"],
        passes=None if passes is None else [[Pass.from_state(part) for part in worker] for worker in passes],
        salt=state["salt"],
    )


def _what_is_left(places: Sequence[ShardPlace], workers: int, collection: Collection) -> tuple[list[Pass], list[Visit]]:
    """(passes that go on inside a shard, visits not begun) of all readers.

    A reader in a later regular pass has seen all of its own share, and repeats another one's: it leaves nothing.
    """
    begun: list[Pass] = []
    whole: list[Visit] = []
    for rank, place in enumerate(places):
        for worker, cursor in enumerate(place.cursors):
            reader = rank + len(places) * worker
            if place.passes is None:
                passes = [collection.regular_pass(place.epoch, 0, reader, len(places) * workers)]
            else:
                passes = list(place.passes[worker])
            for turn, part in enumerate(passes):
                if part is None or turn < cursor.turn:
                    continue
                start = cursor if turn == cursor.turn and cursor != Cursor(turn) else part.start
                visits = list(part.visits)
                if start == Cursor(start.turn):
                    whole += visits
                    continue
                inside = start._replace(turn=0, visit=0, last=start.last - start.visit)
                begun.append(Pass(visits[start.visit : start.last + 1], inside))
                whole += visits[start.last + 1 :]
    return begun, whole
