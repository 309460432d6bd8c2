"""An alias of the package `training`. open_clip has used this name since 2.30.

`import open_clip_train.X` returns the module `training.X` itself, not a copy. `python -m open_clip_train.X` runs it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import CodeType, ModuleType
from typing import Any

import training


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds `open_clip_train.X` and loads it by importing `training.X`."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(__name__ + "."):
            return None
        real = importlib.util.find_spec(self._real_name(fullname))
        if real is None:
            return None
        is_package = real.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(fullname, self, origin=real.origin, is_package=is_package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._real_name(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The module has already run. Restore its spec, which the import system has just replaced by that of the alias.
        alias = module.__spec__
        assert alias is not None
        module.__spec__ = alias.loader_state

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the code for `python -m`, which runs it in the module `__main__`."""
        real = importlib.util.find_spec(self._real_name(fullname))
        assert real is not None
        assert isinstance(real.loader, importlib.abc.InspectLoader)
        return real.loader.get_code(real.name)

    def get_source(self, fullname: str) -> str | None:
        real = importlib.util.find_spec(self._real_name(fullname))
        return (
            real.loader.get_source(real.name) if real and isinstance(real.loader, importlib.abc.InspectLoader) else None
        )

    @staticmethod
    def _real_name(fullname: str) -> str:
        return "training" + fullname.removeprefix(__name__)


# Insert it before the path finder, which would find the files of training under this name and load them again.
sys.meta_path.insert(0, _Alias())
sys.modules[__name__] = training
