"""timm's version, and the import of timm with an error that says how to install it."""

from __future__ import annotations

import re
from types import ModuleType

from .utils import import_compiler

_OLDEST_WITH_NAFLEX = (1, 0, 31)  # earlier ones compute other positions, or lack parts of NaFlexVit


def import_timm() -> ModuleType:
    """Return timm.

    Raises:
        RuntimeError: timm is not installed.
    """
    import_compiler()
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise RuntimeError("This image tower needs timm, which is not installed: pip install timm.") from None
    return timm


def timm_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", import_timm().__version__)[:3])


def require_naflex() -> None:
    """Raise a RuntimeError if timm is missing or too old for image towers for any size."""
    if timm_version() < _OLDEST_WITH_NAFLEX:
        needed = ".".join(map(str, _OLDEST_WITH_NAFLEX))
        raise RuntimeError(
            f"Image towers for any size (NaFlex) need timm {needed} or newer. This is timm "
            f"{import_timm().__version__}: pip install --upgrade timm."
        )
