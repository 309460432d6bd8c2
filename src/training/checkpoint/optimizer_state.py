"""Optimizer states that were saved with other parameter groups: each parameter's state is found by its name.

A state of torch numbers the parameters in the order of the groups and has no names. Checkpoints of this package have
the names in addition. For others, the names follow from the groups that open_clip 3.3.0 and 4 make, if one of them fits
the saved sizes and shapes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from open_clip.checkpoint.mismatch import join_some
from training.flat_adamw import FlatAdamW
from training.parameter_groups import Grouping, lr_scales, name_groups, trainable

logger = logging.getLogger(__name__)

Names = list[list[str]]  # of the parameters of each group

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # have the shape of the parameter


@dataclass(frozen=True)
class Stored:
    """The optimizer state of a checkpoint.

    Attributes:
        state_dict: of an optimizer. None: the checkpoint has none.
        names: names of its parameters by group. None: the checkpoint has none.
        place: called with the name and the state of a parameter, returns the state as the optimizer takes it.
    """

    state_dict: Mapping[str, Any] | None
    names: Names | None = None
    place: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] = lambda _, state: state


def parameter_names(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Names:
    """Return the names of the parameters of each group; "" for a parameter without one."""
    name_of = {id(p): name for name, p in parameters.items()}
    return [[name_of.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]


def load(optimizer: torch.optim.Optimizer, stored: Stored, model: nn.Module, own: Names) -> None:
    """Load an optimizer state.

    With the saved groups, the options of the groups are those of the checkpoint. With other groups they are those of
    this run, and only the states of the parameters are loaded.

    Args:
        optimizer: gets the state.
        stored: what the checkpoint has.
        model: bare model.
        own: names of the optimizer's parameters by group.

    Raises:
        ValueError: the state is of another optimizer, or of other parameters.
    """
    if stored.state_dict is None:
        logger.warning("The checkpoint has no optimizer state. The moments start from zero.")
        return
    try:
        _load(optimizer, stored.state_dict, stored, model, own)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The optimizer state of the checkpoint does not fit this run ({error}). Use the same --opt and "
            "--lock-* options, or load only the weights with --pretrained."
        ) from error


def _load(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], stored: Stored, model: nn.Module, own: Names
) -> None:
    names = stored.names
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if names is None and not _is_known(own):
        names = own  # only its numbers can be compared
    elif names is None:
        names = _find_names(saved, sizes, optimizer, model, own)
    if [len(group) for group in names] != sizes:
        raise ValueError("its groups have other sizes than their names")
    if names == own and _scales(saved["param_groups"]) == _scales(optimizer.param_groups):
        _check_entries(optimizer, saved["state"].values())
        state = {
            index: stored.place(name, saved["state"][index])
            for name, index in _numbered(names, saved)
            if index in saved["state"]
        }
        optimizer.load_state_dict(_complete_groups({**saved, "state": state}, optimizer))
        return
    by_name = {name: saved["state"][index] for name, index in _numbered(names, saved) if index in saved["state"]}
    _log_regrouping(names, own)
    _check_entries(optimizer, by_name.values())
    if misfits := _misfits(by_name, dict(model.named_parameters())):
        raise ValueError(f"the moments have other shapes than the parameters {join_some(misfits)}")
    wanted = optimizer.state_dict()
    state = {index: stored.place(name, by_name[name]) for name, index in _numbered(own, wanted) if name in by_name}
    optimizer.load_state_dict({**wanted, "state": state})


def _scales(groups: Sequence[Mapping[str, Any]]) -> list[float | None]:
    return [group.get("lr_scale") for group in groups]


def _is_known(names: Names) -> bool:
    return all(name for group in names for name in group)


def _numbered(names: Names, state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each name with the number that the parameter has in the state dict."""
    for group, saved in zip(names, state_dict["param_groups"], strict=True):
        yield from zip(group, saved["params"], strict=True)


def _log_regrouping(saved: Names, own: Names) -> None:
    old, new = (dict.fromkeys(name for group in names for name in group) for names in (saved, own))
    fresh, unused = [name for name in new if name not in old], [name for name in old if name not in new]
    if len(fresh) == len(new):
        raise ValueError("none of its parameters is trained in this run")
    logger.info(
        "The optimizer state has other parameter groups (%d) than this run (%d), or other layer decay. Parameters are "
        "matched by name; learning rates and weight decay are those of this run.",
        len(saved),
        len(own),
    )
    if fresh:
        logger.info("The moments of %d parameters start from zero: %s.", len(fresh), join_some(fresh))
    if unused:
        logger.info("The moments of %d parameters are not used: %s.", len(unused), join_some(unused))


