"""The processes of a run: rank and world size (torchrun, SLURM, MPI), device, process groups, collectives on objects.

`init` finds the rank, chooses the device, makes it current, and joins the other processes, in this order: NCCL and HCCL
bind a communicator to the current device.
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

# Variables by launcher: rank, world size, rank within the node. Variables of two launchers are never mixed. MPI comes
# before SLURM: under `mpirun` inside a SLURM job, SLURM's variables describe the job and not the process.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


@dataclass(frozen=True)
class World:
    """Rank, device and backend of this process."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    backend: str | None  # of the process group; None without one

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    @property
    def is_local_master(self) -> bool:
        return self.local_rank == 0


# Hosts wait for each other without a time limit, because one of them may download, read a checkpoint or evaluate for
# long. A process that dies closes its connections, which ends the wait immediately, and `wait` lets Python handle
# signals. The wait for the next batch of training data is limited by --dist-timeout.
_HOST_TIMEOUT = datetime.timedelta(days=30)
_WAIT_SLICE = datetime.timedelta(seconds=0.25)  # Python's signal handlers run between two slices
_WARN_AFTER = 60.0  # seconds


@dataclass
class _Joined:
    """What `init` has made.

    Attributes:
        world: None before `init`.
        host_group: a gloo group, in addition to the default group.
        timeout: --dist-timeout, in seconds.
    """

    world: World | None = None
    host_group: Any = None
    timeout: float = DistributedConfig().dist_timeout


_joined = _Joined()


def init(cfg: DistributedConfig) -> World:
    """Join the run that the launcher's variables describe and make the device of this process current.

    Raises:
        RuntimeError: the device is missing, or the processes could not join.
        ValueError: the backend cannot transfer tensors of the device.
    """
    local_rank, rank, world_size = world_info_from_env()
    device = devices.resolve(cfg.device, None if cfg.no_set_device_rank else local_rank)
    if cfg.deterministic:
        devices.get(device).set_deterministic()  # before its first use, because libraries read the environment once
    set_device(device)
    backend = None
    if world_size > 1:
        if device.index not in (None, local_rank) and not cfg.no_set_device_rank:
            logger.warning(
                "Local rank %d runs on %s, because --device has an index. Without an index each rank gets another "
                "device.",
                local_rank,
                device,
            )
        backend = devices.resolve_backend(cfg.dist_backend or devices.get(device).backend)
        backend = _check_backend(backend, device)
        _joined.timeout = cfg.dist_timeout
        _join(backend, cfg.dist_url or "env://", device, rank, local_rank, world_size)
    elif cfg.dist_backend:
        logger.info("--dist-backend %s has no effect: this run has one process.", cfg.dist_backend)
    _joined.world = World(rank, local_rank, world_size, device, backend)
    logger.info("Rank %d of %d on %s (%s).", rank, world_size, device, backend or "one process")
    return _joined.world


def world() -> World:
    """Return the world of `init`, else of a process group that the program has made, else of a single process."""
    if _joined.world is not None:
        return _joined.world
    if dist.is_available() and dist.is_initialized():
        local_rank = world_info_from_env()[0]
        return World(dist.get_rank(), local_rank, dist.get_world_size(), devices.resolve("auto"), dist.get_backend())
    return World(0, 0, 1, devices.resolve("auto"), None)


