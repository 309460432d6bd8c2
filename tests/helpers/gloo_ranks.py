"""Runs a function of a test module in several processes of a gloo group.

The processes start once and run every world size in turn, because importing torch takes longer than the computation. A
test module calls `run_ranks(__file__, "function", world_sizes, directory)`. Each process calls
`function(rank, world_size)` and saves the result: tensors, numbers, and lists and dicts of them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

SOURCE = Path(__file__).parents[2] / "src"


def run_ranks(module_file: str, function: str, world_sizes: tuple[int, ...], directory: Path) -> dict[int, list]:
    """Return {world size: [result of each rank]}."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SOURCE), str(Path(__file__).parent)]),
        "OMP_NUM_THREADS": "1",
    }
    sizes = ",".join(map(str, world_sizes))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, module_file, function, str(rank), sizes, str(directory)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(max(world_sizes))
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    failed = [output for process, output in zip(processes, outputs, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
    return {
        size: [torch.load(directory / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]
        for size in world_sizes
    }


def _main(module_file: str, function: str, rank: int, world_sizes: list[int], directory: Path) -> None:
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
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(n) for n in sys.argv[4].split(",")], Path(sys.argv[5]))
