"""Import torch_npu so that a failure does not break `import torch`.

torch imports installed backends. If torch_npu is installed but CANN's environment is not sourced, `import torch` itself
raises. Import this module before torch: it imports torch without backends and then torch_npu, and logs one warning if
torch_npu fails. No device driver is initialized.
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
    "the torch_npu for this torch version (all three numbers). `python -m training.doctor` gives details."
)


def _import_torch() -> tuple[ModuleType | None, str | None]:
    """Import torch, then torch_npu if installed. Return (torch_npu or None, why it could not load or None)."""
    if importlib.util.find_spec("torch_npu") is None:
        return None, None
    before = os.environ.get(_AUTOLOAD)  # torch_npu sets "1" for child processes
    os.environ[_AUTOLOAD] = "0"
    import torch  # noqa: F401  first without backends, so that a broken one does not break it

    try:
        # torch_npu prints a warning if CANN's variables are not set, and stdout is for the output of commands.
        with contextlib.redirect_stdout(sys.stderr):
            import torch_npu
    except Exception as error:  # a missing library, an undefined symbol and a version check raise different types
        # The variable stays set, so that `import torch` works in child processes, too.
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
    """Return whether torch_npu's transfer_to_npu is on, which replaces the functions of torch.cuda by torch.npu's.

    A program may import it at any time, so do not cache the result.
    """
    import torch

    if torch_npu is None:
        return False
    npu_function = getattr(getattr(torch, "npu", None), "device_count", None)
    return npu_function is not None and torch.cuda.device_count is npu_function
