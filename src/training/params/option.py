"""How an option is declared: as a dataclass field that has its default, help text and allowed values.

Example:
    batch_size: int = option(64, at_least=1, metavar="N", help="samples per process and forward pass")
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Option:
    """What an option has besides its name, type and default, which are those of the dataclass field.

    Attributes:
        help: text of `--help`. It says how the default is chosen if that depends on the model, the device or the data.
        metavar: name of the value in `--help`.
        choices: allowed values.
        at_least, above, at_most, below: bounds of a number. A number with bounds must be finite.
        alias: a second flag.
        group: group of `--help`, if it is not that of the section.
        refused: why values other than the default are not supported, and what to use instead.
        has_flag: whether the command has a flag. Otherwise the option is set in namespaces only.
    """

    help: str
    metavar: str | None = None
    choices: tuple[Any, ...] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    alias: str | None = None
    group: str | None = None
    refused: str | None = None
    has_flag: bool = True

    def check(self, flag: str, value: Any, default: Any = None) -> None:
        """Raise ValueError if the value is not allowed. The default and None (not given) are always allowed."""
        if value is None or value == default:
            return
        if self.refused is not None and value is not False and value != "":
            raise ValueError(f"{flag}: {self.refused}")
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{flag} must be one of {', '.join(map(str, self.choices))}, got {value!r}.")
        bounds = self._describe_bounds()
        if bounds and not (math.isfinite(value) and self._is_within_bounds(value)):
            raise ValueError(f"{flag} must be {bounds}, got {value}.")

    def _is_within_bounds(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def _describe_bounds(self) -> str:
        names = {"at least": self.at_least, "more than": self.above, "at most": self.at_most, "below": self.below}
        bounds = [f"{name} {bound}" for name, bound in names.items() if bound is not None]
        return f"{self.at_least} or more" if bounds == [f"at least {self.at_least}"] else " and ".join(bounds)


def option(default: Any, **description: Any) -> Any:
    """Return a dataclass field for an option. The keywords are the attributes of `Option`."""
    metadata = {"option": Option(**description)}
    if isinstance(default, (dict, list)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(section: type[DataclassInstance]) -> dict[str, Option]:
    """Return the options that a section declares, by name."""
    return {f.name: f.metadata["option"] for f in fields(section) if "option" in f.metadata}


# Options whose flag is not spelled as their name.
_FLAGS = {"text_pooler_in_head": "--text-pooler-own-group", "wd_exclude_patterns": "--wd-exclude"}


def flag(name: str) -> str:
    """Return the flag of an option: 'batch_size' -> '--batch-size'."""
    return _FLAGS[name] if name in _FLAGS else "--" + name.replace("_", "-")
