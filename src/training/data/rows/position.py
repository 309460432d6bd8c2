"""The read position in a shuffled list of rows; see `training.data.position`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.data.position import EpochState, Position, StateDict
from training.data.sampling import TrainSampler


@dataclass
class RowState(EpochState):
    """How many samples of the epoch's order all ranks together have read."""

    samples: int = 0


class RowPosition(Position[RowState]):
    """The position in a shuffled list of rows."""

    def __init__(self, sampler: TrainSampler, source: str) -> None:
        super().__init__(source)
        self.sampler = sampler

    def record_batch(self, after: Any) -> None:
        assert self._current is not None
        self._current.samples += self.sampler.batch_size * self.sampler.world_size

    def _epoch(self) -> int:
        return self.sampler.epoch

    def _set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def _initial_state(self, epoch: int) -> RowState:
        return RowState(epoch)

    def _start(self, state: RowState, is_resumed: bool) -> None:
        self.sampler.start = state.samples

    def _to_state_dict(self, state: RowState) -> StateDict:
        return {
            "form": "rows",
            "seed": self.sampler.seed,
            "size": self.sampler.num_samples,
            "resampled": False,
            "epoch": state.epoch,
            "samples": state.samples,
        }

    def _from_state_dicts(self, states: Sequence[StateDict]) -> RowState:
        return RowState(states[0]["epoch"], max(state["samples"] for state in states))
