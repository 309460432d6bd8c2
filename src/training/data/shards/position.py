"""The read position in shards; see `training.data.position`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from training.data.bucketing import LengthBuckets
from training.data.position import EpochState, OtherSteps, Position, StateDict
from training.data.sampling import SharedEpoch
from training.data.shards.reader import ReadPosition, ShardPlan, ShardRead, ShardSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReaderLayout:
    """The readers of the shards: the workers of all ranks.

    Args:
        rank: this rank.
        world_size: the number of ranks.
        workers: per rank; 1 if the main process reads.
        batch_size: per rank.
        batches: of an epoch, per rank.
    """

    rank: int
    world_size: int
    workers: int
    batch_size: int
    batches: int

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    @property
    def readers(self) -> int:
        return self.world_size * self.workers

    def reader(self, worker: int) -> int:
        """Return the number of the reader that is this rank's worker `worker`."""
        return self.rank + self.world_size * worker

    def state_dict(self) -> StateDict:
        return {
            "world_size": self.world_size,
            "workers": self.workers,
            "batch_size": self.batch_size,
            "batches": self.batches,
        }


@dataclass
class ShardState(EpochState):
    """How far this rank's readers have read an epoch, or the rest of an epoch that another layout started.

    Lists have one entry per worker.

    Attributes:
        positions: after the last batch of each worker.
        batches_read: of each worker.
        batches: that this rank reads in total.
        samples_before: samples that all ranks read in earlier parts of the epoch, with other layouts.
        next_worker: the worker whose batch is the next.
        plans: what each worker reads, if that differs from `ShardSet.plan`.
        draw_key: see `ShardSet.plan`.
    """

    positions: list[ReadPosition]
    batches_read: list[int]
    batches: int
    samples_before: int = 0
    next_worker: int = 0
    plans: list[list[ShardPlan]] | None = None
    draw_key: int = 0

    @classmethod
    def at_start(cls, epoch: int, layout: ReaderLayout) -> ShardState:
        return cls(epoch, [ReadPosition()] * layout.workers, [0] * layout.workers, layout.batches)

    @classmethod
    def from_state_dict(cls, state: StateDict) -> ShardState:
        plans = state["passes"]
        return cls(
            epoch=state["epoch"],
            positions=[ReadPosition(*position) for position in state["cursors"].tolist()],
            batches_read=state["done"].tolist(),
            batches=state["batches"],
            samples_before=state["before"],
            next_worker=state["next_worker"],
            plans=None if plans is None else [[ShardPlan.from_state(plan) for plan in worker] for worker in plans],
            draw_key=state["salt"],
        )

    def state_dict(self) -> StateDict:
        """Return the state under the names that existing checkpoints have."""
        plans = self.plans
        return {
            "epoch": self.epoch,
            "cursors": torch.tensor(self.positions),
            "done": torch.tensor(self.batches_read),
            "batches": self.batches,
            "before": self.samples_before,
            "next_worker": self.next_worker,
            "passes": None if plans is None else [[plan.to_state() for plan in worker] for worker in plans],
            "salt": self.draw_key,
        }

    def remaining_batches(self, worker: int) -> int:
        """Return how many batches a worker still has to make. The workers make batches in turn."""
        return -(-(self.batches - worker) // len(self.positions)) - self.batches_read[worker]


@dataclass
class ResumeRequest:
    """Tells the data set, and its copies in the workers, at which position the next epoch starts.

    Workers get `state` when they start. They see in shared memory whether it still applies.
    """

    state: ShardState | None = None
    is_pending: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.bool).share_memory_())

    def pending_state(self) -> ShardState | None:
        return self.state if bool(self.is_pending) else None


