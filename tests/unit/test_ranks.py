"""Tests of training.ranks: launchers' variables, devices by rank, collectives between two processes."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import processes
from gloo_ranks import run_ranks
from open_clip import device as devices
from training import distributed, ranks
from training.params import DistributedConfig

SOURCE = Path(__file__).parents[2] / "src"
ALL_VARIABLES = [
    *(name for keys in ranks.LAUNCHERS.values() for name in keys),
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_ID",
]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ALL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks._joined, "world", None)


def set_env(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def config(device="cpu", **options):
    return DistributedConfig(device=device, **options)


# Rank and world size


@pytest.mark.parametrize("launcher", list(ranks.LAUNCHERS))
def test_variables_of_every_launcher(monkeypatch, launcher):
    rank, size, local = ranks.LAUNCHERS[launcher]
    set_env(monkeypatch, **{rank: 5, size: 8, local: 1})
    assert ranks.world_info_from_env() == (1, 5, 8)
    assert distributed.is_using_distributed()


def test_without_a_launcher_there_is_one_process():
    assert ranks.world_info_from_env() == (0, 0, 1)
    assert not distributed.is_using_distributed()


def test_torchrun_inside_slurm_uses_only_the_variables_of_torchrun(monkeypatch):
    set_env(monkeypatch, SLURM_PROCID=0, SLURM_NTASKS=1, SLURM_LOCALID=0, RANK=3, WORLD_SIZE=4, LOCAL_RANK=3)
    assert ranks.world_info_from_env() == (3, 3, 4)


def test_mpirun_inside_slurm_uses_the_variables_of_mpi(monkeypatch):
    set_env(monkeypatch, SLURM_PROCID=0, SLURM_NTASKS=2, SLURM_LOCALID=0)
    set_env(monkeypatch, OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=2, OMPI_COMM_WORLD_LOCAL_RANK=1)
    assert ranks.world_info_from_env() == (1, 1, 2)


def test_a_salloc_shell_is_one_process(monkeypatch):
    set_env(monkeypatch, SLURM_NTASKS=8)  # no SLURM_PROCID: srun did not start this process
    assert ranks.world_info_from_env() == (0, 0, 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "a", "WORLD_SIZE": 2}, "RANK='a' is not an integer"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK=2 must be at least 0 and less than WORLD_SIZE=2"),
    ],
)
def test_errors_name_invalid_variables(monkeypatch, variables, message):
    set_env(monkeypatch, **variables)
    with pytest.raises(RuntimeError, match=message):
        ranks.world_info_from_env()


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node[007-012,020],gpu1", "node007"),
        ("a1,b2", "a1"),
        ("gpu-r1n[3,5]", "gpu-r1n3"),
        ("r[1-2]n[4-8]", "r1n4"),
        ("10.0.0.5,10.0.0.6", "10.0.0.5"),
        ("n[01]-ib,n02", "n01-ib"),
    ],
)
def test_first_host_of_a_slurm_list(nodelist, host):
    assert ranks._first_host(nodelist) == host


# init with one process


def test_single_process():
    world = ranks.init(config())
    assert world == ranks.World(0, 0, 1, torch.device("cpu"), None)
    assert (world.distributed, world.is_master, world.is_local_master) == (False, True, True)
    assert ranks.world() is world
    ranks.barrier()
    assert ranks.broadcast_object("x") == "x"
    assert ranks.all_gather_object("x") == ["x"]
    ranks.shutdown()
    ranks.shutdown()
    assert ranks.world() is not world


def test_world_size_one_under_torchrun_makes_no_group(monkeypatch):
    set_env(monkeypatch, RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
    assert ranks.init(config(dist_backend="hccl")).backend is None


def test_a_device_that_is_missing_is_an_error(monkeypatch):
    monkeypatch.setattr(devices.NpuDevice, "is_available", lambda self: False)
    with pytest.raises(RuntimeError, match="'npu' is not available"):
        ranks.init(config(device="npu"))


@pytest.fixture
def two_ranks(monkeypatch):
    """Make this process the second of two. Joining is recorded, not done."""
    set_env(monkeypatch, RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    joined = {}
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **kwargs: joined.update(kwargs, backend=backend)
    )
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    monkeypatch.setattr(ranks._joined, "host_group", None)
    return joined


def fake_cuda(monkeypatch, current):
    monkeypatch.setattr(devices.CudaDevice, "is_available", lambda self: True)
    monkeypatch.setattr(devices.CudaDevice, "count", lambda self: 2)
    monkeypatch.setattr(devices.CudaDevice, "set_device", lambda self, index: current.append(index))


def test_the_device_gives_the_backend_and_is_current_before_joining(monkeypatch, two_ranks):
    current = []
    fake_cuda(monkeypatch, current)
    world = ranks.init(config(device="cuda"))
    assert world == ranks.World(1, 1, 2, torch.device("cuda:1"), "nccl")
    assert current == [1]
    assert two_ranks["backend"] == "nccl"
    assert (two_ranks["rank"], two_ranks["world_size"]) == (1, 2)
    assert two_ranks["init_method"] == "env://"
    assert two_ranks["timeout"].total_seconds() == 1800
    assert "device_id" not in two_ranks  # HCCL cannot split groups


def test_no_set_device_rank_leaves_the_index_to_the_launcher(monkeypatch, two_ranks):
    fake_cuda(monkeypatch, [])
    assert ranks.init(config(device="cuda", no_set_device_rank=True)).device == torch.device("cuda:0")


def test_a_device_index_with_several_ranks_is_warned_about(monkeypatch, two_ranks, caplog):
    fake_cuda(monkeypatch, [])
    assert ranks.init(config(device="cuda:0")).device == torch.device("cuda:0")
    assert "each rank gets another device" in caplog.text


def test_a_given_backend_and_url_are_used(monkeypatch, two_ranks):
    fake_cuda(monkeypatch, [])
    ranks.init(config(device="cuda", dist_backend="gloo", dist_url="tcp://h:1", dist_timeout=90))
    assert (two_ranks["backend"], two_ranks["init_method"]) == ("gloo", "tcp://h:1")
    assert two_ranks["timeout"].total_seconds() == 90


def test_npu_waits_longer_for_the_first_collective_unless_the_user_set_the_time(monkeypatch, two_ranks):
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "")
    monkeypatch.delenv("HCCL_CONNECT_TIMEOUT")
    monkeypatch.setattr(devices.CpuDevice, "collective_env", devices.NpuDevice.collective_env)
    ranks.init(config())
    assert int(os.environ["HCCL_CONNECT_TIMEOUT"]) > 120
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "7")
    ranks.init(config())
    assert os.environ["HCCL_CONNECT_TIMEOUT"] == "7"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("hccl", "'hccl' cannot transfer tensors of cpu.*torch_npu.*Leave out --dist-backend"),
        ("nccl", "'nccl' cannot transfer tensors of cpu"),
        ("smoke", "'smoke' cannot transfer tensors of cpu"),
        ("npu:hccl", "names no backend for the device of this run, cpu"),
    ],
)
def test_a_backend_that_does_not_support_the_device_is_an_error(monkeypatch, two_ranks, backend, message):
    with pytest.raises(ValueError, match=message):
        ranks.init(config(dist_backend=backend))
    assert two_ranks == {}


def test_a_backend_per_device(monkeypatch, two_ranks):
    ranks.init(config(dist_backend="cpu:gloo,cuda:nccl"))
    assert two_ranks["backend"] == "cpu:gloo,cuda:nccl"


def test_the_error_of_a_missing_rendezvous_names_the_variables(monkeypatch, two_ranks):
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(RuntimeError, match=r"MASTER_ADDR not set.*tcp://HOST:PORT"):
        ranks.init(config())


# The rendezvous

WAITS = """
import logging
from training import distributed, ranks
from training.params import DistributedConfig
logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
ranks.init(DistributedConfig(device="cpu", dist_timeout={timeout}))
"""


@pytest.mark.parametrize(("launcher", "start"), [("torchrun", "torchrun"), ("SLURM", "srun"), ("Open MPI", "mpirun")])
def test_the_error_of_missing_processes_names_their_number_and_the_launcher(launcher, start):
    rank, size, local = ranks.LAUNCHERS[launcher]
    port = free_port()
    variables = {rank: "0", size: "2", local: "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-c", WAITS.format(timeout=1)], env=processes.environment(**variables), text=True,
        capture_output=True, timeout=100, check=False,
    )  # fmt: skip
    advice = f"If you want one process, unset {size}; otherwise start all of them with {start}."
    assert done.returncode == 1
    waiting = f"{size} asks for 2 processes. Waiting for all of them at localhost:{port}, at most 1 s. {advice}"
    assert waiting in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"RuntimeError: {size} asks for 2 processes: not all of them joined at localhost:{port} within 1 s"
    )
    assert last.endswith(advice)


def test_one_process_of_each_host_logs_that_it_waits(monkeypatch, two_ranks, caplog):
    def joins(*_, **__):
        raise RuntimeError("joined")

    monkeypatch.setattr(torch.distributed, "init_process_group", joins)
    for local_rank, expected in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        caplog.clear()
        with caplog.at_level("INFO"), pytest.raises(RuntimeError):
            ranks.init(config())
        assert caplog.text.count("Waiting for all of them") == expected


def test_other_failures_to_join_are_not_reported_as_timeouts(monkeypatch, two_ranks):
    def fails(*_, **__):
        raise RuntimeError("the address is in use " + 1000 * "x ")

    monkeypatch.setattr(torch.distributed, "init_process_group", fails)
    with pytest.raises(RuntimeError, match=r"joining them at 127.0.0.1:1 failed .the address is in use") as raised:
        ranks.init(config())
    assert len(str(raised.value)) < 500


# Functions of open_clip_train


def test_flat_namespace(monkeypatch):
    args = SimpleNamespace(device="cpu", dist_backend=None, dist_url=None, horovod=False, no_set_device_rank=False)
    assert distributed.init_distributed_device(args) == torch.device("cpu")
    assert (args.distributed, args.world_size, args.rank, args.local_rank, args.device) == (False, 1, 0, 0, "cpu")
    assert distributed.is_master(args)
    assert distributed.is_master(args, local=True)
    assert not distributed.is_global_master(SimpleNamespace(rank=1))
    assert not distributed.is_local_master(SimpleNamespace(local_rank=1))


def test_horovod_is_refused():
    assert not distributed.is_using_horovod()
    with pytest.raises(ValueError, match="torchrun"):
        distributed.init_distributed_device_so(device="cpu", horovod=True)


def test_is_device_available(monkeypatch):
    monkeypatch.setattr(devices.XpuDevice, "is_available", lambda self: False)
    assert distributed.is_device_available("cpu")
    assert not distributed.is_device_available("xpu:0")
    assert not distributed.is_device_available("abacus")


# Two processes

TWO_PROCESSES = """
import json, torch
import open_clip.device
from training import ranks as d
from training.params import DistributedConfig
world = d.init(DistributedConfig(device="cpu", dist_backend="gloo"))
broadcast = d.broadcast_object({"from": world.rank} if world.rank == 1 else None, src=1)
gathered = d.all_gather_object("x" * (1 + 999 * world.rank))
d.barrier()
import os
result = [world.rank, world.local_rank, world.world_size, world.backend, broadcast, [len(x) for x in gathered],
          world.is_master, os.environ["WORLD_SIZE"]]
