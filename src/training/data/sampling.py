"""The order of the samples and their random numbers, which depend on (seed, epoch, sample) only.

The order of an epoch is one permutation for all ranks, of which rank r of W takes every W-th element. With the same
global batch size, a step therefore has the same samples on any number of ranks, and the read position is one number.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler, get_worker_info


def stable_hash(*parts: object) -> int:
    """Return a 63-bit hash of the text of the parts, which is the same in every process and on every host."""
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@contextmanager
def sample_rng(*key: object) -> Iterator[None]:
    """Seed the CPU generators of Python, NumPy and torch from `key`, and restore them afterwards.

    The random numbers of a transform then depend on the sample, and not on the worker, the rank or earlier samples.
    In a data loader worker the states are not restored, because nothing else there draws random numbers. That takes
    about 10 us instead of 60.
    """
    in_worker = get_worker_info() is not None
    states = None if in_worker else (random.getstate(), np.random.get_state(), torch.random.get_rng_state())
    seed = stable_hash(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # torch.manual_seed would seed the accelerators as well
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.random.set_rng_state(states[2])


class SharedEpoch:
    """The epoch in shared memory, so persistent workers see a new epoch without a restart."""

    def __init__(self, epoch: int = 0) -> None:
        self.shared_epoch = torch.tensor(epoch, dtype=torch.int64).share_memory_()

    def set_value(self, epoch: int) -> None:
        self.shared_epoch.fill_(epoch)

    def get_value(self) -> int:
        return int(self.shared_epoch)


class SampleRef(NamedTuple):
    """What a sampler sends to a worker. It includes the epoch, because workers prefetch and may see a new one late."""

    row: int
    epoch: int


NO_ROWS = torch.empty(0, dtype=torch.int32)


class TrainSampler(Sampler[list[SampleRef]]):
    """The batches of this rank from `num_samples` samples, shuffled by (seed, epoch).

    The last incomplete global batch is dropped.

    Attributes:
        rest: int32, rows that a resumed run reads first.
        start: index in the order of the epoch of the first row that it reads after these.
    """

    def __init__(
        self, num_samples: int, batch_size: int, rank: int, world_size: int, seed: int, epoch: int = 0
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = epoch
        self.rest = NO_ROWS
        self.start = 0

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples // self.global_batch

    def __iter__(self) -> Iterator[list[SampleRef]]:
        epoch, unread = self.epoch, NO_ROWS
        for part in self.parts():
            unread = torch.cat([unread, part]) if len(unread) else part
            for start in range(0, len(unread) - self.global_batch + 1, self.global_batch):
                mine = unread[start : start + self.global_batch][self.rank :: self.world_size]
                yield [SampleRef(row, epoch) for row in mine.tolist()]
            unread = unread[len(unread) // self.global_batch * self.global_batch :]

    def order(self) -> torch.Tensor:
        """Return the order of the epoch: int64 [num_samples]."""
        generator = torch.Generator().manual_seed(stable_hash("order", self.seed, self.epoch))
        return torch.randperm(self.num_samples, generator=generator)

    def parts(self) -> Iterator[torch.Tensor]:
        """Yield the rows that all ranks read, in order, in parts of any size."""
        rest, order = self.rest, self.order()[self.start :]
        yield rest
        yield order

    def position_after_batch(self, start: int, rest: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Return (start, rest) after the next global batch; see the attributes of these names."""
        return start + max(0, self.global_batch - len(rest)), rest[self.global_batch :]


class EvalSampler(Sampler[list[SampleRef]]):
    """The batches of this rank, in order. All ranks together read every sample once; lengths may differ by one."""

    def __init__(self, num_samples: int, batch_size: int, rank: int, world_size: int) -> None:
        self.rows = range(rank, num_samples, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for start in range(0, len(self.rows), self.batch_size):
            yield [SampleRef(row, 0) for row in self.rows[start : start + self.batch_size]]
