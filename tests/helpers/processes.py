"""Run commands in child processes, which are all killed after a timeout."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from training import children

ROOT = Path(__file__).parents[2]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment for commands of this tree: its source in PYTHONPATH, and one thread per process."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **variables}


def run(
    command: list[object], folder: Path | None = None, status: int = 0, timeout: float = 280, **variables: str
) -> str:
    """Run a command and return its output, stdout and stderr together. Fail unless it exits with `status`.

    After a timeout every process that the command started, torchrun's and the data loaders' workers among them, prints
    the stacks of its Python threads and is killed.
    """
    process = subprocess.Popen(
        [str(word) for word in command], cwd=folder, env=environment(PYTHONFAULTHANDLER="1", **variables), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(children.list_tree(process.pid))
        with contextlib.suppress(ProcessLookupError):  # what is left of its group, whose parents have ended before
            os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate(timeout=30)
        raise AssertionError(f"{command} took longer than {timeout} s:\n{printed[-20000:]}") from None
    assert process.returncode == status, f"exit status {process.returncode}:\n{printed[-5000:]}"
    return printed


def kill(pids: list[int], grace: float = 2) -> None:
    """Kill processes, after Python's fault handler has printed the stacks of their threads where it is enabled.

    They are stopped first, so that none reacts to the end of another one.
    """
    for kind in (signal.SIGSTOP, signal.SIGABRT, signal.SIGCONT, signal.SIGKILL):
        if kind is signal.SIGKILL:
            time.sleep(grace)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, kind)


def is_running(number: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until the condition holds. Fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)
