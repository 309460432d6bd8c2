"""The order in which samples are read from shards, and how reading continues from any position.

How the samples of one shard get into a batch. A reader is one worker process of one rank (`ReaderLayout`):

    ShardSet                     all shards, with the seed and the weights
      .plan(epoch, number, reader, readers)
    ShardPlan                    the shards that this reader reads, in order; the next plan follows when it is read
      ShardRead                  one reading of one shard: all of its samples, or every N-th one
        samples.read_shard       tar members -> samples of encoded bytes; damage raises BadSample at the end
    ShardReader
      ._usable_samples           drops and counts bad samples; BadStreak ends the run after too many in a row
      ._stream                   the usable samples of all reads of a plan
      ._shuffled                 blocks of 2,048 samples, each shuffled by (seed, epoch, position of the block), and
                                 with length bucketing then sorted, pool by pool (data.bucketing)
      .samples                   (sample, ReadPosition after it)
    dataset.ShardBatches         decodes images and captions, and groups samples into ShardBatch(samples, after)
    data.loader.Loader           moves batches to the training process, takes `after` out of each one, and calls
    position.ShardPosition       .record_batch(after): what state_dict saves, one ReadPosition per worker
                                 .load_state_dict -> ResumeRequest (in shared memory): where ShardBatches starts next

To resume at a ReadPosition, a reader opens the shard in which the block starts, seeks to the first sample of the block
(one seek in a local tar), and reads the block again. So it reads at most one block before the first sample, as in a
cold start, wherever in the epoch the position is.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from training.data.bucketing import LengthBuckets
from training.data.sampling import stable_hash
from training.data.shards.pairs import DEFAULT_MEMBERS, PairMembers
from training.data.shards.samples import Sample, find_unsorted, read_shard, unsorted_shard, why_unusable
from training.data.skips import BAD_IN_A_ROW, BAD_SHARDS, BadSample, BadStreak, NoUsableSamples, SkipCounter

# The limits of a block, in samples (rounded up to whole pools of length bucketing) and in bytes. The next block is read
# while one is consumed, so a reader holds about one block of encoded samples, and two at most.
BLOCK_SAMPLES = 2048
BLOCK_BYTES = 1 << 28


class ShardRead(NamedTuple):
    """One reading of a shard: of its samples those at positions part, part + parts, ... .

    `read_id` distinguishes repeated readings in an epoch, so that a repeated sample is augmented differently.
    """

    shard: int
    part: int = 0
    parts: int = 1
    read_id: int = 0


class ReadPosition(NamedTuple):
    """The position of a reader before a sample.

    Checkpoints store the values without names, so their order must not change.

    Attributes:
        plan: number of the plan.
        read: index in the plan of the shard read in which the block starts.
        sample: index in the shard of the block's first sample.
        offset: byte offset of that sample in the tar.
        taken: how many samples of the shuffled block have been taken.
        last_read: index of the shard read in which the block ends; that in which it starts if nothing is taken.
    """

    plan: int = 0
    read: int = 0
    sample: int = 0
    offset: int = 0
    taken: int = 0
    last_read: int = 0


START = ReadPosition()


@dataclass
class ShardPlan:
    """Shard reads in order, and the position at which to start in them.

    Attributes:
        reads: the shard reads.
        start: the position; its `plan` is not used.
        buckets: how another layout of readers sorted the block in which `start` is, if it read a part of it.
    """

    reads: Iterable[ShardRead]
    start: ReadPosition = START
    buckets: LengthBuckets | None = None

    def buckets_of(self, block: ReadPosition, regular: LengthBuckets | None) -> LengthBuckets | None:
        """Return how a block is sorted that starts at `block`: as its first readers did, otherwise by `regular`."""
        is_continued = self.start.taken > 0 and block[1:4] == self.start[1:4]
        return self.buckets if is_continued else regular

    def to_state(self) -> dict[str, Any]:
        """Return the plan as tensors and numbers, under the names that existing checkpoints have."""
        reads = torch.tensor(list(self.reads), dtype=torch.int32).reshape(-1, len(ShardRead._fields))
        buckets = {} if self.buckets is None else {"buckets": self.buckets.to_state()}
        return {"visits": reads, "start": torch.tensor(self.start), **buckets}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ShardPlan:
        reads = [ShardRead(*read) for read in state["visits"].tolist()]
        buckets = LengthBuckets.from_state(state.get("buckets"))
        return cls(reads, ReadPosition(*state["start"].tolist()), buckets)


@dataclass(frozen=True)
class ShardSet:
    """The shards of a data set, and the plans by which an epoch reads them.

    Args:
        urls: the shards.
        seed: of the order.
        endless: True in training: plans follow one another, shuffled. In evaluation there is one plan, in order.
        resampled: whether shards are drawn with replacement.
        weights: probabilities of the draws, up to a common factor.
        sizes: samples by shard, where known.
        single_rank: whether there is only one rank.
        members: the members of a sample that are its image and its caption.
        buckets: how the samples of a block are sorted in training; None for the shuffled order.
    """

    urls: Sequence[str]
    seed: int
    endless: bool
    resampled: bool = False
    weights: Sequence[float] | None = None
    sizes: Mapping[str, int] | None = None
    single_rank: bool = True
    members: PairMembers = DEFAULT_MEMBERS
    buckets: LengthBuckets | None = None

    def bad_streak(self, source: str) -> BadStreak:
        """Return the detector of useless data for the samples of one reader."""
        limit = BAD_IN_A_ROW if self.endless or self.single_rank else None
        return BadStreak(source, limit, min(BAD_SHARDS, len(self.urls)), endless=self.endless)

    def plan(self, epoch: int, number: int, reader: int, readers: int, draw_key: int = 0) -> ShardPlan | None:
        """Return plan `number` of reader `reader` of `readers`, or None if there is no such plan.

        Each shard is read by one reader. If there are fewer shards than readers, every reader reads all shards and
        takes every N-th sample. In the next plan a reader gets the part of another one, so after N plans it has read
        everything. `draw_key` changes the draws of a resampled set.
        """
        if self.resampled:
            return ShardPlan(self._draws(epoch, reader, readers, draw_key)) if number == 0 else None
        if not self.endless and number > 0:
            return None
        order = list(range(len(self.urls)))
        if self.endless:
            random.Random(stable_hash("shards", self.seed, epoch, number // readers)).shuffle(order)
        part = (reader + number) % readers
        if len(order) < readers:
            return ShardPlan([ShardRead(shard, (part + n) % readers, readers, number) for n, shard in enumerate(order)])
        return ShardPlan([ShardRead(shard, read_id=number) for shard in order[part::readers]])

    def _draws(self, epoch: int, reader: int, readers: int, draw_key: int) -> Iterator[ShardRead]:
        key = ("draws", self.seed, reader, readers, draw_key) if draw_key else ("draws", self.seed, reader, readers)
        rng = random.Random(stable_hash("resampled", stable_hash(*key), epoch))
        cumulative = None if self.weights is None else list(itertools.accumulate(self.weights))
        for number in itertools.count():
            yield ShardRead(rng.choices(range(len(self.urls)), cum_weights=cumulative)[0], read_id=number)


class _StreamItem(NamedTuple):
    """A sample of a plan, with the index of its shard read, its index and byte offset in the shard, and its bytes."""

    sample: Sample
    read: int
    sample_index: int
    offset: int
    size: int


class _Block:
    """Consecutive samples of a stream, up to the limits of a block."""

    def __init__(self, stream: Iterator[_StreamItem], buckets: LengthBuckets | None) -> None:
        self.stream = stream
        self.buckets = buckets
        pool = 1 if buckets is None else buckets.pool
        self.samples = -(-BLOCK_SAMPLES // pool) * pool
        self.items: list[_StreamItem] = []
        self.bytes = 0

    def add_next(self) -> bool:
        """Add the next sample of the stream. Return False if the block is full or the stream has ended."""
        if len(self.items) >= self.samples or self.bytes >= BLOCK_BYTES:
            return False
        item = next(self.stream, None)
        if item is not None:
            self.items.append(item)
            self.bytes += item.size
        return item is not None

    def fill(self) -> None:
        while self.add_next():
            pass

    def take(self, number: int) -> Sample:
        """Return a sample and free its memory in the block."""
        item = self.items[number]
        self.items[number] = item._replace(sample={})
        return item.sample

    def start(self, plan: int) -> ReadPosition:
        """Return the position before the block."""
        first = self.items[0]
        return ReadPosition(plan, first.read, first.sample_index, first.offset, 0, first.read)


class ShardReader:
    """The usable samples of a reader's plans, encoded, each with the read position after it.

    A sample is a dict of `samples.read_shard` with "__shard__" and "__read_id__" of its shard read. Bad
    samples and shards are counted and dropped.

    Args:
        shards: the data set.
        get_plan: returns plan number N, None after the last one.
        order_key: what the order in a block depends on, in addition to the position of the block.
        source: name of the data for messages.
        skipped: counts bad samples.
        lengths: returns the lengths of the samples' captions, for `LengthBuckets`.
    """

    def __init__(
        self,
        shards: ShardSet,
        get_plan: Callable[[int], ShardPlan | None],
        order_key: tuple[object, ...],
        source: str,
        skipped: SkipCounter,
        lengths: Callable[[Sequence[Sample]], list[int]],
    ) -> None:
        self.shards = shards
        self.get_plan = get_plan
        self.order_key = order_key
        self.skipped = skipped
        self.lengths = lengths
        self.streak = shards.bad_streak(source)

    def samples(self, start: ReadPosition, give_up_after: int | None) -> Iterator[tuple[Sample, ReadPosition]]:
        """Yield (sample, position after it), from `start` on.

        Args:
            start: where to start.
            give_up_after: so many plans without any usable sample are an error; None for no limit.

        Raises:
            NoUsableSamples: see `BadStreak`.
        """
        for number in itertools.count(start.plan):
            plan = self.get_plan(number)
            if plan is None:
                return
            plan_start = start if number == start.plan and start != ReadPosition(number) else plan.start
            stream = self._stream(plan.reads, plan_start)
            if self.shards.endless:
                buckets = plan.buckets_of(plan_start, self.shards.buckets)
                yield from self._shuffled(stream, number, plan_start, buckets)
            else:
                yield from ((item.sample, ReadPosition(number)) for item in stream)
            if give_up_after is not None and number + 1 >= give_up_after and not self.streak.any_good:
                raise self.streak.error()

    def _shuffled(
        self, stream: Iterator[_StreamItem], plan: int, start: ReadPosition, buckets: LengthBuckets | None
    ) -> Iterator[tuple[Sample, ReadPosition]]:
        """Yield the samples of the stream block by block, each block shuffled. `buckets` are those of the first."""
        block, taken = _Block(stream, buckets), start.taken
        block.fill()
        while block.items:
            block_start = block.start(plan)
            order = self._block_order(block)
            following = _Block(stream, self.shards.buckets)
            for number in range(taken, len(order)):
                # Add one sample to the next block for each that is taken; two if reading resumed within a block.
                while len(following.items) <= number and following.add_next() and len(following.items) % 2:
                    pass
                if number + 1 < len(order):
                    after = block_start._replace(taken=number + 1, last_read=block.items[-1].read)
                else:
                    after = following.start(plan) if following.items else ReadPosition(plan + 1)
                yield block.take(order[number]), after
            following.fill()
            block, taken = following, 0

    def _block_order(self, block: _Block) -> list[int]:
        first = block.items[0]
        block_key = (first.sample["__shard__"], first.sample["__read_id__"], first.sample_index)
        order = list(range(len(block.items)))
        rng = random.Random(stable_hash("block", *self.order_key, *block_key))
        rng.shuffle(order)
        if block.buckets is None:
            return order
        lengths = self.lengths([block.items[number].sample for number in order])
        return [order[number] for number in block.buckets.order(lengths, rng)]

    def _stream(self, reads: Iterable[ShardRead], start: ReadPosition) -> Iterator[_StreamItem]:
        for number, read in enumerate(reads):
            if number < start.read:
                continue
            index, offset = (start.sample, start.offset) if number == start.read else (0, 0)
            for sample_index, sample in self._usable_samples(read, index, offset):
                size = sum(len(value) for value in sample.values() if isinstance(value, bytes))
                yield _StreamItem(sample, number, sample_index, sample["__offset__"], size)

    def _usable_samples(self, read: ShardRead, index: int, offset: int) -> Iterator[tuple[int, Sample]]:
        """Yield (index in the shard, sample) of one shard read, from sample `index` at byte `offset` on."""
        url, members = self.shards.urls[read.shard], self.shards.members
        counts_shard = read.part == 0  # if several readers read this shard, only one of them counts it
        if counts_shard:
            self.skipped.add_shard()
        is_unsorted = False
        try:
            for sample in read_shard(url, members.extensions, offset, index == 0, members):
                index += 1
                if "__apart__" in sample:  # the second part of a sample whose first part has been counted
                    if counts_shard and not is_unsorted:
                        self._add_bad(unsorted_shard(sample), read.shard)
                    is_unsorted = True
                    continue
                if (index - 1 - read.part) % read.parts:
                    continue
                if (bad := why_unusable(sample, members)) is not None:
                    self._add_bad(bad, read.shard)
                    continue
                self.streak.add_good()
                sample["__shard__"], sample["__read_id__"] = read.shard, read.read_id
                yield index - 1, sample
        except BadSample as bad:
            if counts_shard:
                self._add_bad(bad, read.shard)
            else:
                self.streak.add_bad(bad, read.shard)
        expected = (self.shards.sizes or {}).get(url, 0)
        if counts_shard and index < expected:
            lost = BadSample("lost_sample", url, f"it has {index} samples, and sizes.json says {expected}")
            self.skipped.add_bad(lost, read.shard, expected - index)

    def _add_bad(self, bad: BadSample, shard: int) -> None:
        self.skipped.add_bad(bad, shard)
        try:
            self.streak.add_bad(bad, shard)
        except NoUsableSamples:
            # The run ends. If the captions are elsewhere in the shard, name that as the cause.
            self.streak.first = find_unsorted(self.shards.urls[shard], self.shards.members) or self.streak.first
            raise self.streak.error() from bad
