"""Tests of the workers of a loader: whether the next batch is ready, and how blocked workers end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from processes import is_running, wait_for
from training.data import shared_memory
from training.data.loader import Collate, Loader
from training.data.skips import SkipCounter


def make_loader(dataset: Dataset, workers: int) -> Loader:
    """Return a loader of 8 batches of one sample."""
    return Loader(
        dataset, source="numbers", workers=workers, seed=0, num_samples=8, num_batches=8, skipped=SkipCounter(workers),
        collate=Collate(), batch_sampler=[[index] for index in range(8)],
    )  # fmt: skip


class Blocked(Dataset):
    """Blocks at its second sample, while it waits for a command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        if index:
            command = subprocess.Popen(["sleep", "200"])
            (self.folder / f"{os.getpid()}").write_text(str(command.pid))
            command.wait()
        return {"number": index}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_close_ends_blocked_workers(tmp_path):
    loader = make_loader(Blocked(tmp_path), workers=2)
    batches = iter(loader)
    assert next(batches)["number"].tolist() == [0]
    assert not loader._is_next_ready()
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    started = time.monotonic()
    batches.close()
    loader.close()
    assert time.monotonic() - started < 30
    numbers = [int(number) for path in tmp_path.iterdir() for number in (path.name, path.read_text())]
    wait_for(lambda: not any(map(is_running, numbers)))


class Numbers(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        return {"number": index}


@pytest.mark.parametrize("workers", [1, 2])
def test_whether_the_next_batch_is_ready(workers):
    loader = make_loader(Numbers(), workers)
    batches = iter(loader)
    for index in range(7):
        assert next(batches)["number"].tolist() == [index]
        wait_for(loader._is_next_ready)
    assert next(batches)["number"].tolist() == [7]
    assert not loader._is_next_ready()
    loader.close()


def test_without_workers_the_next_batch_is_not_known_to_be_ready():
    loader = make_loader(Numbers(), 0)
    next(iter(loader))
    assert not loader._is_next_ready()


class Images(Dataset):
    """Large samples of several dtypes, one of them not contiguous."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        pixels = torch.arange(3 * 300 * 300).view(3, 300, 300) * (index + 1)
        return {"uint8": pixels.to(torch.uint8), "float": pixels / 7, "half": pixels.bfloat16(), "turned": pixels.mT}


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs files in memory")
def test_a_worker_writes_large_batches_to_shared_memory():
    written = make_loader(Images(), workers=1)
    expected = list(make_loader(Images(), workers=0))
    found = list(written)
    written.close()
    assert len(found) == len(expected) == 8
    for batch, other in zip(found, expected, strict=True):
        for name, values in batch.items():
            assert torch.equal(values, other[name]), name
            assert values.is_shared()
            assert values.is_contiguous()
            values.mul_(2)  # the memory may be written to, as that of other tensors
            assert torch.equal(values, other[name] * 2)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs files in memory")
def test_which_values_are_written_to_shared_memory(monkeypatch):
    large = torch.ones(1 << 18, dtype=torch.uint8)
    assert not shared_memory._is_shareable([large])  # not in a worker
    monkeypatch.setattr(shared_memory, "get_worker_info", lambda: object())
    assert shared_memory._is_shareable([large, large])
    assert not shared_memory._is_shareable([large[:10]])
    assert not shared_memory._is_shareable([large, large[1:]])
    assert not shared_memory._is_shareable([large, large.float()])
    assert not shared_memory._is_shareable([1.0])
    assert torch.equal(shared_memory.stack([large, large]), torch.ones(2, 1 << 18, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="equal size"):
        shared_memory.stack([large, large[1:]])


def test_a_process_ends_although_its_loader_is_not_closed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from test_loader import Numbers, make_loader\nloader = make_loader(Numbers(), 2)\nlist(loader)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, script], env=environment, check=True, timeout=60)
