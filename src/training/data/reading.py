"""Which samples of which shards a reader gives, in which order, and how it goes on from any of them.

A reader goes through passes; a pass is a list of visits to shards; the samples of a pass are shuffled block by block. A
place between two samples is a `Cursor`, six numbers. From it, a reader opens the shard in which the block begins, goes
to the block's first sample (one seek in a local tar), and reads the block anew: what it reads to begin is never more
than one block, as much as in a cold start, wherever in an epoch it is.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from training.data.sampling import stable_hash
from training.data.shards import CAPTION_KEY, IMAGE_KEYS, Sample, find_unsorted, read_shard, unsorted_shard, unusable
from training.data.skips import BAD_IN_A_ROW, BAD_SHARDS, BadSample, NoUsableSamples, SkipCounter, Streak

# A block is full with so many samples, or with so many bytes of them. The next one is read while one is given out, so
# that a reader holds about one block (still encoded), and at most two.
BLOCK_SAMPLES = 2048
BLOCK_BYTES = 1 << 28

_WANTED = frozenset((CAPTION_KEY, *IMAGE_KEYS))


class Visit(NamedTuple):
    """One reading of a shard: of its samples those at positions share, share + shares, ... .

    number: tells repeated visits of an epoch apart, so that a sample that comes again is augmented anew.
    """

    shard: int
    share: int = 0
    shares: int = 1
    number: int = 0


class Cursor(NamedTuple):
    """The place before a sample.

    turn: the pass. visit: of the pass, in which the block begins, at sample number `sample` of the shard and at byte
    `offset` of the tar. taken: how many samples of the shuffled block came before. last: the visit in which the block
    ends (where none of it is taken: that in which it begins).
    """

    turn: int = 0
    visit: int = 0
    sample: int = 0
    offset: int = 0
    taken: int = 0
    last: int = 0


BEGIN = Cursor()


@dataclass
class Pass:
    """Visits in order, with the place in them to begin at (its `turn` does not matter)."""

    visits: Iterable[Visit]
    start: Cursor = BEGIN

    def to_state(self) -> dict[str, torch.Tensor]:
        visits = torch.tensor(list(self.visits), dtype=torch.int32).reshape(-1, len(Visit._fields))
        return {"visits": visits, "start": torch.tensor(self.start)}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Pass:
        return cls([Visit(*visit) for visit in state["visits"].tolist()], Cursor(*state["start"].tolist()))


@dataclass(frozen=True)
class Collection:
    """The shards, and how an epoch goes through them.

    endless: in training, passes follow one another, shuffled; in evaluation there is one, in order. resampled: shards
    are drawn with replacement, with probabilities proportional to `weights`. sizes: samples by shard, where known.
    alone: there is one rank.
    """

    urls: Sequence[str]
    seed: int
    endless: bool
    resampled: bool = False
    weights: Sequence[float] | None = None
    sizes: Mapping[str, int] | None = None
    alone: bool = True

    def streak(self, source: str) -> Streak:
        """Tells useless data, in one reader's stream of samples."""
        limit = BAD_IN_A_ROW if self.endless or self.alone else None
        return Streak(source, limit, min(BAD_SHARDS, len(self.urls)), endless=self.endless)

    def regular_pass(self, epoch: int, turn: int, reader: int, readers: int, salt: int = 0) -> Pass | None:
        """Pass number `turn` of one reader among so many; None where there is no such pass.

        Each shard goes to one reader; where there are fewer shards than readers, every reader goes through all of them
        and takes each N-th sample. In the next pass a reader has another one's share: after N passes it has met
        everything that there is. `salt`: other draws of a resampled collection.
        """
        if self.resampled:
            return Pass(self._draws(epoch, reader, readers, salt)) if turn == 0 else None
        if not self.endless and turn > 0:
            return None
        order = list(range(len(self.urls)))
        if self.endless:
            random.Random(stable_hash("shards", self.seed, epoch, turn // readers)).shuffle(order)
        share = (reader + turn) % readers
        if len(order) < readers:
            return Pass([Visit(shard, (share + n) % readers, readers, turn) for n, shard in enumerate(order)])
        return Pass([Visit(shard, number=turn) for shard in order[share::readers]])

    def _draws(self, epoch: int, reader: int, readers: int, salt: int) -> Iterator[Visit]:
        key = ("draws", self.seed, reader, readers, salt) if salt else ("draws", self.seed, reader, readers)
        rng = random.Random(stable_hash("resampled", stable_hash(*key), epoch))
        cumulative = None if self.weights is None else list(itertools.accumulate(self.weights))
        for number in itertools.count():
            yield Visit(rng.choices(range(len(self.urls)), cum_weights=cumulative)[0], number=number)


class _Found(NamedTuple):
    """A sample, where it is from (visit of the pass, position in the shard, offset in the tar), and its bytes."""

    sample: Sample
    visit: int
    position: int
    offset: int
    size: int


class _Block:
    """Consecutive samples of a stream, until it is full."""

    def __init__(self, stream: Iterator[_Found]) -> None:
        self.stream = stream
        self.items: list[_Found] = []
        self.bytes = 0

    def add(self) -> bool:
        """Takes the stream's next sample; whether there was one, and room for it."""
        if len(self.items) >= BLOCK_SAMPLES or self.bytes >= BLOCK_BYTES:
            return False
        item = next(self.stream, None)
        if item is not None:
            self.items.append(item)
            self.bytes += item.size
        return item is not None

    def fill(self) -> None:
        while self.add():
            pass

    def take(self, number: int) -> Sample:
        """One of the samples, which the block then no longer holds."""
        item = self.items[number]
        self.items[number] = item._replace(sample={})
        return item.sample

    def start(self, turn: int) -> Cursor:
        """The place before the block."""
        first = self.items[0]
        return Cursor(turn, first.visit, first.position, first.offset, 0, first.visit)


class Reader:
    """The usable samples of passes, still encoded, each with the cursor behind it.

    passes: number -> pass, None behind the last one. A sample is a dict of `training.data.shards.read_shard` with
    "__shard__" and "__visit__", the numbers of its shard and visit. order_key: what the order within blocks depends on
    beside the block's place. Bad samples and shards are counted and left out.
    """

    def __init__(
        self,
        collection: Collection,
        passes: Callable[[int], Pass | None],
        order_key: tuple[object, ...],
        source: str,
        skipped: SkipCounter,
    ) -> None:
        self.collection = collection
        self.passes = passes
        self.order_key = order_key
        self.skipped = skipped
        self.streak = collection.streak(source)

    def samples(self, start: Cursor, give_up_after: int | None) -> Iterator[tuple[Sample, Cursor]]:
        """From `start` on. `give_up_after`: that many passes without any sample are an error.

        Raises:
            NoUsableSamples: see `Streak`.
        """
        for turn in itertools.count(start.turn):
            found = self.passes(turn)
            if found is None:
                return
            begin = start if turn == start.turn and start != Cursor(turn) else found.start
            stream = self._stream(found.visits, begin)
            if self.collection.endless:
                yield from self._shuffled(stream, turn, begin)
            else:
                yield from ((item.sample, Cursor(turn)) for item in stream)
            if give_up_after is not None and turn + 1 >= give_up_after and not self.streak.any_good:
                raise self.streak.error()

    def _shuffled(self, stream: Iterator[_Found], turn: int, begin: Cursor) -> Iterator[tuple[Sample, Cursor]]:
        """Block after block of the stream, each in an order of its own."""
        block, taken = _Block(stream), begin.taken
        block.fill()
        while block.items:
            first = block.start(turn)
            order = self._order(block)
            following = _Block(stream)
            for number in range(taken, len(order)):
                # one in, one out; two where a resumed block begins in its middle
                while len(following.items) <= number and following.add() and len(following.items) % 2:
                    pass
                if number + 1 < len(order):
                    behind = first._replace(taken=number + 1, last=block.items[-1].visit)
                else:
                    behind = following.start(turn) if following.items else Cursor(turn + 1)
                yield block.take(order[number]), behind
            following.fill()
            block, taken = following, 0

    def _order(self, block: _Block) -> list[int]:
        first = block.items[0]
        place = (first.sample["__shard__"], first.sample["__visit__"], first.position)
        order = list(range(len(block.items)))
        random.Random(stable_hash("block", *self.order_key, *place)).shuffle(order)
        return order

    def _stream(self, visits: Iterable[Visit], begin: Cursor) -> Iterator[_Found]:
        for number, visit in enumerate(visits):
            if number < begin.visit:
                continue
            sample, offset = (begin.sample, begin.offset) if number == begin.visit else (0, 0)
            for position, found in self._visit(visit, sample, offset):
                size = sum(len(value) for value in found.values() if isinstance(value, bytes))
                yield _Found(found, number, position, found["__offset__"], size)

    def _visit(self, visit: Visit, position: int, offset: int) -> Iterator[tuple[int, Sample]]:
        """The usable samples of a shard that are this visit's, with their positions among all of the shard."""
        url = self.collection.urls[visit.shard]
        counts_shard = visit.share == 0  # one of those who share it does
        if counts_shard:
            self.skipped.opened()
        is_unsorted = False
        try:
            for sample in read_shard(url, _WANTED, offset, is_begin=position == 0):
                position += 1
                if "__apart__" in sample:  # its first part is counted
                    if counts_shard and not is_unsorted:
                        self._add(unsorted_shard(sample), visit.shard)
                    is_unsorted = True
                    continue
                if (position - 1 - visit.share) % visit.shares:
                    continue
                if (bad := unusable(sample)) is not None:
                    self._add(bad, visit.shard)
                    continue
                self.streak.good()
                sample["__shard__"], sample["__visit__"] = visit.shard, visit.number
                yield position - 1, sample
        except BadSample as bad:
            if counts_shard:
                self._add(bad, visit.shard)
            else:
                self.streak.add(bad, visit.shard)
        expected = (self.collection.sizes or {}).get(url, 0)
        if counts_shard and position < expected:
            lost = BadSample("lost_sample", url, f"it has {position} samples of the {expected} that sizes.json says")
            self.skipped.add(lost, visit.shard, expected - position)

    def _add(self, bad: BadSample, shard: int) -> None:
        self.skipped.add(bad, shard)
        try:
            self.streak.add(bad, shard)
        except NoUsableSamples:
            # The run ends. If the captions are elsewhere in the shard, say so.
            self.streak.first = find_unsorted(self.collection.urls[shard]) or self.streak.first
            raise self.streak.error() from bad
