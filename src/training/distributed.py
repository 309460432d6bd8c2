"""Processes of a run: who this one is (torchrun, SLURM, MPI), its device, and its collectives.

`init` sequences: find the rank, choose the device, make it current, join the others. The device comes first, because
NCCL and HCCL bind a communicator to the device that is current.
"""
from __future__ import annotations

import contextlib
import datetime
import gc
import logging
import os
import re
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from open_clip import device as devices
from training.params import DistributedConfig

logger = logging.getLogger(__name__)

# Variables by launcher: rank, world size, rank within the node. One launcher's are never mixed with another's. MPI
# comes before SLURM: under `mpirun` inside a SLURM job, SLURM's variables describe the job and not the process.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    backend: str | None  # of the process group; None where there is none

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    @property
    def is_local_master(self) -> bool:
        return self.local_rank == 0


_world: World | None = None
_host_group: Any = None  # of gloo, beside the devices' backend

# Hosts wait for each other without a time limit: one of them may rightly be busy for long (it downloads, reads a
# checkpoint, evaluates more than the others). One that died closes its connections, which ends the wait at once, and
# `wait` lets signals through. The next batch of training data has the limit of --dist-timeout.
_PATIENCE = datetime.timedelta(days=30)
_SLICE = datetime.timedelta(seconds=0.25)  # Python's signal handlers run between two of them
_WARN_AFTER = 60.0  # seconds
_timeout = DistributedConfig().dist_timeout  # seconds


def init(cfg: DistributedConfig) -> World:
    """Joins the run that the launcher's variables describe and makes this process's device current.

    Raises RuntimeError for a device or a rendezvous that is not there, ValueError for a backend that cannot move the
    device's tensors.
    """
    global _world, _timeout
    local_rank, rank, world_size = world_info_from_env()
    device = devices.resolve(cfg.device, None if cfg.no_set_device_rank else local_rank)
    if cfg.deterministic:
        devices.get(device).set_deterministic()  # before the device is used: libraries read the environment once
    set_device(device)
    backend = None
    if world_size > 1:
        if device.index not in (None, local_rank) and not cfg.no_set_device_rank:
            logger.warning(
                "Local rank %d runs on %s: --device names an index. Without one, each rank gets a device of its own.",
                local_rank,
                device,
            )
        backend = devices.resolve_backend(cfg.dist_backend or devices.get(device).backend)
        backend = _check_backend(backend, device)
        _timeout = cfg.dist_timeout
        _join(backend, cfg.dist_url or "env://", device, rank, local_rank, world_size)
    elif cfg.dist_backend:
        logger.info("--dist-backend %s has no effect: this run has one process.", cfg.dist_backend)
    _world = World(rank, local_rank, world_size, device, backend)
    logger.info("Rank %d of %d on %s (%s).", rank, world_size, device, backend or "one process")
    return _world


def world() -> World:
    """This process's place: that of `init`, of a process group made by others, or a single process."""
    if _world is not None:
        return _world
    if dist.is_available() and dist.is_initialized():
        local_rank = world_info_from_env()[0]
        return World(dist.get_rank(), local_rank, dist.get_world_size(), devices.resolve("auto"), dist.get_backend())
    return World(0, 0, 1, devices.resolve("auto"), None)


def shutdown() -> None:
    """Leaves the run; safe to call twice or without `init`."""
    global _world, _host_group
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # DDP's cycles hold the group; one that lives until the interpreter ends can abort the process
        # Before torch 2.8 a process group holds the GIL while its destructor waits for gloo's threads, and such a
        # thread may need the GIL to free a tensor. Backends that are freed after their group release the GIL.
        backends = _cpu_backends()
        dist.destroy_process_group()
        _host_group = None
        del backends
    _world = _host_group = None


def _cpu_backends() -> list[Any]:
    cpu = torch.device("cpu")
    groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(cpu) for group in groups if cpu in group._device_types]


def leave() -> None:
    """`shutdown` of all ranks together: who leaves early takes with it what the others still use to leave."""
    barrier()
    shutdown()


def barrier() -> None:
    """Returns when every rank has called it, however long that takes; raises RuntimeError where one has died.

    A signal ends the wait. A reduction rather than `dist.barrier`, which guesses the device.
    """
    if world().distributed:
        token = torch.ones(1, device=collective_device())
        wait(dist.all_reduce(token, group=host_group(), async_op=True))
        token.item()  # a device's collectives only queue: this waits


