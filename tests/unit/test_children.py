"""Child processes end with their parent, and with what they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.data import Dataset

import processes
from training import distributed
from training.data.loader import Collate, Loader
from training.data.skips import SkipCounter

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs process groups")

PARENT = """
import multiprocessing, subprocess, sys, time
from training import children

def child(folder):
    children.lead_group()
    command = subprocess.Popen(["sleep", "200"])
    (folder / "ids.tmp").write_text(f"{multiprocessing.current_process().pid} {command.pid}")
    (folder / "ids.tmp").rename(folder / "ids")
    command.wait()

if __name__ == "__main__":
    from pathlib import Path
    process = multiprocessing.get_context("fork").Process(target=child, args=(Path(sys.argv[1]),), daemon=True)
    process.start()
    while not Path(sys.argv[1], "ids").exists():
        time.sleep(0.05)
    if sys.argv[2] == "end":
        children.end([process], seconds=0.1)
    else:
        time.sleep(200)
"""


def runs(number: int) -> bool:
    """Whether a process is there and not only waits to be reaped."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("how", ["end", "killed"])
def test_a_blocked_child_and_its_commands_end(tmp_path, how):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py", tmp_path, how], env=processes.environment())
    try:
        wait_for((tmp_path / "ids").exists)
        numbers = [int(number) for number in (tmp_path / "ids").read_text().split()]
        if how == "killed":
            assert all(map(runs, numbers))
            parent.kill()
        parent.wait(timeout=60)
        wait_for(lambda: not any(map(runs, numbers)))
    finally:
        parent.kill()
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


class Blocked(Dataset):
    """Its second sample never comes: a command is waited for."""

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


@needs_proc
def test_a_loader_whose_workers_are_blocked_closes(tmp_path):
    loader = Loader(
        Blocked(tmp_path), source="blocked", workers=2, seed=0, num_samples=8, num_batches=8, skipped=SkipCounter(2),
        collate=Collate(), batch_sampler=[[index] for index in range(8)],
    )  # fmt: skip
    assert not distributed.world().distributed
    batches = iter(loader)
    assert next(batches)["number"].tolist() == [0]
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    started = time.monotonic()
    batches.close()
    loader.close()
    assert time.monotonic() - started < 30
    numbers = [int(number) for path in tmp_path.iterdir() for number in (path.name, path.read_text())]
    wait_for(lambda: not any(map(runs, numbers)))
