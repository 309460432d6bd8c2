"""Functions of open_clip_train.distributed, for scripts. They take the flat namespace of `params.parse_args`."""

from __future__ import annotations

from typing import Any

import torch

from open_clip import device as devices
from training import ranks
from training.params import DistributedConfig, read_section
from training.params.options import UnsupportedConfig
from training.ranks import set_device, world_info_from_env

__all__ = [
    "all_gather_object", "broadcast_object", "init_distributed_device", "init_distributed_device_so",
    "is_device_available", "is_global_master", "is_local_master", "is_master", "is_using_distributed",
    "is_using_horovod", "set_device", "world_info_from_env",
]  # fmt: skip


def is_global_master(args: Any) -> bool:
    return args.rank == 0


def is_local_master(args: Any) -> bool:
    return args.local_rank == 0


def is_master(args: Any, local: bool = False) -> bool:
    return is_local_master(args) if local else is_global_master(args)


def is_device_available(device: str | torch.device) -> bool:
    """Return whether the device is available. An unknown name gives False."""
    try:
        devices.resolve(device)
    except (RuntimeError, ValueError):
        return False
    return True


def is_using_horovod() -> bool:
    """Return False: Horovod is not supported."""
    return False


def is_using_distributed() -> bool:
    return world_info_from_env()[2] > 1


def init_distributed_device(args: Any) -> torch.device:
    """Call `ranks.init` with a flat namespace and set its distributed, world_size, rank, local_rank and device."""
    _refuse_horovod(read_section(UnsupportedConfig, args).horovod)
    here = ranks.init(read_section(DistributedConfig, args))
    args.distributed = here.distributed
    args.world_size = here.world_size
    args.rank = here.rank
    args.local_rank = here.local_rank
    args.device = str(here.device)
    return here.device


def init_distributed_device_so(
    device: str = "auto",
    dist_backend: str | None = None,
    dist_url: str | None = None,
    horovod: bool = False,
    no_set_device_rank: bool = False,
) -> dict[str, Any]:
    """Call `ranks.init` with keywords; return {"device", "global_rank", "local_rank", "world_size", "distributed"}."""
    _refuse_horovod(horovod)
    here = ranks.init(
        DistributedConfig(
            device=device, dist_backend=dist_backend, dist_url=dist_url, no_set_device_rank=no_set_device_rank
        )
    )
    return {
        "device": str(here.device),
        "global_rank": here.rank,
        "local_rank": here.local_rank,
        "world_size": here.world_size,
        "distributed": here.distributed,
    }


def _refuse_horovod(horovod: bool) -> None:
    if horovod:
        raise ValueError("--horovod is not supported. Start the processes with torchrun.")


def broadcast_object(args: Any, obj: Any, src: int = 0) -> Any:
    """Return the object of rank `src` on every rank, with any backend. `args` has no effect."""
    return ranks.broadcast_object(obj, src)


def all_gather_object(args: Any, obj: Any, dst: int = 0) -> list[Any]:
    """Return the objects of all ranks in order, on every rank. `args` and `dst` have no effect."""
    return ranks.all_gather_object(obj)
