"""Run Python source in processes that use the emulated NPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

from processes import kill
from training import children

ROOT = Path(__file__).parents[2]


# Appended to each script. If the interpreter ends while a thread of autograd still frees Python objects, that thread is
# ended inside C++ code, which aborts the process ("terminate called without an active exception").
END = """
import os, sys
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**settings: object) -> dict[str, str]:
    """Return the environment of a process that uses the emulated NPU.

    Args:
        settings: settings of the emulator (README.md) without the prefix CANN_EMULATOR_, in lower case.
    """
    emulator = {f"CANN_EMULATOR_{name.upper()}": str(value) for name, value in settings.items()}
    inherited = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", "tests/helpers", "tests/npu"))
    always = {"PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"}
    return {"CANN_EMULATOR_STRICT": "1", **inherited, **always, **emulator}


def printed(out: str) -> list[str]:
    """Return the lines of an output without torch_npu's warning that CANN's folder is not set."""
    return [line for line in out.splitlines() if "ASCEND_HOME_PATH" not in line]


def run_script(script: str, **settings: object) -> list[str]:
    """Run Python source in a new process, because settings are read when torch_npu loads. Return the printed lines."""
    command = [sys.executable, "-c", textwrap.dedent(script) + END]
    done = subprocess.run(
        command, env=environment(**settings), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return printed(done.stdout)


def start_ranks(script: str, count: int, **settings: object) -> list[subprocess.Popen[str]]:
    """Start `count` processes that run Python source, with the variables that torchrun sets and one NPU each."""
    port = free_port()
    ranks = []
    for rank in range(count):
        variables = environment(**{"devices": count, **settings}) | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        }  # fmt: skip
        command = [sys.executable, "-c", textwrap.dedent(script) + END]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True))
    return ranks


def finish_ranks(ranks: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Wait for the ranks, and return (exit status, stdout, stderr) of each. After a timeout they print their stacks."""
    finished = []
    for process in ranks:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill([pid for other in ranks if other.poll() is None for pid in children.list_tree(other.pid)])
            outputs = "\n".join(text for other in ranks[len(finished) :] for text in other.communicate())
            raise AssertionError(f"the ranks took longer than {timeout} s:\n{outputs}") from None
        finished.append((process.returncode, out, err))
    return finished


def run_ranks(script: str, count: int, **settings: object) -> list[list[str]]:
    """Run Python source on `count` ranks. Return the lines that each rank printed. Fail if a rank fails."""
    finished = finish_ranks(start_ranks(script, count, **settings))
    for status, out, err in finished:
        assert status == 0, out + err
    return [printed(out) for _, out, _ in finished]