def shutdown() -> None:
    """Destroy the process groups. It may be called twice or without `init`."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # reference cycles of DDP keep the group, which can abort the process at the interpreter's end
        # Before torch 2.8 the destructor of a process group holds the GIL while it waits for gloo's threads, which may
        # need the GIL to free a tensor. A backend that is freed after its group releases the GIL.
        backends = _cpu_backends()
        dist.destroy_process_group()
        _joined.host_group = None
        del backends
    _joined.world = _joined.host_group = None


def _cpu_backends() -> list[Any]:
    cpu = torch.device("cpu")
    groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(cpu) for group in groups if cpu in group._device_types]


def leave() -> None:
    """Wait for all ranks, then `shutdown`. A rank that leaves early would break the shutdown of the others."""
    barrier()
    shutdown()


def barrier() -> None:
    """Wait without a time limit until every rank has called this. A signal interrupts the wait.

    Raises:
        RuntimeError: another process has died.
    """
    if world().distributed:
        # A reduction, because `dist.barrier` guesses the device.
        token = torch.ones(1, device=collective_device())
        wait(dist.all_reduce(token, group=host_group(), async_op=True))
        token.item()  # collectives of a device are asynchronous; this waits


def wait(work: Any, for_what: str | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait for an asynchronous collective in slices, so that Python's signal handlers can run.

    Args:
        work: the result of a collective with async_op=True.
        for_what: what the other processes may be waiting for. If given, the wait is limited to --dist-timeout.
        meanwhile: called a few times per second.

    Raises:
        RuntimeError: another process has died, or the time limit is reached.
    """
    start, logged = time.monotonic(), 0.0
    # Other backends abort a collective whose wait times out.
    in_slices = host_group() is not None or dist.get_backend() == "gloo"
    while in_slices and not work.is_completed():
        meanwhile()
        with contextlib.suppress(RuntimeError):  # the slice has ended; an error of the collective is raised below
            work.wait(_WAIT_SLICE)
        waited = time.monotonic() - start
        if for_what is not None and waited > _joined.timeout:
            raise RuntimeError(
                f"Another process has waited {waited:.0f} s for {for_what}, longer than --dist-timeout "
                f"{_joined.timeout:g}. Check the storage that holds its data, or increase --dist-timeout."
            )
        if waited > max(_WARN_AFTER, 2 * logged):
            logged = waited
            logger.warning("Rank %d has waited %.0f s for another process.", world().rank, waited)
    work.wait()


def announce_stop(number: int) -> None:
    """Announce to the other processes that this one received a signal to stop."""
    _store().set(_stop_key(), str(number))


def announced_stop() -> int:
    """Return the signal that another process has announced, or 0."""
    if not world().distributed:
        return 0
    store = _store()
    return int(store.get(_stop_key())) if store.check([_stop_key()]) else 0


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _stop_key() -> str:
    return f"open_clip_stop_{restarts()}"


def says_that_a_peer_died(error: BaseException) -> bool:
    """Return whether an error means that another process has ended, such as a closed connection."""
    text = str(error).lower()
    signs = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "gloo/transport", "socket timeout")
    return isinstance(error, RuntimeError) and world().distributed and any(sign in text for sign in signs)


def host_group() -> Any:
    """Return the gloo group for CPU tensors, or None (the default group) if the program made the process group."""
    return _joined.host_group


def world_info_from_env() -> tuple[int, int, int]:
    """Return (local rank, rank, world size) from the launcher's variables; (0, 0, 1) without a launcher."""
    launcher = _launcher()
    if launcher is None:
        return 0, 0, 1
    rank_name, size_name, local_name = LAUNCHERS[launcher]
    rank, world_size = _integer(rank_name), _integer(size_name)
    if not 0 <= rank < world_size:
        raise RuntimeError(f"{rank_name}={rank} must be at least 0 and less than {size_name}={world_size}.")
    return _integer(local_name) if local_name in os.environ else 0, rank, world_size


def create_host_group() -> Any:
    """Create another gloo group of all ranks, for a thread; None for a single process. Collective."""
    return dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT) if world().distributed else None


