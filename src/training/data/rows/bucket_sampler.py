"""The order of rows with length bucketing; see `training.data.bucketing`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch

from training.data.bucketing import CaptionLengths, LengthBuckets
from training.data.sampling import TrainSampler, stable_hash


class Captions(Protocol):
    """A data set that has captions without their images."""

    def __len__(self) -> int: ...

    def caption_at(self, index: int) -> str: ...


class RowLengths:
    """The lengths of the captions of a data set, each computed when it is first needed: 25 us with SimpleTokenizer."""

    def __init__(self, dataset: Captions, tokenizer: Any) -> None:
        self.dataset = dataset
        self.lengths_of = CaptionLengths(tokenizer)
        self.known = np.full(len(dataset), -1, dtype=np.int32)

    def of_rows(self, rows: np.ndarray) -> list[int]:
        new = rows[self.known[rows] < 0]
        self.known[new] = self.lengths_of([self.dataset.caption_at(row) for row in new.tolist()])
        return self.known[rows].tolist()


class BucketSampler(TrainSampler):
    """A `TrainSampler` whose order is sorted by length, pool by pool.

    The pools and batches are those of all ranks together. So the same global batch has the same samples on any number
    of ranks, and all ranks have equal work.
    """

    def __init__(
        self, num_samples: int, batch_size: int, rank: int, world_size: int, seed: int, epoch: int = 0,
        *, buckets: LengthBuckets, lengths: RowLengths,
    ) -> None:  # fmt: skip
        super().__init__(num_samples, batch_size, rank, world_size, seed, epoch)
        self.buckets = buckets
        self.lengths = lengths
        self._pools: dict[int, torch.Tensor] = {}  # those that the data loader has, by their start in the order

    def parts(self) -> Iterator[torch.Tensor]:
        rest, order, epoch, first = self.rest, self.order().to(torch.int32), self.epoch, self.start
        self._pools.clear()
        yield rest
        for start in range(first, self.num_samples, self.buckets.pool):
            rows = order[start : start + self.buckets.pool]
            rng = random.Random(stable_hash("buckets", self.seed, epoch, start))
            self._pools[start] = rows[self.buckets.order(self.lengths.of_rows(rows.numpy()), rng)]
            yield self._pools[start]

    def position_after_batch(self, start: int, rest: torch.Tensor) -> tuple[int, torch.Tensor]:
        while len(rest) < self.global_batch:
            pool = self._pools.pop(start)
            start, rest = start + len(pool), torch.cat([rest, pool])
        return start, rest[self.global_batch :]
