"""Tests of the workers of a loader: how they start, whether the next batch is ready, and how blocked workers end."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
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


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")

_blocking: list[Path] = []  # a folder; each of its files blocks one child


def _block_in_child() -> None:
    """Block the forked process before it runs its function, as if another thread had held a lock at the fork."""
    for file in _blocking[0].glob("block*") if _blocking else ():
        file.unlink()
        (_blocking[0] / f"{os.getpid()}").touch()
        time.sleep(1000)


@pytest.fixture
def folder_of_blocks(tmp_path, monkeypatch) -> Iterator[Path]:
    from training import forking  # which exists only where processes can fork

    monkeypatch.setattr(forking, "_START_TIMEOUTS", (2.0, 2.0, 60.0))
    if not hasattr(_block_in_child, "is_registered"):
        os.register_at_fork(after_in_child=_block_in_child)
        _block_in_child.is_registered = True  # it stays registered
    _blocking.append(tmp_path)
    yield tmp_path
    _blocking.clear()


def blocked(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


@needs_fork
@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_that_does_not_start_is_started_again(folder_of_blocks, count, caplog):
    for number in range(count):
        (folder_of_blocks / f"block{number}").touch()
    loader = make_loader(Numbers(), workers=2)
    batches = list(loader)
    loader.close()
    assert [batch["number"].item() for batch in batches] == list(range(8))
    assert len(blocked(folder_of_blocks)) == count
    assert not any(map(is_running, blocked(folder_of_blocks)))
    assert caplog.text.count("did not start within 2 s") == count


@needs_fork
def test_no_worker_starts(folder_of_blocks, monkeypatch):
    monkeypatch.setattr("training.forking._START_TIMEOUTS", (2.0, 2.0))
    for number in range(2):
        (folder_of_blocks / f"block{number}").touch()
    loader = make_loader(Numbers(), workers=1)
    with pytest.raises(RuntimeError, match=r"in 2 attempts.*--workers 0"):
        next(iter(loader))
    assert len(blocked(folder_of_blocks)) == 2
    assert not any(map(is_running, blocked(folder_of_blocks)))


@needs_fork
def test_an_exception_while_a_worker_starts_ends_it(folder_of_blocks, monkeypatch):
    started, fork = [], os.fork

    def recorded_fork() -> int:
        started.append(fork())
        return started[-1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (folder_of_blocks / "block").touch()
    monkeypatch.setattr(os, "fork", recorded_fork)
    monkeypatch.setattr(multiprocessing.connection.Connection, "poll", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(iter(make_loader(Numbers(), workers=1)))
    assert len(started) == 1
    assert not is_running(started[0])
