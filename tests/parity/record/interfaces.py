"""Records the signatures and the default flags of open_clip_torch 3.3.0.

    python tests/parity/record interfaces

The names of functions and classes stay those of the files; their parameters are recorded again. Writes into
tests/parity/fixtures:
  public_api_3.3.0.json    parameter names by module and name, or by "methods." and class; null for what is not callable
  training_api_3.3.0.json  the same for the training package, by our module names
  train_flags_3.3.0.json   what `parse_args([])` gives
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from open_clip_train.params import parse_args

import open_clip

FIXTURES = Path(__file__).parents[1] / "fixtures"


def parameters(value: Any) -> list[str] | None:
    if not callable(value):
        return None
    return list(inspect.signature(value).parameters)


def signatures(known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for module_name, names in known.items():
        if module_name.startswith("methods."):
            owner = getattr(open_clip, module_name.removeprefix("methods."))
        else:
            owner = importlib.import_module(module_name.replace("training", "open_clip_train"))
        found[module_name] = {name: parameters(getattr(owner, name)) for name in names}
    return found


def main() -> None:
    for file in ("public_api_3.3.0.json", "training_api_3.3.0.json"):
        known = json.loads((FIXTURES / file).read_text(encoding="utf-8"))
        (FIXTURES / file).write_text(json.dumps(signatures(known), indent=1) + "\n", encoding="utf-8")
    flags = json.dumps(vars(parse_args([])), indent=1)
    (FIXTURES / "train_flags_3.3.0.json").write_text(flags + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
