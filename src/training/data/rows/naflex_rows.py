"""Rows with planned shapes: the samples of each step, and the read position of steps of different sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from training.data.loader import Collate
from training.data.naflex import SLOT, PlannedCollate, PlannedTransform
from training.data.naflex_plan import Slot, StepPlan, VariablePlan
from training.data.position import EpochState, OtherSteps, Position, StateDict
from training.data.sampling import NO_ROWS, SampleRef, TrainSampler, stable_hash


class SlotRef(NamedTuple):
    """What a sampler sends to a worker: the sample, and its slot in the step."""

    ref: SampleRef
    slot: Slot


class PlannedSamples(Dataset):
    """Samples in the shape of their slots.

    Args:
        samples: the data set, indexed by SampleRef.
        transform: the transform of its images.
    """

    def __init__(self, samples: Any, transform: PlannedTransform) -> None:
        self.samples = samples
        self.transform = transform

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "samples" not in vars(self):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.samples, name)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: SlotRef) -> dict[str, Any]:
        self.transform.place(item.slot)
        return {**self.samples[item.ref], SLOT: item.slot}


class PlannedSampler(Sampler[list[SlotRef]]):
    """The steps of this rank, from a sampler of batches and the plan of a constant batch."""

    def __init__(self, sampler: TrainSampler, plan: StepPlan) -> None:
        self.sampler = sampler
        self.plan = plan

    def __len__(self) -> int:
        return min(len(self.sampler), self.plan.num_steps(self.sampler.num_samples))

    def __iter__(self) -> Iterator[list[SlotRef]]:
        epoch = self.sampler.epoch
        samples_read = self.sampler.start - len(self.sampler.rest)
        first = samples_read // (self.sampler.batch_size * self.sampler.world_size)
        for step, refs in zip(range(first, len(self)), self.sampler, strict=False):
            yield [SlotRef(*pair) for pair in zip(refs, self.plan.slots(epoch, step), strict=True)]


class VariableSampler(Sampler[list[SlotRef]]):
    """The steps of this rank, of different sizes. A resumed run starts at step `start`.

    Args:
        sampler: has the order of the rows.
        plan: has the sizes.
        order_key: what the order depends on besides the seed and the epoch.
    """

    def __init__(self, sampler: TrainSampler, plan: VariablePlan, order_key: object = None) -> None:
        self.sampler = sampler
        self.plan = plan
        self.order_key = order_key
        self.start = 0

    @property
    def epoch(self) -> int:
        return self.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def fingerprint(self) -> int:
        """Return a number that is the same for samplers whose steps have the same samples."""
        return stable_hash(self.plan.fingerprint(), self.order_key)

    def __len__(self) -> int:
        return len(self.plan.schedule)

    def __iter__(self) -> Iterator[list[SlotRef]]:
        epoch, ranks_count = self.epoch, self.plan.world_size
        parts, unread = self.sampler.parts(), NO_ROWS
        first = self.plan.samples_before(epoch, self.start)
        for step in range(self.start, len(self)):
            slots = self.plan.slots(epoch, step)
            end = first + len(slots) * ranks_count
            while len(unread) < end:
                unread = torch.cat([unread, next(parts)])
            rows = unread[first:end][self.sampler.rank :: ranks_count].tolist()
            yield [SlotRef(SampleRef(row, epoch), slot) for row, slot in zip(rows, slots, strict=True)]
            first, unread = 0, unread[end:]


@dataclass
class StepState(EpochState):
    """How many steps of the epoch have been read."""

    steps: int = 0


class VariablePosition(Position[StepState]):
    """The read position of a VariableSampler. It applies to the same number of ranks and the same schedule."""

    def __init__(self, sampler: VariableSampler, source: str) -> None:
        super().__init__(source)
        self.sampler = sampler

    def record_batch(self, after: Any) -> None:
        assert self._current is not None
        self._current.steps += 1

    def _epoch(self) -> int:
        return self.sampler.epoch

    def _set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def _initial_state(self, epoch: int) -> StepState:
        return StepState(epoch)

    def _start(self, state: StepState, is_resumed: bool) -> None:
        self.sampler.start = state.steps

    def _to_state_dict(self, state: StepState) -> StateDict:
        return {
            "form": "rows",
            "seed": self.sampler.sampler.seed,
            "size": self.sampler.sampler.num_samples,
            "resampled": False,
            "epoch": state.epoch,
            "steps": state.steps,
            "schedule": self.sampler.fingerprint(),
        }

    def _from_state_dicts(self, states: Sequence[StateDict]) -> StepState:
        saved = states[0]
        has_started = saved.get("steps", 0) or saved.get("samples", 0)
        if has_started and saved.get("schedule") != self.sampler.fingerprint():
            raise OtherSteps(
                f"--naflex-variable-batch: the checkpoint is from within epoch {saved['epoch']} of a run with other "
                "processes, --naflex or --bucket options, so its steps have other samples. Resume with the same ones, "
                "or from the end of an epoch."
            )
        return StepState(saved["epoch"], saved.get("steps", 0))


class RowSteps(NamedTuple):
    """The parts of a loader of rows.

    Attributes:
        sampler: has the epoch.
        batches: gives the batches, or planned steps; it may be the same object.
        position: the read position; None in evaluation.
        samples: the data set that `batches` refers to.
        collate: joins the samples of a batch or step.
        num_samples: of an epoch over all ranks.
        is_planned: whether the plan decides which batches form a step.
    """

    sampler: Sampler
    batches: Any
    position: Position | None
    samples: Dataset
    collate: Collate | PlannedCollate
    num_samples: int
    is_planned: bool = False


def plan_steps(
    transform: PlannedTransform, sampler: TrainSampler, position: Position, samples: Any, collate: Collate
) -> RowSteps:
    """Make steps of planned shapes of the rows that a sampler shuffles.

    Args:
        transform: that of the images of `samples`.
        sampler, position: for a constant batch.
        samples: the data set, indexed by SampleRef.
        collate: joins what a sample has besides its image.

    Raises:
        ValueError: the rows do not give one step.
    """
    plan = transform.make_plan(sampler.num_samples)
    parts = PlannedSamples(samples, transform), transform.make_collate(collate, plan)
    if isinstance(plan, StepPlan):
        steps, num_samples = PlannedSampler(sampler, plan), sampler.num_samples
        if transform.cfg.train_num_image_tokens is not None:
            num_samples = min(num_samples, len(steps) * sampler.global_batch)
        return RowSteps(sampler, steps, position, *parts, num_samples, True)
    buckets = getattr(sampler, "buckets", None)
    variable = VariableSampler(sampler, plan, None if buckets is None else buckets.to_state())
    return RowSteps(variable, variable, VariablePosition(variable, position.source), *parts, plan.num_samples(), True)
