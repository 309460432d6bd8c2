"""A small training state whose weights are sharded with fully_shard, and the same state without sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.checkpoint import folder
from training.checkpoint.state import TrainState
from training.checkpoint.stored_tensor import map_leaves
from training.ema import WeightAverage
from training.sharding.tensors import gather, is_sharded

CPU = torch.device("cpu")


class Model(nn.Module):
    """A parameter of odd length, one shorter than the number of ranks, a frozen one, a buffer, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3), nn.BatchNorm1d(3, momentum=0.0))
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.body(x)) * self.logit_scale


class Data:
    """A part whose state differs between ranks."""

    def __init__(self, value: int) -> None:
        self.value: Any = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, states: Any) -> None:
        self.value = [state["value"] for state in states]


def create(rank: int, mesh: Any = None, seed: int = 0) -> TrainState:
    """Create a state that has made two steps. Sharded over `mesh`, if it is given."""
    torch.manual_seed(seed)
    model: Any = Model()
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.body, mesh=mesh)
        fully_shard(model.frozen, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
              {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=0.05, foreach=False)
    average = WeightAverage(model, 0.9)
    state = TrainState(
        model, CPU, "run", parts={"optimizer": optimizer, "average": average}, rank_parts={"data": Data(10 + rank)}
    )
    for step in range(2):
        make_step(state, step)
    return state


def make_step(state: TrainState, step: int) -> float:
    """Make a step. Its samples are the same on all ranks, so the gradients are those of one process."""
    optimizer: Any = state.parts["optimizer"]
    average: Any = state.parts["average"]
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    loss = state.model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update(step)
    state.step += 1
    return loss.item()


def save(path: Path, state: TrainState | None = None) -> dict[str, Any]:
    """Write the folder of a sharded checkpoint. Return the content of the equivalent file."""
    state = state or create(0)
    content = state.state_dict()
    folder.write(path, *folder.split(content, state.optimizer_parameter_names()), folder.Peers())
    return content


def whole(state: TrainState) -> dict[str, Any]:
    """Return the content of a checkpoint with whole tensors. Collective."""
    content = state.state_dict()
    return map_leaves(content, Tensor, lambda value: gather(value).clone() if is_sharded(value) else value.clone())
