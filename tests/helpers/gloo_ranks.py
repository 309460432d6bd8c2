"""Run a function of a test module in several processes of a gloo group.

The processes start once and run all world sizes in turn, because importing torch takes longer than the computation. A
test module calls `run_ranks(__file__, "function", world_sizes, directory)`. Each process calls
`function(rank, world_size)` and saves the result: tensors, numbers, and lists and dicts of them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from processes import kill
from training import children

SOURCE = Path(__file__).parents[2] / "src"


def run_ranks(module_file: str, function: str, world_sizes: tuple[int, ...], directory: Path) -> dict[int, list]:
    """Run the function and return {world size: [result of each rank]}."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SOURCE), str(Path(__file__).parent)]),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    sizes = ",".join(map(str, world_sizes))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, module_file, function, str(rank), sizes, str(directory)],
            env=environment,
            stdout=(directory / f"output-{rank}").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(max(world_sizes))
    ]
    _wait_for_all(processes, directory, seconds=240)
    return {
        size: [torch.load(directory / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]
        for size in world_sizes
    }


def _wait_for_all(processes: list[subprocess.Popen], directory: Path, seconds: float) -> None:
    """Wait until all have ended with status 0. After the first failure kill the others, which may wait for it.

    Those that do not end in time print the stacks of their threads.
    """
    deadline = time.monotonic() + seconds
    try:
        while any(statuses := [process.poll() for process in processes]) or None in statuses:
            failed = [rank for rank, status in enumerate(statuses) if status]
            if not failed and time.monotonic() > deadline:
                failed = [rank for rank, status in enumerate(statuses) if status is None]
                kill([pid for rank in failed for pid in children.list_tree(processes[rank].pid)])
            assert not failed, "\n".join(
                f"Rank {n} {_describe_status(statuses[n], seconds)}:\n{(directory / f'output-{n}').read_text()}"
                for n in failed
            )
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _describe_status(status: int | None, seconds: float) -> str:
    return f"has not ended after {seconds:g} s" if status is None else f"ended with status {status}"


def _run_rank(module_file: str, function: str, rank: int, world_sizes: list[int], directory: Path) -> None:
    from training import ranks

    spec = importlib.util.spec_from_file_location(Path(module_file).stem, module_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for size in world_sizes:
        if rank >= size:
            continue
        store = f"file://{directory / f'store-{size}'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        torch.save(getattr(module, function)(rank, size), directory / f"{size}-{rank}.pt")
        ranks.shutdown()


if __name__ == "__main__":
    _run_rank(sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(n) for n in sys.argv[4].split(",")], Path(sys.argv[5]))