def wait(work: Any, for_what: str | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Waits for an asynchronous collective so that Python's signal handlers run meanwhile.

    Args:
        work: what a collective with async_op=True returned.
        for_what: what another process may be waiting for; gives the wait the limit of --dist-timeout.
        meanwhile: called a few times a second.

    Raises:
        RuntimeError: another process has died, or the wait has reached its limit.
    """
    start, logged = time.monotonic(), 0.0
    in_slices = host_group() is not None or dist.get_backend() == "gloo"  # others abort what is not done in time
    while in_slices and not work.is_completed():
        meanwhile()
        with contextlib.suppress(RuntimeError):  # not there yet; an error of the collective is raised below
            work.wait(_SLICE)
        waited = time.monotonic() - start
        if for_what is not None and waited > _timeout:
            raise RuntimeError(
                f"Another process has waited {waited:.0f} s for {for_what}, longer than --dist-timeout {_timeout:g} "
                "allows. Look at the storage that its data are on."
            )
        if waited > max(_WARN_AFTER, 2 * logged):
            logged = waited
            logger.warning("Rank %d has waited %.0f s for another process.", world().rank, waited)
    work.wait()


def announce_stop(number: int) -> None:
    """Tells the other processes that this one was told to stop by a signal."""
    _store().set(_stop_key(), str(number))


def announced_stop() -> int:
    """The signal that another process has announced, or 0."""
    if not world().distributed:
        return 0
    store = _store()
    return int(store.get(_stop_key())) if store.check([_stop_key()]) else 0


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _stop_key() -> str:
    return f"open_clip_stop_{restarts()}"


def says_that_a_peer_died(error: BaseException) -> bool:
    """Whether an error is only what another process's end looks like from here."""
    text = str(error).lower()
    signs = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "gloo/transport", "socket timeout")
    return isinstance(error, RuntimeError) and world().distributed and any(sign in text for sign in signs)


def host_group() -> Any:
    """The group for what hosts tell each other: gloo, on CPU tensors. None (the default) in a group made by others."""
    return _host_group


def world_info_from_env() -> tuple[int, int, int]:
    """(rank within the node, rank, world size) from the launcher's variables; (0, 0, 1) without a launcher."""
    launcher = _launcher()
    if launcher is None:
        return 0, 0, 1
    rank_name, size_name, local_name = LAUNCHERS[launcher]
    rank, world_size = _integer(rank_name), _integer(size_name)
    if not 0 <= rank < world_size:
        raise RuntimeError(f"{rank_name}={rank} is not below {size_name}={world_size}: these variables disagree.")
    return _integer(local_name) if local_name in os.environ else 0, rank, world_size


def restarts() -> int:
    """How often torchrun (--max-restarts) has started these processes anew, after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _launcher() -> str | None:
    return next((name for name, keys in LAUNCHERS.items() if keys[0] in os.environ and keys[1] in os.environ), None)


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise RuntimeError(f"The environment variable {name}={os.environ[name]!r} is not a whole number.") from None


def _check_backend(backend: str, device: torch.device) -> str:
    """`backend` ("hccl", or "cpu:gloo,npu:hccl") if it is there and moves tensors of `device`."""
    pairs = [pair.rpartition(":") for pair in backend.split(",")]
    named = next((name for kind, _, name in pairs if kind in ("", device.type)), None)
    own = devices.get(device).backend
    advice = f"Leave --dist-backend out (it is then {own}), or choose another --device."
    if named is None:
        raise ValueError(f"--dist-backend {backend!r} names no backend for this run's device, {device}. {advice}")
    moved = dist.Backend.backend_capability.get(named.lower())
    owner = next((kind for kind in devices.DEVICES.values() if kind.backend == named.lower()), None)
    if moved is None or device.type not in moved:
        missing = owner.why_missing() if owner else None
        raise ValueError(
            f"--dist-backend {backend!r} cannot move tensors of {device}, which this run uses. {missing or ''} {advice}"
            .replace("  ", " ")
        )
    if not dist.is_backend_available(named.lower()):
        raise ValueError(f"This torch ({torch.__version__}) is built without the backend {named!r}. {advice}")
    return backend


def _join(backend: str, url: str, device: torch.device, rank: int, local_rank: int, world_size: int) -> None:
    expected, advice = _expected(world_size)
    if url.startswith("env://"):
        _set_rendezvous()
    # Libraries that split data by worker (webdataset) read these, whoever the launcher was.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size))
    for name, value in devices.get(device).collective_env.items():
        os.environ.setdefault(name, value)
    place = url.removeprefix("tcp://")
    if url.startswith("env://"):
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if local_rank == 0:  # once on each host
        logger.info("%s: waiting for the others at %s, at most %g s. %s", expected, place, _timeout, advice)
    try:
        _make_groups(backend, url, rank, world_size)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        late = "timed out" in reason.lower()
        what = f"they did not all come to {place} within {_timeout:g} s" if late else f"joining them at {place} failed"
        raise RuntimeError(f"{expected}: {what} ({reason}). {advice}") from error


def _expected(world_size: int) -> tuple[str, str]:
    """("SLURM_NTASKS says 2 processes", what to do if that is wrong), by the launcher's variables."""
    launcher = _launcher()
    assert launcher is not None
    size_name = LAUNCHERS[launcher][1]
    start = {"torchrun": "torchrun", "SLURM": "srun"}.get(launcher, "mpirun")
    return (
        f"{size_name} says {world_size} processes",
        f"For one process unset {size_name}, or start all of them with {start}.",
    )


