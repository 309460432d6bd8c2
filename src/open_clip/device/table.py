"""The devices that this package knows, in the order of preference, and how a name given by the user is resolved.

A new device is a new file with a subclass of `Device` and an entry in `DEVICES`.
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

# In the order of preference where nothing was asked for.
DEVICES: dict[str, Device] = {
    found.type: found for found in (NpuDevice(), CudaDevice(), XpuDevice(), MpsDevice(), CpuDevice())
}


def _split(name: str) -> tuple[str, int | None]:
    """("npu", 3) of "npu:3"; torch.device() cannot be asked, since it does not know a backend that is not loaded."""
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", name.strip().lower())
    if match is None or match[1] not in DEVICES:
        raise ValueError(f"Unknown device {name!r}. Known: {', '.join(DEVICES)}, npu:0 and so on, auto.")
    return _present(match[1]), None if match[2] is None else int(match[2])


def _present(kind: str) -> str:
    """The kind that runs what was asked of `kind`: the NPU where torch_npu has replaced torch.cuda."""
    return "npu" if kind == "cuda" and npu_loading.replaces_cuda() else kind


def resolve_backend(name: str) -> str:
    """The collective backend that is meant: "hccl" for "nccl" where torch_npu has replaced torch.cuda."""
    return name.replace("cuda", "npu").replace("nccl", "hccl") if npu_loading.replaces_cuda() else name


def get(device: str | torch.device) -> Device:
    """The entry for a device or its name, such as "npu:3". Raises ValueError for an unknown kind."""
    kind = _present(device.type) if isinstance(device, torch.device) else _split(device)[0]
    if kind not in DEVICES:
        raise ValueError(f"Unknown device {kind!r}: known are {', '.join(DEVICES)}.")
    return DEVICES[kind]


def best() -> torch.device:
    """The best device present, without an index."""
    return torch.device(next(found.type for found in DEVICES.values() if found.is_available()))


def as_asked(name: str | int | torch.device | None) -> torch.device:
    """`resolve`, but "npu" stays the process's current one."""
    found = resolve(name)
    if not isinstance(name, (str, torch.device)) or name == "auto":
        return found
    asked = torch.device(name)
    if asked.type == found.type:
        return asked
    return torch.device(found.type) if asked.index is None else found


def resolve(name: str | int | torch.device | None = "auto", local_rank: int | None = None) -> torch.device:
    """The device that is meant: "auto" or None is the best one present; "npu" is npu:`local_rank`, or npu:0; an int is
    the accelerator of that index.

    Raises ValueError for a name that is not known, RuntimeError where the device is not there.
    """
    if name is None or name == "auto":
        kind, index = best().type, None
    elif isinstance(name, int) and not isinstance(name, bool):
        kind, index = best().type, name
        if kind == "cpu":
            raise RuntimeError(f"device={name} means an accelerator, and none is there. Use 'cpu' or 'auto'.")
    else:
        kind, index = _split(str(name))
    found = DEVICES[kind]
    if not found.is_available():
        raise RuntimeError(f"Device {str(name)!r} was asked for and is not there. {found.why_missing()}")
    if not found.indexed:
        return torch.device(kind)
    if index is None:
        index = local_rank or 0
    if index >= found.count():
        raise RuntimeError(
            f"{kind}:{index} was asked for, and this host shows {found.count()} {kind} device(s): start at most that "
            "many processes on it, or name an index below that number."
        )
    return torch.device(kind, index)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's or the host's memory did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(re.search(kind.out_of_memory, text) for kind in DEVICES.values())


def hint(error_text: str) -> str | None:
    """What to do about an error, by the codes of any device in its text; None for an error without a known code."""
    hints = (kind.hint(error_text) for kind in DEVICES.values())
    return next((found for found in hints if found is not None), None)
