"""The parser of the training command, made from `training.params.options`."""

from __future__ import annotations

import argparse
import ast
import textwrap
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from training.params.config import GROUPS, SECTIONS, default_values
from training.params.option import Option, flag, options_of


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m training.main`, with the defaults of the options."""
    parser = argparse.ArgumentParser(
        prog="python -m training.main",
        usage="%(prog)s [--train-data PATH] [--model NAME] [options]; --help lists all of them",
        description="Train and evaluate CLIP models on Ascend NPUs, GPUs or the CPU. For several devices, start the "
        "same command with `torchrun --nproc_per_node N -m training.main ...` or srun.",
        epilog="Defaults are in [brackets]. Sample counts and batch sizes are per process (one process per device) "
        "unless stated otherwise. A step is one update of the weights.",
        formatter_class=_HelpFormatter,
    )
    defaults = default_values()
    groups = {title: parser.add_argument_group(title, description) for title, description in GROUPS.items()}
    for section in SECTIONS:
        types = get_type_hints(section)
        for name, declared in options_of(section).items():
            if not declared.has_flag:
                continue
            flags = [flag(name), declared.alias] if declared.alias else [flag(name)]
            form = _argparse_form(types[name], declared)
            if defaults[name] is True:
                form["action"] = "store_false"
            groups[declared.group or section.group].add_argument(*flags, dest=name, help=declared.help, **form)
    parser.set_defaults(**defaults)
    return parser


def _argparse_form(kind: Any, declared: Option) -> dict[str, Any]:
    """Return the keywords of `add_argument` that follow from the type of an option and from its description.

    bool: a flag without a value. dict: KEY=VALUE words. list: any number of values. A tuple, or one of several types:
    one value or more.
    """
    kinds = [k for k in get_args(kind) if k is not NoneType] if get_origin(kind) is UnionType else [kind]
    if kinds == [bool]:
        return {"action": "store_true"}
    form: dict[str, Any] = {"metavar": declared.metavar, "choices": declared.choices}
    if get_origin(kinds[0]) is dict:
        return form | {"action": ParseKwargs, "nargs": "*"}
    if get_origin(kinds[0]) is list:
        return form | {"type": None, "nargs": "*"}
    tuples = [k for k in kinds if get_origin(k) is tuple]
    element = get_args(tuples[0])[0] if tuples else kinds[0]
    return form | {"type": None if element is str else element, "nargs": "+" if tuples else None}


class ParseKwargs(argparse.Action):
    """Collect `KEY=VALUE` words into a dict.

    A value that is a Python literal (`1`, `0.5`, `True`, `None`, `(0.9,1.0)`) is converted; others stay strings. A
    value may contain `=`. A word without a key or without `=` is an error.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        parsed = {}
        for word in values:
            key, equals, value = word.partition("=")
            if not key or not equals:
                parser.error(f"argument {option_string}: expected KEY=VALUE, got {word!r}")
            try:
                parsed[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                parsed[key] = value
        setattr(namespace, self.dest, parsed)


class _HelpFormatter(argparse.HelpFormatter):
    """A formatter that appends defaults, except empty ones, and does not break lines at hyphens."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if (
            action.help is None
            or default is None
            or isinstance(default, bool)
            or default in ("", {}, [], argparse.SUPPRESS)
        ):
            return action.help
        shown = repr(default) if isinstance(default, str) and default.isspace() else "%(default)s"
        return f"{action.help} [{shown}]"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)
