"""Parameter groups of the optimizer: which parameters decay, and the learning rate of each layer.

Two rules decide which parameters have no weight decay. "3.3" is that of open_clip 3.3.0. "4" is that of open_clip 4: it
also asks the modules for names without decay, so that tables of positions and class tokens do not decay. See
`Grouping.rule`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from training.params import OptimConfig

logger = logging.getLogger(__name__)

RULES = ("3.3", "4")


@dataclass(frozen=True)
class Grouping:
    """How parameters are divided into groups.

    Attributes:
        rule: "3.3": no weight decay for parameters with less than two dimensions, or with "bn", "ln", "bias" or
            "logit_scale" in the name. "4": none for parameters with less than two dimensions, and those that a module
            names (see `no_decay_names`).
        image_decay, text_decay: the learning rate of group i of n of a tower is multiplied by decay ** (n - 1 - i).
            None: 1.
        pooler_in_head: put a text tower's pooler into the group of the projection.
        no_decay: patterns (fnmatch) of more names without weight decay.
        fallback: patterns of names that an optimizer of the Muon family updates with AdamW.
    """

    rule: str = "3.3"
    image_decay: float | None = None
    text_decay: float | None = None
    pooler_in_head: bool = True
    no_decay: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()

    @property
    def has_layer_decay(self) -> bool:
        return self.image_decay is not None or self.text_decay is not None

    @property
    def is_of_3_3(self) -> bool:
        """Whether the groups are exactly those of open_clip 3.3.0."""
        return self.rule == "3.3" and not (self.has_layer_decay or self.no_decay or self.fallback)


@dataclass(frozen=True)
class NamedGroup:
    """The names of the parameters of a group. `scale` (of the learning rate) is None without layer decay."""

    names: list[str]
    decays: bool
    scale: float | None = None
    is_fallback: bool = False

    @property
    def label(self) -> str:
        """The name of the group, as open_clip 4 has it."""
        scale = [] if self.scale is None else [f"lr_scale={self.scale:.4g}"]
        return "/".join([*scale, "wd" if self.decays else "no_wd", *(["fallback"] if self.is_fallback else [])])


def grouping_of(cfg: OptimConfig) -> Grouping:
    """Return the grouping that the options describe.

    Without --decay-rule the rule is "3.3", so that optimizer states of 3.3.0 fit. It is "4" if another option divides
    the parameters in a way that 3.3.0 does not have.
    """
    exclude, fallback = tuple(cfg.wd_exclude_patterns or ()), tuple(cfg.opt_fallback_list or ())
    is_new = bool(exclude or fallback) or cfg.image_layer_decay is not None or cfg.text_layer_decay is not None
    return Grouping(
        rule=cfg.decay_rule or ("4" if is_new else "3.3"),
        image_decay=cfg.image_layer_decay,
        text_decay=cfg.text_layer_decay,
        pooler_in_head=cfg.text_pooler_in_head,
        no_decay=exclude,
        fallback=fallback,
    )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def name_groups(model: nn.Module, grouping: Grouping) -> list[NamedGroup]:
    """Divide the trainable parameters of the bare model into groups.

    The groups of 3.3.0 are those without and with decay, also if one of them is empty. Other groups are sorted by the
    scale of the learning rate, and are not empty.

    Raises:
        ValueError: layer decay for a model whose tower is not divided into groups.
    """
    named = trainable(model)
    if grouping.rule == "3.3":
        undecayed = {name for name, p in named.items() if has_no_decay(name, p)}
    else:
        undecayed = {name for name, p in named.items() if p.ndim < 2} | no_decay_names(model)
    undecayed |= {name for name in named if _matches(name, grouping.no_decay)}
    if grouping.is_of_3_3:
        without = [name for name in named if name in undecayed]
        return [NamedGroup(without, False), NamedGroup([name for name in named if name not in undecayed], True)]
    scales = lr_scales(model, grouping) if grouping.has_layer_decay else {}
    members: dict[tuple[float | None, bool, bool], list[str]] = {}
    for name in named:
        scale = scales.get(name, 1.0) if grouping.has_layer_decay else None
        members.setdefault((scale, name not in undecayed, _matches(name, grouping.fallback)), []).append(name)
    ordered = sorted(members, key=lambda key: (-(key[0] or 0.0), key[1], key[2]))
    return [NamedGroup(members[key], key[1], key[0], key[2]) for key in ordered]


def has_no_decay(name: str, parameter: torch.Tensor) -> bool:
    """Return whether the parameter has no weight decay by the rule of open_clip 3.3.0."""
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


def no_decay_names(model: nn.Module) -> set[str]:
    """Return the names of parameters that modules of the model exclude from weight decay.

    A module may have three methods that return names relative to it: `no_weight_decay` (names),
    `no_weight_decay_patterns` (fnmatch patterns) and `no_weight_decay_keywords` (suffixes).
    """
    found = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        names, patterns, suffixes = (
            tuple(method()) if callable(method := getattr(module, f"no_weight_decay{kind}", None)) else ()
            for kind in ("", "_patterns", "_keywords")
        )
        found |= {prefix + name for name in names}
        if patterns or suffixes:
            own = [name for name, _ in module.named_parameters()]
            found |= {prefix + name for name in own if _matches(name, patterns) or name.endswith(suffixes)}
    return found


def lr_scales(model: nn.Module, grouping: Grouping) -> dict[str, float]:
    """Return the factor of the learning rate of each parameter of the towers that have layer decay."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    scales: dict[str, float] = {}
    for tower, decay in (("image", grouping.image_decay), ("text", grouping.text_decay)):
        if decay is None:
            continue
        make_groups = getattr(model, f"{tower}_layer_groups", None)
        if make_groups is None:
            raise ValueError(f"--{tower}-layer-decay: {type(model).__name__} has no {tower}_layer_groups().")
        groups = [list(_parameters(members)) for _, members in make_groups(pooler_in_head=grouping.pooler_in_head)]
        groups = [group for group in groups if group]
        for number, group in enumerate(groups):
            scales |= {name_of[id(p)]: decay ** (len(groups) - 1 - number) for p in group if id(p) in name_of}
    return scales


