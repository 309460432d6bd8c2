"""The keys of a checkpoint file.

They are those of open_clip: {"epoch", "name", "state_dict"[, "optimizer"][, "scaler"]}. Two more keys hold what
open_clip does not save. "state_dict_ema" (with --ema-decay) has the averaged weights. "train_state" has the step, the
read position within the epoch and its data, the states of the random generators of every rank, and the states of all
other parts by name. Therefore open_clip can resume these checkpoints, and this package can resume open_clip's.

Checkpoints contain only tensors and plain values, so that `torch.load(weights_only=True)` can read them. Other objects
are dropped when a checkpoint is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from open_clip.checkpoint.key_prefixes import strip_prefixes

DDP_PREFIX = "module."  # of the names of weights in files of distributed runs
OPTIMIZER_NAMES = "optimizer_names"  # the part with the names of the optimizer's parameters, by group
COUNTERS = ("step", "samples_seen", "epoch_step", "epoch_samples", "samples_per_step")
_VERSION = 2  # of "train_state"
_RANK_PARTS = ("rng", "data")  # lists with an entry per rank; those of other rank parts are under "by_rank"


@dataclass
class RunState:
    """The content of a checkpoint, by what it belongs to.

    Attributes:
        weights: of the model, by name.
        counters: see COUNTERS.
        parts: states by the names in `TrainState.parts`. Those that the file lacks are missing.
        by_rank: lists with the state of each rank by the names in `TrainState.rank_parts`, and "rng". Empty if the
            file is from open_clip.
    """

    weights: Mapping[str, Tensor]
    epoch: int = 0
    name: str = ""
    counters: dict[str, int] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    by_rank: dict[str, list[Any]] = field(default_factory=dict)


def to_file(state: RunState, is_distributed: bool) -> dict[str, Any]:
    """Return the content of the file. `from_file` is the inverse."""
    # open_clip writes the names of DDP's wrapper, and its distributed resume needs them.
    prefix = DDP_PREFIX if is_distributed else ""
    content: dict[str, Any] = {
        "epoch": state.epoch,
        "name": state.name,
        "state_dict": {prefix + name: value for name, value in state.weights.items()},
    }
    parts = dict(state.parts)
    if "optimizer" in parts:
        content["optimizer"] = parts.pop("optimizer")
    scaler, average = parts.pop("scaler", {}), parts.pop("average", {})
    if scaler:  # empty if it is disabled
        content["scaler"] = scaler
    if average:
        content["state_dict_ema"] = {**state.weights, **average}
    by_rank = dict(state.by_rank)
    own: dict[str, Any] = {name: by_rank.pop(name) for name in _RANK_PARTS if name in by_rank}
    if by_rank:
        own["by_rank"] = by_rank
    content["train_state"] = {**parts, "version": _VERSION, **state.counters, **own}
    return content


def from_file(content: Mapping[str, Any]) -> RunState:
    """Return the state from the content of a file, which may be from open_clip, or a plain state dict."""
    parts = {name: content[name] for name in ("optimizer", "scaler") if name in content}
    if "state_dict_ema" in content:
        parts["average"] = strip_prefixes(content["state_dict_ema"])
    state = RunState(weights=content.get("state_dict", content), parts=parts)
    if not is_training_checkpoint(content):
        return state
    state.epoch, state.name = int(content["epoch"]), str(content.get("name", ""))
    own = dict(content.get("train_state") or {})
    state.by_rank = {name: own.pop(name) for name in _RANK_PARTS if name in own} | own.pop("by_rank", {})
    state.counters = {name: int(own.pop(name)) for name in COUNTERS if name in own}
    own.pop("version", None)
    state.parts |= {name: part for name, part in own.items() if part}
    return state


def is_training_checkpoint(content: Mapping[str, Any]) -> bool:
    return "epoch" in content and isinstance(content.get("state_dict"), Mapping)