def _check_entries(optimizer: torch.optim.Optimizer, states: Iterable[Mapping[str, Any]]) -> None:
    """Check that the states have the entries that torch's optimizers read."""
    needed: tuple[str, ...] = ()
    if isinstance(optimizer, (FlatAdamW, torch.optim.AdamW, torch.optim.NAdam)):
        needed = ("exp_avg", "exp_avg_sq")
    if isinstance(optimizer, torch.optim.NAdam):
        needed += ("mu_product",)
    for state in states:
        if missing := [name for name in needed if name not in state]:
            raise ValueError(f"it has no {join_some(missing)}, which {type(optimizer).__name__} needs")


def _complete_groups(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill options that the saved optimizer state lacks with the values of this run.

    Values that were not plain numbers, such as a NumPy learning rate, are dropped when a checkpoint is read.
    """
    groups = []
    for number, group in enumerate(saved["param_groups"]):
        ours = optimizer.param_groups[min(number, len(optimizer.param_groups) - 1)]
        absent = {key: value for key, value in ours.items() if key not in group and key != "params"}
        if absent:
            logger.info(
                "The optimizer state of the checkpoint has no %s. The values of this run are used.", join_some(absent)
            )
        groups.append({**group, **absent})
    return {**saved, "param_groups": groups}


# Names of a state that has none


def _find_names(
    saved: Mapping[str, Any], sizes: list[int], optimizer: torch.optim.Optimizer, model: nn.Module, own: Names
) -> Names:
    """Find the names of the saved parameters by the groups that open_clip makes.

    Raises:
        ValueError: none of them fits.
    """
    groups = saved["param_groups"]
    if all("param_names" in group for group in groups):  # an optimizer that was made with names
        return [[name.replace("_orig_mod.", "").removeprefix("module.") for name in g["param_names"]] for g in groups]
    parameters = dict(model.named_parameters())
    candidates: list[Names] = [own, *_candidates(groups, model)]
    if groups and optimizer.param_groups and ("group_name" in groups[0]) != ("group_name" in optimizer.param_groups[0]):
        candidates.append(candidates.pop(0))  # it is not likely that the groups are those of this run
    for names in candidates:
        if [len(group) for group in names] == sizes:
            states = {name: saved["state"].get(index, {}) for name, index in _numbered(names, saved)}
            if not _misfits(states, parameters):
                return names
    raise ValueError(
        f"its {len(groups)} parameter groups with {sum(sizes)} parameters are not those that open_clip makes from the "
        f"{sum(map(len, own))} trainable parameters of this run"
    )


def _misfits(states: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of parameters whose saved moments have another shape."""
    return [
        name
        for name, state in states.items()
        for key in _MOMENTS
        if name in parameters and isinstance(state.get(key), Tensor) and not _fits(state[key], parameters[name])
    ]


def _fits(moment: Tensor, parameter: Tensor) -> bool:
    """Return whether a moment has the shape of its parameter. open_clip's sharded runs store scalars as one element."""
    return moment.shape == parameter.shape or (parameter.ndim == 0 and moment.shape == (1,))


def _candidates(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> Iterator[Names]:
    """Yield the names in the groups of open_clip 3.3.0 and 4, of timm, and in one group."""
    groupings = [Grouping(), Grouping(rule="4")]
    scales = {group["lr_scale"] for group in groups if "lr_scale" in group}
    if scales:
        groupings = _with_layer_decay(scales, model)
    for grouping in groupings:
        yield [group.names for group in name_groups(model, grouping)]
    named = trainable(model)
    no_weight_decay: set[str] = getattr(model, "no_weight_decay", set)()
    for excluded in (no_weight_decay, set[str]()):  # timm does not see the names of a model that is wrapped by DDP
        undecayed = [n for n, p in named.items() if p.ndim < 2 or n.endswith(".bias") or n in excluded]
        yield [group for group in (undecayed, [name for name in named if name not in set(undecayed)]) if group]
    yield [list(named)]


def _with_layer_decay(scales: set[float], model: nn.Module) -> list[Grouping]:
    """Return the groupings with layer decay whose learning rates can have these scales.

    The decay of a tower is the scale of its second-to-last group, so it is one of the scales.
    """
    found = []
    decays = [None, *sorted(scale for scale in scales if scale < 1)]
    for pooler_in_head in (True, False):
        of_tower: dict[str, dict[float | None, set[float]]] = {"image": {None: {1.0}}, "text": {None: {1.0}}}
        for decay in decays[1:]:
            image = Grouping("4", image_decay=decay, pooler_in_head=pooler_in_head)
            text = Grouping("4", text_decay=decay, pooler_in_head=pooler_in_head)
            for tower, grouping in (("image", image), ("text", text)):
                of_tower[tower][decay] = {1.0, *lr_scales(model, grouping).values()}
        found += [
            Grouping("4", image_decay, text_decay, pooler_in_head)
            for image_decay, text_decay in itertools.product(decays, repeat=2)
            if scales <= of_tower["image"][image_decay] | of_tower["text"][text_decay]
        ]
    return found
