"""Commands in processes of their own, of which nothing is left behind when they take too long."""
from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


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
