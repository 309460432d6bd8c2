"""Load torch_npu without letting it break `import torch`.

torch imports the backend that it finds installed. Where torch_npu is installed but CANN's environment is not sourced,
that makes `import torch` itself raise. Import this module before torch: it imports torch without the backend, then
torch_npu, and a failure of the second is one warning. Nothing is asked of a driver.
"""
from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from types import ModuleType

logger = logging.getLogger(__name__)

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
HOW_TO_FIX = (
    "Source CANN's environment before starting python (source /usr/local/Ascend/ascend-toolkit/set_env.sh) and install "
    "the torch_npu for this torch, the same to all three numbers; `python -m training.doctor` says more."
)


def _import_torch() -> tuple[ModuleType | None, str | None]:
    """Import torch, then torch_npu if installed. Return (torch_npu or None, why it could not load or None)."""
    if importlib.util.find_spec("torch_npu") is None:
        return None, None
    before = os.environ.get(_AUTOLOAD)  # "1" is what torch_npu leaves to the processes started from its own
    os.environ[_AUTOLOAD] = "0"
    import torch  # noqa: F401  first without the backend, so that a broken one cannot take torch down with it

    try:
        # torch_npu prints a warning where CANN's variables are not set; stdout is for the tables and JSON of commands.
        with contextlib.redirect_stdout(sys.stderr):
            import torch_npu
    except Exception as error:  # a missing library, an undefined symbol, a version check: each has its own type
        # The variable stays set: processes started from this one must survive their `import torch`, too.
        reason = f"{type(error).__name__}: {error}"
        logger.warning("torch_npu is installed but cannot load (%s), so the NPU is not used. %s", reason, HOW_TO_FIX)
        return None, reason
    if before is None:
        del os.environ[_AUTOLOAD]
    else:
        os.environ[_AUTOLOAD] = before
    return torch_npu, None


torch_npu, failure = _import_torch()


def replaces_cuda() -> bool:
    """Whether torch_npu's transfer_to_npu is on, which makes the functions of torch.cuda those of torch.npu.

    It may be imported at any time, so this must be asked at each use.
    """
    import torch

    if torch_npu is None:
        return False
    of_npu = getattr(getattr(torch, "npu", None), "device_count", None)
    return of_npu is not None and torch.cuda.device_count is of_npu
