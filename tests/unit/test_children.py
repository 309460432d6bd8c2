"""Tests of training.children: child processes end with their parent and with their own children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import processes
from processes import is_running, wait_for
from training import children

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
            assert all(map(is_running, numbers))
            parent.kill()
        parent.wait(timeout=60)
        wait_for(lambda: not any(map(is_running, numbers)))
    finally:
        parent.kill()
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_command_is_killed_with_its_child_processes():
    command = subprocess.Popen(["sh", "-c", "sleep 200; true"])
    listed = Path(f"/proc/{command.pid}/task/{command.pid}/children")
    wait_for(lambda: listed.read_text().split())
    started = int(listed.read_text())
    children.kill_tree(command.pid)
    assert command.wait(10) == -signal.SIGKILL
    wait_for(lambda: not is_running(started), 10)
