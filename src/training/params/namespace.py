"""The flat namespace of the options, as scripts written for open_clip expect it, and the sections made from it.

`parse_args` returns a flat namespace. `sections` and `read_section` are the only functions that read one. It may come
from elsewhere, such as a script written for open_clip 3.3, which has no attributes for the options that only this
project has. An option that a namespace lacks has the default of its field in `training.params.options`, as if the flag
had not been given. So such a script, too, ends with an error when more than half of its data are bad
(`max_bad_fraction`); it can set `args.max_bad_fraction = 1.0`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from training.params.checks import validate, without_effect, writes_nothing
from training.params.config import TrainConfig, default_values, get_default_params
from training.params.flags import build_parser
from training.params.like_4 import overrides

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_TUPLES = (
    *("json_text_key_probs", "naflex_seq_lens", "naflex_seq_len_probs", "naflex_patch_sizes"),
    "naflex_patch_size_probs",
)
_Section = TypeVar("_Section", bound="DataclassInstance")


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (None: `sys.argv[1:]`) into a flat namespace and check it with `validate`.

    Raises:
        SystemExit: with status 0 after `--help`; with status 2 and a message on stderr if an option is invalid.
    """
    parser = build_parser()
    words = sys.argv[1:] if args is None else list(args)
    namespace = parser.parse_args(words)
    if namespace.like_4:
        parser.set_defaults(**overrides(namespace))
        namespace = parser.parse_args(words)
    if not namespace.opt.lower().startswith("timm/"):
        for name, value in get_default_params(namespace.model).items():
            if getattr(namespace, name) is None:
                setattr(namespace, name, value)
    try:
        validate(namespace)
    except ValueError as error:
        parser.error(str(error))
    return namespace


def sections(args: Any) -> TrainConfig:
    """Split a flat namespace into the sections of the components.

    Raises:
        ValueError: see `validate`.
    """
    complete = _complete(args)
    validate(complete)
    return TrainConfig(**{name: read_section(kind, complete) for name, kind in get_type_hints(TrainConfig).items()})


def read_section(section: type[_Section], args: Any) -> _Section:
    """Read one section from the attributes of a flat namespace, without checks.

    Lists become tuples, a single image size becomes an int, and `--logs none` becomes None.
    """
    values = {}
    for f in fields(section):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        values[f.name] = _normalize(f.name, getattr(args, f.name, overrides(args).get(f.name, default)))
    return section(**values)


def _normalize(name: str, value: Any) -> Any:
    if name in ("image_mean", "image_std") and value is not None:
        return tuple(value) * (3 if len(value) == 1 else 1)
    if name in _TUPLES and value is not None:
        return tuple(value)
    if name == "force_image_size" and isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else tuple(value)
    if name == "logs" and writes_nothing(value):
        return None
    return value.copy() if isinstance(value, (dict, list)) else value


def warnings_for(args: Any, world_size: int = 1) -> list[str]:
    """Return warnings about options that were given and have no effect, or a harmful one.

    `parse_args` does not log them because neither the log nor the number of processes exists yet.
    """
    return without_effect(_complete(args), _defaults(args), world_size)


def _complete(args: Any) -> argparse.Namespace:
    """Return a namespace that has every option."""
    return argparse.Namespace(**{name: getattr(args, name, default) for name, default in _defaults(args).items()})


def _defaults(args: Any) -> dict[str, Any]:
    return default_values() | overrides(args)