def _make_groups(backend: str, url: str, rank: int, world_size: int) -> None:
    global _host_group
    timeout = datetime.timedelta(seconds=_timeout)
    where: dict[str, Any] = {"init_method": url}
    if restarts() > 0:
        # The launcher's store is the one of the processes before, and has their addresses in it.
        store = next(iter(rendezvous(url, rank, world_size, timeout=timeout)))[0]
        where = {"store": dist.PrefixStore(f"restart_{restarts()}", store)}
    # No device_id: with one, a later mesh asks the backend to split a group, which HCCL cannot.
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, **where)
    _host_group = dist.new_group(backend="gloo", timeout=_PATIENCE)


def _set_rendezvous() -> None:
    """MASTER_ADDR and MASTER_PORT: torchrun sets them; under SLURM they follow from the job, the same on every rank."""
    if _launcher() == "SLURM" and "SLURM_JOB_NODELIST" in os.environ:
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ["SLURM_JOB_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 10000))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"{' and '.join(missing)} not set, so the processes cannot find each other: export MASTER_ADDR (the host "
            "of rank 0) and MASTER_PORT (a free port there), give --dist-url tcp://HOST:PORT, or start with torchrun."
        )


def _first_host(nodelist: str) -> str:
    """The first host of SLURM's list: "node[007-012,020],gpu1" -> "node007"."""
    first = re.match(r"[^\[,]+(?:\[[^\]]*\][^\[,]*)*", nodelist.strip())
    if first is None:
        raise RuntimeError(f"SLURM_JOB_NODELIST={nodelist!r} names no host: export MASTER_ADDR.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def collective_device() -> torch.device:
    """Where tensors that hosts exchange must be: on the CPU, unless there is no `host_group` and the backend is the
    device's."""
    here = world()
    own = host_group() is None and here.backend == devices.get(here.device).backend
    return here.device if own else torch.device("cpu")


# Names of open_clip_train.distributed, which take the flat namespace of `params.parse_args`.


def is_global_master(args: Any) -> bool:
    return args.rank == 0


def is_local_master(args: Any) -> bool:
    return args.local_rank == 0


def is_master(args: Any, local: bool = False) -> bool:
    return is_local_master(args) if local else is_global_master(args)


def is_device_available(device: str | torch.device) -> bool:
    """Whether the device is there; an unknown name is False, not an error."""
    try:
        devices.resolve(device)
    except (RuntimeError, ValueError):
        return False
    return True


def set_device(device: str | torch.device) -> None:
    """Makes a device with an index the process's current one."""
    device = torch.device(device)
    if device.index is not None:
        devices.get(device).set_device(device.index)


def is_using_horovod() -> bool:
    """Always False: Horovod is not served; torchrun is."""
    return False


def is_using_distributed() -> bool:
    return world_info_from_env()[2] > 1


def init_distributed_device(args: Any) -> torch.device:
    """`init` with a flat namespace, into which distributed, world_size, rank, local_rank and device are written."""
    found = init_distributed_device_so(
        device=args.device,
        dist_backend=getattr(args, "dist_backend", None),
        dist_url=getattr(args, "dist_url", None),
        horovod=getattr(args, "horovod", False),
        no_set_device_rank=getattr(args, "no_set_device_rank", False),
    )
    args.distributed = found["distributed"]
    args.world_size = found["world_size"]
    args.rank = found["global_rank"]
    args.local_rank = found["local_rank"]
    args.device = found["device"]
    return torch.device(args.device)


def init_distributed_device_so(
    device: str = "auto",
    dist_backend: str | None = None,
    dist_url: str | None = None,
    horovod: bool = False,
    no_set_device_rank: bool = False,
) -> dict[str, Any]:
    """`init` with keywords; {"device", "global_rank", "local_rank", "world_size", "distributed"}."""
    if horovod:
        raise ValueError("--horovod is not served: start the processes with torchrun.")
    here = init(
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


def broadcast_object(args: Any, obj: Any, src: int = 0) -> Any:
    """The object of rank `src`, on every rank; any backend."""
    here = world()
    if not here.distributed:
        return obj
    barrier()  # the wait, which lets signals through
    objects = [obj]
    dist.broadcast_object_list(objects, src=src, device=collective_device(), group=host_group())
    return objects[0]


def all_gather_object(args: Any, obj: Any, dst: int = 0) -> list[Any]:
    """The objects of all ranks in their order, on every rank; `dst` is kept for the original's callers."""
    here = world()
    if not here.distributed:
        return [obj]
    barrier()  # the wait, which lets signals through
    objects: list[Any] = [None] * here.world_size
    dist.all_gather_object(objects, obj, group=host_group())
    return objects