def restarts() -> int:
    """Return how often torchrun (--max-restarts) has restarted the processes after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _launcher() -> str | None:
    return next((name for name, keys in LAUNCHERS.items() if keys[0] in os.environ and keys[1] in os.environ), None)


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise RuntimeError(f"The environment variable {name}={os.environ[name]!r} is not an integer.") from None


def _check_backend(backend: str, device: torch.device) -> str:
    """Return `backend` ("hccl" or "cpu:gloo,npu:hccl") after checking that it can transfer tensors of `device`."""
    pairs = [pair.rpartition(":") for pair in backend.split(",")]
    named = next((name for kind, _, name in pairs if kind in ("", device.type)), None)
    own = devices.get(device).backend
    advice = f"Leave out --dist-backend (the default is {own}), or choose another --device."
    if named is None:
        raise ValueError(f"--dist-backend {backend!r} names no backend for the device of this run, {device}. {advice}")
    moved = dist.Backend.backend_capability.get(named.lower())
    owner = next((kind for kind in devices.DEVICES.values() if kind.backend == named.lower()), None)
    if moved is None or device.type not in moved:
        missing = owner.why_missing() if owner else None
        raise ValueError(
            f"--dist-backend {backend!r} cannot transfer tensors of {device}, the device of this run. "
            f"{missing or ''} {advice}".replace("  ", " ")
        )
    if not dist.is_backend_available(named.lower()):
        raise ValueError(f"This torch ({torch.__version__}) is built without the backend {named!r}. {advice}")
    return backend


def _join(backend: str, url: str, device: torch.device, rank: int, local_rank: int, world_size: int) -> None:
    expected, advice = _expected(world_size)
    if url.startswith("env://"):
        _set_rendezvous()
    # Libraries that split data by worker (webdataset) read these, with any launcher.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size))
    for name, value in devices.get(device).collective_env.items():
        os.environ.setdefault(name, value)
    address = url.removeprefix("tcp://")
    if url.startswith("env://"):
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if local_rank == 0:  # once on each host
        logger.info("%s. Waiting for all of them at %s, at most %g s. %s", expected, address, _joined.timeout, advice)
    try:
        _make_groups(backend, url, rank, world_size)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        failure = f"joining them at {address} failed"
        if "timed out" in reason.lower():
            failure = f"not all of them joined at {address} within {_joined.timeout:g} s"
        raise RuntimeError(f"{expected}: {failure} ({reason}). {advice}") from error


def _expected(world_size: int) -> tuple[str, str]:
    """Return ("SLURM_NTASKS asks for 2 processes", what to do if that is wrong), from the launcher's variables."""
    launcher = _launcher()
    assert launcher is not None
    size_name = LAUNCHERS[launcher][1]
    start = {"torchrun": "torchrun", "SLURM": "srun"}.get(launcher, "mpirun")
    return (
        f"{size_name} asks for {world_size} processes",
        f"If you want one process, unset {size_name}; otherwise start all of them with {start}.",
    )


def _make_groups(backend: str, url: str, rank: int, world_size: int) -> None:
    timeout = datetime.timedelta(seconds=_joined.timeout)
    where: dict[str, Any] = {"init_method": url}
    if restarts() > 0:
        # The launcher's store still has the addresses of the processes before the restart.
        store = next(iter(rendezvous(url, rank, world_size, timeout=timeout)))[0]
        where = {"store": dist.PrefixStore(f"restart_{restarts()}", store)}
    # No device_id: with one, a device mesh asks the backend to split a group, which HCCL cannot do.
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, **where)
    _joined.host_group = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)


def _set_rendezvous() -> None:
    """Set MASTER_ADDR and MASTER_PORT from the SLURM job, the same on every rank. torchrun sets them itself."""
    if _launcher() == "SLURM" and "SLURM_JOB_NODELIST" in os.environ:
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ["SLURM_JOB_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 10000))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"{' and '.join(missing)} not set, so the processes cannot find each other. Set MASTER_ADDR (the host of "
            "rank 0) and MASTER_PORT (a free port there), use --dist-url tcp://HOST:PORT, or start with torchrun."
        )


def _first_host(nodelist: str) -> str:
    """Return the first host of SLURM's list: "node[007-012,020],gpu1" -> "node007"."""
    first = re.match(r"[^\[,]+(?:\[[^\]]*\][^\[,]*)*", nodelist.strip())
    if first is None:
        raise RuntimeError(f"SLURM_JOB_NODELIST={nodelist!r} has no host name. Set MASTER_ADDR.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def collective_device() -> torch.device:
    """Return the device for tensors that hosts exchange: the CPU, unless the only group has the device's backend."""
    joined = world()
    has_device_group = host_group() is None and joined.backend == devices.get(joined.device).backend
    return joined.device if has_device_group else torch.device("cpu")


def set_device(device: str | torch.device) -> None:
    """Make the device current if it has an index."""
    device = torch.device(device)
    if device.index is not None:
        devices.get(device).set_device(device.index)


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """Return the object of rank `src` on every rank, with any backend."""
    if not world().distributed:
        return obj
    barrier()  # unlike the next line, it lets Python handle signals while it waits
    objects = [obj]
    dist.broadcast_object_list(objects, src=src, device=collective_device(), group=host_group())
    return objects[0]


def all_gather_object(obj: Any) -> list[Any]:
    """Return the objects of all ranks in order, on every rank."""
    if not world().distributed:
        return [obj]
    barrier()  # unlike the next line, it lets Python handle signals while it waits
    objects: list[Any] = [None] * world().world_size
    dist.all_gather_object(objects, obj, group=host_group())
    return objects