class ShardPosition(Position[ShardState]):
    """The position in shards."""

    def __init__(
        self, shards: ShardSet, layout: ReaderLayout, shared_epoch: SharedEpoch, resume: ResumeRequest, source: str
    ) -> None:
        super().__init__(source)
        self.shards = shards
        self.layout = layout
        self.shared_epoch = shared_epoch
        self.resume = resume

    @property
    def may_end_early(self) -> bool:
        return self._current is not None and self._current.plans is not None

    def record_batch(self, after: Any) -> None:
        assert self._current is not None
        worker, *position = after
        self._current.positions[worker] = ReadPosition(*position)
        self._current.batches_read[worker] += 1
        self._current.next_worker = (worker + 1) % self.layout.workers

    def _epoch(self) -> int:
        return self.shared_epoch.get_value()

    def _set_epoch(self, epoch: int) -> None:
        self.shared_epoch.set_value(epoch)

    def _initial_state(self, epoch: int) -> ShardState:
        return ShardState.at_start(epoch, self.layout)

    def _start(self, state: ShardState, is_resumed: bool) -> None:
        self.resume.is_pending.fill_(is_resumed)
        if is_resumed:
            # A copy, because without workers the data set would see the changes that `record_batch` makes.
            self.resume.state = replace(state, positions=list(state.positions), batches_read=list(state.batches_read))

    def _to_state_dict(self, state: ShardState) -> StateDict:
        return {
            "form": "shards",
            "seed": self.shards.seed,
            "size": len(self.shards.urls),
            "resampled": self.shards.resampled,
            "layout": self._layout_state(),
            **state.state_dict(),
        }

    def _from_state_dicts(self, states: Sequence[StateDict]) -> ShardState:
        if all(state["layout"] == self._layout_state() for state in states):
            return ShardState.from_state_dict(states[self.layout.rank])
        return self._rest_of_epoch(states)

    def _layout_state(self) -> StateDict:
        buckets = self.shards.buckets
        return self.layout.state_dict() | ({} if buckets is None else {"buckets": buckets.to_state()})

    def _rest_of_epoch(self, states: Sequence[StateDict]) -> ShardState:
        """Return this rank's part of the rest of an epoch that another layout of readers started."""
        epoch, old_batch_size = states[0]["epoch"], states[0]["layout"]["batch_size"]
        old_states = [ShardState.from_state_dict(state) for state in states]
        if "schedule" in states[0]["layout"] and any(map(_has_started, states)):
            raise OtherSteps(
                f"The checkpoint is from within epoch {epoch}, whose steps have different sizes "
                "(--naflex-variable-batch). Resume with this option, or from the end of an epoch."
            )
        samples_read = old_states[0].samples_before + sum(sum(old.batches_read) for old in old_states) * old_batch_size
        rest = self._initial_state(epoch)
        if samples_read == 0:
            return rest
        rest.samples_before = samples_read
        total = self.layout.batches * self.layout.global_batch
        rest.batches = max(0, total - samples_read) // self.layout.global_batch
        if all(sum(old.batches_read) >= old.batches for old in old_states):
            rest.batches = 0
        if self.shards.resampled:
            rest.draw_key = samples_read
            return rest
        partial, unread = _remaining_reads(old_states, states[0]["layout"], self.shards)
        rest.plans = []
        for worker in range(self.layout.workers):
            reader = self.layout.reader(worker)
            plans = partial[reader :: self.layout.readers]
            # Readers without a partly read shard are the first to get an unread one.
            reads = unread[(reader - len(partial)) % self.layout.readers :: self.layout.readers]
            rest.plans.append([*plans, ShardPlan(reads)] if reads else plans)
        logger.info(
            "Epoch %d continues with other readers than it started with: %d samples have been read, and at most %d "
            "batches per rank are left. See training.data.position.", epoch, samples_read, rest.batches,
        )  # fmt: skip
        return rest


class VariableShardPosition(ShardPosition):
    """The position in shards if steps have different sizes. It applies to the same readers and the same schedule.

    Args:
        schedule: a number that is the same for equal schedules.
        others: as in ShardPosition.
    """

    def __init__(self, *args: Any, schedule: int) -> None:
        super().__init__(*args)
        self.schedule = schedule

    def _layout_state(self) -> StateDict:
        return {**super()._layout_state(), "schedule": self.schedule}

    def _rest_of_epoch(self, states: Sequence[StateDict]) -> ShardState:
        rest = self._initial_state(states[0]["epoch"])
        if any(map(_has_started, states)):
            raise OtherSteps(
                f"--naflex-variable-batch: the checkpoint is from within epoch {rest.epoch} of a run with other "
                "processes, --workers, --naflex or --bucket options, so its steps have other samples. Resume with the "
                "same ones, or from the end of an epoch."
            )
        return rest


def _has_started(state: StateDict) -> bool:
    return bool(state["before"]) or bool(state["done"].any())


def _remaining_reads(
    states: Sequence[ShardState], layout: StateDict, shards: ShardSet
) -> tuple[list[ShardPlan], list[ShardRead]]:
    """Return (plans that continue in a partly read block, shard reads that have not started) of all readers.

    `layout` is that of the readers. A reader after its first regular plan has read its part completely and repeats
    another one: it leaves nothing.
    """
    buckets = LengthBuckets.from_state(layout.get("buckets"))
    partial: list[ShardPlan] = []
    unread: list[ShardRead] = []
    for rank, state in enumerate(states):
        for worker, position in enumerate(state.positions):
            reader = rank + len(states) * worker
            if state.plans is None:
                plans = [shards.plan(state.epoch, 0, reader, len(states) * layout["workers"])]
            else:
                plans = list(state.plans[worker])
            for number, plan in enumerate(plans):
                if plan is None or number < position.plan:
                    continue
                is_started = number == position.plan and position != ReadPosition(number)
                start = position if is_started else plan.start
                reads = list(plan.reads)
                if start == ReadPosition(start.plan):
                    unread += reads
                    continue
                plan_start = start._replace(plan=0, read=0, last_read=start.last_read - start.read)
                block_reads = reads[start.read : start.last_read + 1]
                partial.append(ShardPlan(block_reads, plan_start, plan.buckets_of(start, buckets)))
                unread += reads[start.last_read + 1 :]
    return partial, unread
