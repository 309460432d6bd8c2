"""Tests of training.children: child processes end with their parent and with their own children."""

from __future__ import annotations

import contextlib
import os
import re
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
    """A child that a thread started is in the list of that thread only."""
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(200)'])"
    code = f"import threading; threading.Thread(target=lambda: exec({start!r})).start()"
    command = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: len(children.list_tree(command.pid)) == 2)
    _, started = children.list_tree(command.pid)
    children.kill_tree(command.pid)
    assert command.wait(10) == -signal.SIGKILL
    wait_for(lambda: not is_running(started), 10)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_command_of_a_test_that_hangs_prints_its_stacks_and_is_killed():
    code = "import time\ndef hangs(): time.sleep(200)\nprint('child', __import__('os').getpid(), flush=True)\nhangs()"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], start_new_session=True)"
    with pytest.raises(AssertionError, match="in hangs") as error:
        processes.run([sys.executable, "-c", start], timeout=10)
    (started,) = re.findall(r"^child (\d+)$", str(error.value), re.MULTILINE)
    assert not is_running(int(started))
