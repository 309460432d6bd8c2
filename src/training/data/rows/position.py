"""The read position in a shuffled list of rows; see `training.data.position`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from training.data.position import EpochState, OtherSteps, Position, StateDict
from training.data.sampling import NO_ROWS, TrainSampler


@dataclass
class RowState(EpochState):
    """What all ranks together have not read: the rows `rest`, and those from `start` on in the order of the epoch.

    Without length bucketing there is no rest. With it, the rest are the unread rows of a pool, in the order in which
    they are read. So a resumed run can have other buckets, or none.
    """

    start: int = 0
    rest: torch.Tensor = NO_ROWS

    @property
    def samples(self) -> int:
        """How many samples have been read."""
        return self.start - len(self.rest)


class RowPosition(Position[RowState]):
    """The position in a shuffled list of rows."""

    def __init__(self, sampler: TrainSampler, source: str) -> None:
        super().__init__(source)
        self.sampler = sampler

    def record_batch(self, after: Any) -> None:
        current = self._current
        assert current is not None
        current.start, current.rest = self.sampler.position_after_batch(current.start, current.rest)

    def _epoch(self) -> int:
        return self.sampler.epoch

    def _set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def _initial_state(self, epoch: int) -> RowState:
        return RowState(epoch)

    def _start(self, state: RowState, is_resumed: bool) -> None:
        self.sampler.start, self.sampler.rest = state.start, state.rest

    def _to_state_dict(self, state: RowState) -> StateDict:
        saved = {
            "form": "rows",
            "seed": self.sampler.seed,
            "size": self.sampler.num_samples,
            "resampled": False,
            "epoch": state.epoch,
            "samples": state.samples,
        }
        if len(state.rest) and self.sampler.rank == 0:  # it is the same on all ranks
            saved["rest"] = state.rest.clone()  # without the rows of the tensor that it is a view of
        return saved

    def _from_state_dicts(self, states: Sequence[StateDict]) -> RowState:
        if states[0].get("steps", 0):
            raise OtherSteps(
                f"The checkpoint is from within epoch {states[0]['epoch']}, whose steps have different sizes "
                "(--naflex-variable-batch). Resume with this option, or from the end of an epoch."
            )
        epoch, rest = states[0]["epoch"], states[0].get("rest", NO_ROWS)
        samples = max(state.get("samples", 0) for state in states)
        return RowState(epoch, samples + len(rest), rest)