def _parameters(members: Iterable[Any]) -> Iterator[nn.Parameter]:
    for member in members:
        if isinstance(member, nn.Module):
            yield from member.parameters()
        elif member is not None:
            yield member


def build_groups(model: nn.Module, grouping: Grouping, weight_decay: float) -> list[dict[str, Any]]:
    """Build the groups that an optimizer takes. Warn about patterns that match no trainable parameter."""
    named = trainable(model)
    for flag, patterns in (("--wd-exclude", grouping.no_decay), ("--opt-fallback-list", grouping.fallback)):
        for pattern in patterns:
            if not any(_matches(name, [pattern]) for name in named):
                logger.warning("%s %s matches no trainable parameter, so it has no effect.", flag, pattern)
    groups = []
    for group in name_groups(model, grouping):
        built: dict[str, Any] = {
            "params": [named[name] for name in group.names],
            "weight_decay": weight_decay if group.decays else 0.0,
        }
        if not grouping.is_of_3_3:  # the groups of 3.3.0 have no more entries
            built["group_name"] = group.label
        if group.scale is not None:
            built["lr_scale"] = group.scale
        if group.is_fallback:
            built["use_fallback"] = True
        groups.append(built)
    return groups


def log_groups(optimizer: torch.optim.Optimizer) -> None:
    """Log a table of the groups."""
    lines = [f"{'tensors':>9}{'parameters':>14}{'lr scale':>10}{'weight decay':>14}  group"]
    for number, group in enumerate(optimizer.param_groups):
        count, total = len(group["params"]), sum(p.numel() for p in group["params"])
        scale, decay = group.get("lr_scale", 1.0), group.get("weight_decay", 0.0)
        name = group.get("group_name", number)
        lines.append(f"{count:>9}{total:>14,}{scale:>10.4g}{decay:>14.4g}  {name}")
    logger.info("Parameter groups of %s:\n%s", type(optimizer).__name__, "\n".join(lines))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
