"""The supported device types in order of preference, and the functions that resolve device names.

To add a device type, add a file with a subclass of `Device` and an entry in `DEVICES`.
"""

from __future__ import annotations

import re

import torch

from . import npu_loading
from .base import Device
from .cpu import CpuDevice
from .cuda import CudaDevice
from .mps import MpsDevice
from .npu import NpuDevice
from .xpu import XpuDevice

# In order of preference for "auto".
DEVICES: dict[str, Device] = {
    found.type: found for found in (NpuDevice(), CudaDevice(), XpuDevice(), MpsDevice(), CpuDevice())
}


def _split(name: str) -> tuple[str, int | None]:
    """Split "npu:3" into ("npu", 3). torch.device() is not used, because it rejects backends that are not loaded."""
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", name.strip().lower())
    if match is None or match[1] not in DEVICES:
        raise ValueError(f"Unknown device {name!r}. Use one of {', '.join(DEVICES)}, auto, or an index such as npu:0.")
    return _replace_cuda(match[1]), None if match[2] is None else int(match[2])


def _replace_cuda(kind: str) -> str:
    """Return "npu" for "cuda" if torch_npu has replaced torch.cuda, otherwise `kind`."""
    return "npu" if kind == "cuda" and npu_loading.replaces_cuda() else kind


def resolve_backend(name: str) -> str:
    """Return the name of the collective backend: "hccl" for "nccl" if torch_npu has replaced torch.cuda."""
    return name.replace("cuda", "npu").replace("nccl", "hccl") if npu_loading.replaces_cuda() else name


def get(device: str | torch.device) -> Device:
    """Return the `Device` for a device or its name, such as "npu:3".

    Raises:
        ValueError: the device type is not known.
    """
    kind = _replace_cuda(device.type) if isinstance(device, torch.device) else _split(device)[0]
    if kind not in DEVICES:
        raise ValueError(f"Unknown device {kind!r}. Use one of {', '.join(DEVICES)}.")
    return DEVICES[kind]


def best() -> torch.device:
    """Return the most preferred device that is available, without an index."""
    return torch.device(next(found.type for found in DEVICES.values() if found.is_available()))


def as_asked(name: str | int | torch.device | None) -> torch.device:
    """Resolve a device as `resolve` does, but keep a name without index, such as "npu", for the current device."""
    found = resolve(name)
    if not isinstance(name, (str, torch.device)) or name == "auto":
        return found
    given = torch.device(name)
    if given.type == found.type:
        return given
    return torch.device(found.type) if given.index is None else found


def resolve(name: str | int | torch.device | None = "auto", local_rank: int | None = None) -> torch.device:
    """Resolve a device name.

    Args:
        name: "auto" or None for the best available device; a type such as "npu" for npu:`local_rank`, or npu:0; a type
            with an index; or an int for the accelerator with this index.
        local_rank: the index for names without one.

    Raises:
        ValueError: the name is not known.
        RuntimeError: the device is not available.
    """
    if name is None or name == "auto":
        kind, index = best().type, None
    elif isinstance(name, int) and not isinstance(name, bool):
        kind, index = best().type, name
        if kind == "cpu":
            raise RuntimeError(f"device={name} selects an accelerator, and none is available. Use 'cpu' or 'auto'.")
    else:
        kind, index = _split(str(name))
    found = DEVICES[kind]
    if not found.is_available():
        raise RuntimeError(f"Device {str(name)!r} is not available. {found.why_missing()}")
    if not found.indexed:
        return torch.device(kind)
    if index is None:
        index = local_rank or 0
    if index >= found.count():
        raise RuntimeError(
            f"{kind}:{index} does not exist: this host has {found.count()} {kind} device(s). Use a lower index, or "
            "start at most that many processes."
        )
    return torch.device(kind, index)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports that the device or the host is out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(re.search(kind.out_of_memory, text) for kind in DEVICES.values())


def hint(error_text: str) -> str | None:
    """Return advice for an error from the codes of any device in its message, or None if it has no known code."""
    hints = (kind.hint(error_text) for kind in DEVICES.values())
    return next((found for found in hints if found is not None), None)
