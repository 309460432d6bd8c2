"""Commands in processes of their own, of which nothing is left behind when they take too long."""
from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**variables: str) -> dict[str, str]:
    """For commands of this tree: its source first, one thread (several commands share the machine's cores)."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **variables}


def run(
    command: list[object], folder: Path | None = None, status: int = 0, timeout: float = 280, **variables: str
) -> str:
    """Runs a command and returns what it printed, to both streams; fails unless it exits with `status`.

    On a timeout the whole process group goes: torchrun's workers and loaders' too.
    """
    process = subprocess.Popen(
        [str(word) for word in command], cwd=folder, env=environment(**variables), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        raise AssertionError(f"{command} took longer than {timeout} s:\n{printed[-5000:]}") from None
    assert process.returncode == status, f"exit status {process.returncode}:\n{printed[-5000:]}"
    return printed


def is_running(number: int) -> bool:
    """Whether a process is there and not only waits to be reaped."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Returns when the condition holds; fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)
