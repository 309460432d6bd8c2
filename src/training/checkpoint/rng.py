"""Random generators of a process: seeding them, and saving and restoring their states."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch

from open_clip import device as devices


def random_seed(seed: int = 42, rank: int = 0) -> None:
    """Seed the generators of Python, NumPy and torch, including those of all devices, with seed + rank."""
    torch.manual_seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    random.seed(seed + rank)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy, torch on the CPU, and torch on `device`.

    They are tensors and plain values, which `torch.load(weights_only=True)` can read from a checkpoint.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(
        "tuple[str, np.ndarray, int, int, float]", np.random.get_state(legacy=True)
    )
    return {
        "python": {"version": version, "words": _pack(np.array(words, dtype=np.uint32)), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "words": _pack(keys),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        },
        "torch": torch.get_rng_state(),
        "device": {"type": device.type, "state": devices.get(device).rng_state()},
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the states from `rng_state`. The state of another type of device is ignored."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(_unpack(python["words"]).tolist()), python["gauss"]))
    words = _unpack(numpy["words"])
    np.random.set_state((numpy["name"], words, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"].cpu())
    if state["device"]["type"] == device.type:
        devices.get(device).set_rng_state(state["device"]["state"].cpu())


def _pack(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())  # every torch handles int32


def _unpack(words: torch.Tensor) -> np.ndarray:
    return words.cpu().numpy().view(np.uint32)


def torch_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states of torch's generators on the CPU and on `device`, which models use. Does not synchronize."""
    return torch.get_rng_state(), devices.get(device).rng_state()


def set_torch_state(state: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> None:
    """Restore the states from `torch_state`."""
    torch.set_rng_state(state[0])
    devices.get(device).set_rng_state(state[1])


@contextlib.contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Restore the states of all generators at the end of the context.

    So an evaluation between two epochs does not affect training, and a run that is resumed after it continues like one
    without interruption.
    """
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)
