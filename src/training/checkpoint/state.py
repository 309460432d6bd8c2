"""The state of a training run: everything that a resumed run needs."""

from __future__ import annotations

import functools
import io
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from training import ranks
from training.checkpoint import optimizer_state, rng
from training.checkpoint.file_format import (
    COUNTERS,
    OPTIMIZER_NAMES,
    RunState,
    from_file,
    is_training_checkpoint,
    to_file,
)
from training.checkpoint.stored_tensor import element, part_like, read_all
from training.checkpoint.weights import load_weights
from training.sharding.tensors import is_sharded_model

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

logger = logging.getLogger(__name__)


class RankStateful(Protocol):
    """A part whose state differs between ranks. It loads the states of all ranks that saved, in their order."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None: ...


@dataclass
class TrainState:
    """All state of a run that changes over time. A resumed run continues from it.

    A new part of a run is added to `parts` or `rank_parts` under its name, and is then saved and loaded. The learning
    rate schedule is a function of the step, so it has no state.

    Attributes:
        model: the bare module, not wrapped by DDP or the compiler.
        parts: have the same state on every rank: "optimizer", "scaler", "average", "guard", "progress". A run that only
            evaluates has none but "average".
        rank_parts: have a state per rank: "data".
        epoch: completed epochs.
        step: completed steps, including skipped ones.
        samples_seen: samples of all ranks.
        epoch_step, epoch_samples: the steps and samples of the current epoch.
        steps_per_epoch, samples_per_epoch: as the data and options of this run have it.
        samples_per_step: samples of all ranks; 0 if unknown.
    """

    model: nn.Module
    device: torch.device
    name: str = ""
    seed: int = 0
    parts: dict[str, Stateful] = field(default_factory=dict)
    rank_parts: dict[str, RankStateful] = field(default_factory=dict)
    steps_per_epoch: int = 0
    samples_per_epoch: int = 0
    samples_per_step: int = 0
    epoch: int = 0
    step: int = 0
    samples_seen: int = 0
    epoch_step: int = 0
    epoch_samples: int = 0

    def add_step(self, samples: int) -> None:
        """Count a step with this number of samples over all ranks."""
        self.epoch_step += 1
        self.epoch_samples += samples
        self.samples_seen += samples
        self.step = self.epoch * self.steps_per_epoch + self.epoch_step

    def end_epoch(self) -> None:
        self.epoch += 1
        self.epoch_step = self.epoch_samples = 0

    @property
    def is_sharded(self) -> bool:
        """Whether the ranks share the weights (FSDP)."""
        return is_sharded_model(self.model)

    def optimizer_parameter_names(self) -> list[str]:
        """Return the names of the optimizer's parameters, in the order of its state dict."""
        optimizer = self.parts.get("optimizer")
        if not isinstance(optimizer, torch.optim.Optimizer):
            return []
        return list(itertools.chain.from_iterable(self._optimizer_names(optimizer)))

    def state_dict(self) -> dict[str, Any]:
        """Build the checkpoint, see `file_format`. Collective.

        Its tensors are not copies. Those of sharded weights are DTensors.
        """
        of_rank = {name: part.state_dict() for name, part in self.rank_parts.items()}
        by_rank = _gather({"rng": rng.rng_state(self.device), **of_rank})
        return to_file(
            RunState(
                epoch=self.epoch,
                name=self.name,
                weights=self._weights(),
                counters={name: getattr(self, name) for name in COUNTERS},
                parts=self._part_states(),
                by_rank={name: [states[name] for states in by_rank] for name in by_rank[0]},
            ),
            is_distributed=ranks.world().distributed,
        )

    def _weights(self) -> dict[str, Any]:
        """Return the state dict of the model. A sharded parameter with two names is one DTensor."""
        weights = self.model.state_dict()
        if self.is_sharded:
            first: dict[int, str] = {}
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                if name in weights:
                    weights[name] = weights[first.setdefault(id(parameter), name)]
        return weights

    def _part_states(self) -> dict[str, Any]:
        states: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        optimizer = self.parts.get("optimizer")
        if isinstance(optimizer, torch.optim.Optimizer):
            states[OPTIMIZER_NAMES] = self._optimizer_names(optimizer)  # its state has numbers in their place
        return states

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load a checkpoint of this package or of open_clip. A plain state dict sets only the weights.

        Raises:
            ValueError: the checkpoint is of another model or another optimizer.
        """
        saved = from_file(checkpoint)
        load_weights(self.model, saved.weights)
        self._load_average(saved)
        if not is_training_checkpoint(checkpoint):
            logger.info("The checkpoint has only weights. The run starts with them at epoch 0.")
            return
        self.epoch = saved.epoch
        for name, part in self.parts.items():
            if name != "average":
                self._load_part(name, part, saved.parts)
        if not saved.by_rank:
            self.step = self.epoch * self.steps_per_epoch
            self.samples_seen = self.epoch * self.samples_per_epoch
            logger.info("The checkpoint has no random states (it is from open_clip). They start from --seed.")
            return
        self._load_counters(saved.counters)
        for name, rank_part in self.rank_parts.items():
            if saved.by_rank.get(name):
                rank_part.load_state_dict(saved.by_rank[name])
        self._load_rng(saved.by_rank["rng"])

    def _load_part(self, name: str, part: Stateful, saved: Mapping[str, Any]) -> None:
        if isinstance(part, torch.optim.Optimizer):
            parameters = dict(self.model.named_parameters())
            place = functools.partial(_place, parameters, self.is_sharded)
            stored = optimizer_state.Stored(saved.get(name), saved.get(OPTIMIZER_NAMES), place)
            optimizer_state.load(part, stored, self.model, self._optimizer_names(part))
        elif name in saved:
            # The scaler of torch_npu has one more entry than torch's.
            part.load_state_dict({**part.state_dict(), **saved[name]} if name == "scaler" else saved[name])
        elif name == "scaler" and part.state_dict():
            logger.info("The checkpoint has no gradient scaler (another --precision). The run uses a new one.")

    def _optimizer_names(self, optimizer: Any) -> optimizer_state.Names:
        # With sharded weights, the optimizer updates the parts of this rank.
        sharded = getattr(optimizer, "shards", None)
        parameters = dict(self.model.named_parameters()) if sharded is None else sharded.parameters
        return optimizer_state.parameter_names(parameters, optimizer)

    def _load_average(self, saved: RunState) -> None:
        average = self.parts.get("average")
        if average is None or not average.state_dict():
            return
        if "average" in saved.parts:
            own = average.state_dict()
            values = {
                name: part_like(value, own[name]) for name, value in saved.parts["average"].items() if name in own
            }
            average.load_state_dict(values)
        else:
            average.load_state_dict(self.model.state_dict())
            logger.info("The checkpoint has no averaged weights. The average of --ema-decay starts from its weights.")

    def _load_counters(self, saved: Mapping[str, int]) -> None:
        for name in ("step", "samples_seen", "epoch_step", "epoch_samples"):
            setattr(self, name, saved.get(name, 0))
        samples_per_step = saved.get("samples_per_step", 0)
        if self.epoch_step and self.samples_per_step and samples_per_step != self.samples_per_step:
            # Keep the number of samples that are left in the epoch, not the number of steps.
            self.epoch_step = min(-(-self.epoch_samples // self.samples_per_step), self.steps_per_epoch)
            self.step = self.epoch * self.steps_per_epoch + self.epoch_step
            logger.info(
                "A step had %d samples when the checkpoint was saved and has %d now. The epoch continues after %d of "
                "%d steps.",
                samples_per_step, self.samples_per_step, self.epoch_step, self.steps_per_epoch,
            )  # fmt: skip

    def _load_rng(self, states: list[dict[str, Any]]) -> None:
        here = ranks.world()
        if len(states) == here.world_size:
            rng.set_rng_state(states[here.rank], self.device)
            return
        rng.random_seed(self.seed + self.step, here.rank)
        logger.info(
            "The checkpoint is from %d process(es) and this run has %d. Random generators are seeded by seed and step.",
            len(states),
            here.world_size,
        )


def _place(parameters: Mapping[str, Tensor], is_sharded: bool, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's saved state: of tensors with the size of a sharded parameter, this rank's part."""
    parameter = parameters.get(name)
    if parameter is None:
        return {key: read_all(value) for key, value in state.items()}
    return {
        key: part_like(value, parameter) if is_sharded and _is_like(key, value, parameter) else _read(value, parameter)
        for key, value in state.items()
    }


def _is_like(key: str, value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and key != "step" and value.numel() == parameter.numel()


def _read(value: Any, parameter: Tensor) -> Any:
    value = read_all(value)
    is_element = parameter.ndim == 0 and isinstance(value, Tensor) and value.shape == (1,)
    return element(value) if is_element else value


def _gather(state: dict[str, Any]) -> list[dict[str, Any]]:
    file = io.BytesIO()  # bytes, because torch_npu warns about pickled tensors
    torch.save(state, file)
    files = ranks.all_gather_object(file.getvalue())
    return [torch.load(io.BytesIO(content), weights_only=True) for content in files]
