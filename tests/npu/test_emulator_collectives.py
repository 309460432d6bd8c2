"""The emulated HCCL with the real ProcessGroupHCCL: each collective against its definition, and errors."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from emulated import finish_ranks, printed, run_ranks, start_ranks

START = """
import os, sys
import open_clip.device
import torch
import torch.distributed as dist

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.npu.set_device(rank)
dist.init_process_group("hccl")

def mine(r=rank):
    return torch.arange(4.0, device="npu") + 10 * r

def same(name, ours, expected):
    expected = torch.as_tensor(expected, dtype=ours.dtype)
    assert torch.equal(ours.cpu(), expected), (name, rank, ours, expected)
"""

EVERY_COLLECTIVE = (
    START
    + """
total = sum(mine(r) for r in range(world)).cpu()

x = mine(); dist.all_reduce(x); same("all_reduce", x, total)
x = mine(); dist.all_reduce(x, op=dist.ReduceOp.MAX); same("max", x, mine(world - 1).cpu())
for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8):
    x = torch.full((3,), rank + 1, dtype=dtype, device="npu"); dist.all_reduce(x)
    same(f"all_reduce {dtype}", x, [world * (world + 1) // 2] * 3)
x = mine(); dist.reduce(x, dst=1)
if rank == 1: same("reduce", x, total)
x = mine(); dist.broadcast(x, src=1); same("broadcast", x, mine(1).cpu())
out = torch.empty(4 * world, device="npu"); dist.all_gather_into_tensor(out, mine())
same("all_gather", out, torch.cat([mine(r).cpu() for r in range(world)]))
outs = [torch.empty(r + 1, device="npu") for r in range(world)]
dist.all_gather(outs, torch.full((rank + 1,), float(rank), device="npu"))
same("all_gather uneven", torch.cat(outs), [float(r) for r in range(world) for _ in range(r + 1)])
out = torch.empty(1, device="npu")
dist.reduce_scatter_tensor(out, torch.arange(float(world), device="npu") + rank)
same("reduce_scatter", out, [world * rank + sum(range(world))])
out = torch.empty(world, device="npu")
dist.all_to_all_single(out, torch.arange(float(world), device="npu") + 10 * rank)
same("all_to_all", out, [10.0 * r + rank for r in range(world)])
out = torch.empty(2, device="npu")
dist.scatter(out, [torch.full((2,), float(r), device="npu") for r in range(world)] if rank == 0 else None, src=0)
same("scatter", out, [float(rank)] * 2)
dist.barrier()

right, left = (rank + 1) % world, (rank - 1) % world
from_left, from_right = torch.empty(4, device="npu"), torch.empty(4, device="npu")
for work in dist.batch_isend_irecv([
    dist.P2POp(dist.isend, mine(), right), dist.P2POp(dist.isend, mine(), left),
    dist.P2POp(dist.irecv, from_left, left), dist.P2POp(dist.irecv, from_right, right),
]): work.wait()
if world > 2:  # with two ranks both neighbors are the same rank, and messages are matched by their order
    same("ring from left", from_left, mine(left).cpu()); same("ring from right", from_right, mine(right).cpu())
objects = [None] * world; dist.all_gather_object(objects, {"rank": rank})
assert [o["rank"] for o in objects] == list(range(world))
group = dist.new_group([0, 1])
if rank < 2:
    x = torch.ones(1, device="npu"); dist.all_reduce(x, group=group); same("subgroup", x, [2.0])
dist.destroy_process_group()
print("done")
"""
)


@pytest.mark.parametrize("world", [2, 4])
def test_every_collective(world: int, tmp_path: Path) -> None:
    for lines in run_ranks(EVERY_COLLECTIVE, world, shm=tmp_path):
        assert lines[-1] == "done"
    assert list(tmp_path.iterdir()) == []  # the last rank removes the folder


MISMATCHES = """
def ones(count=3, dtype=torch.float32):
    return torch.ones(count, dtype=dtype, device="npu")

def refused(name, mine, others):
    try:
        (mine if rank == 0 else others)()
        torch.npu.synchronize()
        print(name, "passed")
    except RuntimeError:
        print(name, "refused")

refused("count", lambda: dist.all_reduce(ones(3)), lambda: dist.all_reduce(ones(4)))
refused("call", lambda: dist.all_reduce(ones()), lambda: dist.broadcast(ones(), src=0))
refused("root", lambda: dist.broadcast(ones(), src=0), lambda: dist.broadcast(ones(), src=1))
refused("dtype", lambda: dist.all_reduce(ones()), lambda: dist.all_reduce(ones(dtype=torch.float16)))
refused("operation", lambda: dist.all_reduce(ones()), lambda: dist.all_reduce(ones(), op=dist.ReduceOp.MAX))
refused("nothing", lambda: dist.all_reduce(ones()), lambda: dist.all_reduce(ones()))
sys.stdout.flush(); os._exit(0)  # skip the cleanup, because the process group has seen errors
"""


def test_mismatched_calls_are_reported() -> None:
    for status, out, err in finish_ranks(start_ranks(START + MISMATCHES, 2)):
        assert status == 0, err
        assert printed(out) == [f"{name} refused" for name in ("count", "call", "root", "dtype", "operation")] + [
            "nothing passed"
        ]
        assert err.count("calls do not match: I made") == 5
        assert "allreduce(count 3, dtype 4, op 0, root 0)" in err
        assert "broadcast(count 3, dtype 4, op 0, root 1)" in err


def test_two_ranks_on_one_device_are_refused() -> None:
    script = START.replace("set_device(rank)", "set_device(0)") + "\ndist.all_reduce(torch.ones(1, device='npu'))"
    finished = finish_ranks(start_ranks(script, 2))
    assert all(status != 0 for status, _, _ in finished)
    assert any("both use device 0" in err for _, _, err in finished)


def test_the_folder_is_removed_after_a_crash(tmp_path: Path) -> None:
    script = f"{START}\ndist.all_reduce(mine())\nprint('up', flush=True)\nimport time; time.sleep(60)"
    ranks = start_ranks(script, 2, shm=tmp_path)
    for process in ranks:
        assert process.stdout is not None
        assert any(line == "up\n" for line in process.stdout)
    assert len(list(tmp_path.iterdir())) == 1
    for process in ranks:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    deadline = time.monotonic() + 20
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_peer_raises_and_does_not_hang() -> None:
    again = "dist.all_reduce(mine()); torch.npu.synchronize()"
    script = f"{START}\n{again}\nif rank == 1: os._exit(3)\n{again}"
    (status, _, err), (dead, _, _) = finish_ranks(start_ranks(script, 2))
    assert dead == 3
    assert status != 0
    assert "peer 1 is gone" in err
