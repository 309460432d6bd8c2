"""Child processes of a run. Each leads a process group, ends with its parent, and is killed with its group."""

from __future__ import annotations

import contextlib
import glob
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path

_CHECK_PARENT_EVERY = 1.0  # seconds


def lead_group() -> None:
    """Make the calling child process lead a new process group, which ends when the parent process ends.

    The commands that it starts (for `pipe:` shards) join its group. So `kill` ends them as well, and a Ctrl-C on the
    terminal does not reach them. Without this, a child that is blocked in a read outlives a parent that was killed.
    """
    parent = multiprocessing.parent_process()
    if os.name != "posix" or parent is None or parent.pid is None:
        return
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(parent.pid,), name="end-with-parent", daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_CHECK_PARENT_EVERY)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def end(processes: Iterable[BaseProcess], seconds: float) -> None:
    """Wait at most `seconds` for the child processes to end, then kill the rest."""
    waiting, deadline = list(processes), time.monotonic() + seconds
    for process in waiting:
        process.join(max(0.0, deadline - time.monotonic()))
    kill(waiting)
    for process in waiting:
        process.join(1.0)


def list_tree(pid: int) -> list[int]:
    """Return the ids of the process and its descendants. Without /proc, only that of the process itself."""
    found = [pid]
    for parent in found:
        for started in glob.glob(f"/proc/{parent}/task/*/children"):  # the children are listed per thread
            with contextlib.suppress(OSError):
                found += map(int, Path(started).read_text().split())
    return found


def kill_tree(pid: int) -> None:
    """Send SIGKILL to the process and its descendants."""
    for process in list_tree(pid):
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)


def kill(processes: Iterable[BaseProcess]) -> None:
    """Send SIGKILL to the running child processes and to the groups that they lead."""
    for process in processes:
        if process.pid is None or not process.is_alive():
            continue
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError, AttributeError):  # no group (yet), or a platform without groups
            process.kill()