d.shutdown()
print(json.dumps(result))
"""


def free_port() -> int:
    """Find a free port from 20000 to 29999, as for SLURM, that no earlier use keeps in TIME_WAIT."""
    for port in random.SystemRandom().sample(range(20000, 30000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port")


def leave_during_a_collective(rank, world_size):
    if rank == 1:
        time.sleep(1)
    dist.all_reduce(torch.ones(1), async_op=rank == 0)
    ranks.shutdown()


def test_shutdown_during_a_collective_does_not_block(tmp_path):
    """Before torch 2.8 the destructor of the group waits, holding the GIL, for a thread of gloo that needs it."""
    run_ranks(__file__, "leave_during_a_collective", (2,), tmp_path)


@pytest.mark.parametrize("launcher", ["torchrun", "SLURM"])
def test_two_processes(launcher):
    port = free_port()
    if launcher == "torchrun":
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    else:
        shared = {"SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_JOB_ID": str(port - 20000)}
    rank_name, size_name, local_name = ranks.LAUNCHERS[launcher]
    processes = []
    for rank in range(2):
        own = {rank_name: str(rank), size_name: "2", local_name: str(rank)}
        environment = {**os.environ, **shared, **own, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", TWO_PROCESSES],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    try:
        answers = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (out, err) in enumerate(answers):
        assert processes[rank].returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == [rank, rank, 2, "gloo", {"from": 1}, [1, 1000], rank == 0, "2"]
