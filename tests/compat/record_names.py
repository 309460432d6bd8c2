"""Writes names_3.3.0.json: the names in each module of open_clip_torch 3.3.0, private ones included.

    PYTHONPATH=.peer python tests/compat/record_names.py

Left out are imported modules, what comes from typing and the standard library, and variables of loops.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

LOOP_VARIABLES = {"k", "v", "tk", "tv"}


def names_of(module: ModuleType) -> list[str]:
    return sorted(name for name, value in vars(module).items() if _is_own(name, value))


def _is_own(name: str, value: object) -> bool:
    if name.startswith("__") or name in LOOP_VARIABLES or isinstance(value, ModuleType):
        return False
    # transformers' lazy module and typing's forms have no module of their own class
    origin = getattr(value, "__module__", None) or ""
    return origin.partition(".")[0] not in sys.stdlib_module_names and type(value).__name__ != "_LazyModule"


if __name__ == "__main__":
    import open_clip

    modules = ["open_clip", *(found.name for found in pkgutil.walk_packages(open_clip.__path__, "open_clip."))]
    table = {name: names_of(importlib.import_module(name)) for name in modules}
    path = Path(__file__).with_name("names_3.3.0.json")
    path.write_text(json.dumps({k: v for k, v in table.items() if v}, indent=1) + "\n", encoding="utf-8")
