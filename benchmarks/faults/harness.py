"""Shared code of the scripts in this folder: small runs of the training command with faults, and their results."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/helpers"), str(ROOT / "src")]

import torch  # noqa: E402

import train_runs  # noqa: E402
from training.checkpoint.folder_reader import read_folder  # noqa: E402
from training.checkpoint.stored_tensor import read_all  # noqa: E402

STEPS_PER_EPOCH, EPOCHS, BATCH = 8, 3, 4
STEPS = STEPS_PER_EPOCH * EPOCHS
TIMEOUT = 240


@dataclass
class Ended:
    """One process (or torchrun and its processes) that has ended."""

    status: int
    printed: str
    seconds: float

    def resumed_at(self) -> int:
        """Return the step from which the run was resumed; 0 if it started from the beginning."""
        found = re.findall(r"Resumed from .*step (\d+)", self.printed)
        return int(found[-1]) if found else 0


class Runs:
    """Runs of one tiny CLIP on one CSV, in one folder."""

    def __init__(self, folder: Path, images: int = STEPS_PER_EPOCH * BATCH) -> None:
        self.folder = folder
        self.model = train_runs.write_model(folder / "model")
        self.csv = train_runs.write_csv(folder / "csv", images)

    def start(
        self,
        name: str,
        *options: object,
        ranks: int = 1,
        torchrun: tuple = (),
        faults: dict | None = None,
        variables: dict[str, str] | None = None,
    ) -> subprocess.Popen:
        """Start the command in the background, with dropout and random crops, so that it uses every generator."""
        entry = str(Path(__file__).with_name("entry.py"))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks, *torchrun]
        command = [
            sys.executable, *(launcher if ranks > 1 else []), entry, "--model", self.model, "--train-data", self.csv,
            "--batch-size", BATCH // ranks, "--epochs", EPOCHS, "--warmup", 4, "--lr", 1e-3, "--device", "cpu",
            "--workers", 0, "--force-patch-dropout", 0.5, "--aug-cfg", "scale=(0.3,1.0)", "--log-every-n-steps", 1,
            "--ema-decay", 0.99, "--output-dir", self.folder / "logs", "--name", name,
            *(["--dist-backend", "gloo"] if ranks > 1 else []), *options,
        ]  # fmt: skip
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "FAULTS": json.dumps(faults or {}),
            "FAULTS_LOSSES": str(self.folder / f"{name}.jsonl"), **(variables or {}),
        }  # fmt: skip
        return subprocess.Popen(
            [str(word) for word in command], env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, name: str, *options: object, timeout: float = TIMEOUT, **options_of_start: Any) -> Ended:
        """Run the command to its end, then kill its remaining processes."""
        start = time.perf_counter()
        process = self.start(name, *options, **options_of_start)
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            raise AssertionError(f"{name} took longer than {timeout} s:\n{printed[-5000:]}") from None
        return Ended(process.returncode, printed, time.perf_counter() - start)

    def kill(self, process: subprocess.Popen) -> None:
        """Kill a process and its remaining children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def is_stalled(self, name: str, rank: int) -> bool:
        """Return whether "stall" has started on the rank."""
        return (self.folder / f"{name}.jsonl.stall-{rank}").exists()

    def process_id(self, name: str, rank: int) -> int:
        return int((self.folder / f"{name}.jsonl.pid-{rank}").read_text())

    def losses(self, name: str) -> dict[int, float]:
        """Return step -> loss of all processes with this name. A repeated step must have the same loss."""
        found: dict[int, float] = {}
        for line in (self.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            step, loss = entry["step"], entry["loss"]
            assert found.setdefault(step, loss) == loss, f"step {step}: loss {found[step]!r}, repeated: {loss!r}"
        return found

    def checkpoints(self, name: str) -> Path:
        return self.folder / "logs" / name / "checkpoints"

    def final_weights(self, name: str) -> dict[str, torch.Tensor]:
        """Return weights, averaged weights and moments after the last epoch."""
        path = self.checkpoints(name) / f"epoch_{EPOCHS}"
        saved = read_all(read_folder(path)) if path.exists() else torch.load(f"{path}.pt", weights_only=True)
        found = {f"weights {key}": value for key, value in saved["state_dict"].items()}
        found |= {f"average {key}": value for key, value in saved["state_dict_ema"].items()}
        for number, state in saved["optimizer"]["state"].items():
            found |= {f"optimizer {number} {key}": value for key, value in state.items()}
        return found


def differences(ours: dict, theirs: dict) -> int:
    """Count the entries that are not bit-identical."""

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return sum(key not in ours or key not in theirs or not same(ours[key], theirs[key]) for key in {*ours, *theirs})


def main(measure: Any, **defaults: int) -> None:
    """Run the command line of a script. `measure(runs, **numbers)` returns (figures, whether it is met)."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    with tempfile.TemporaryDirectory() as folder:
        figures, met = measure(Runs(Path(folder)), **vars(parser.parse_args()))
    print(json.dumps({**figures, "met": met}))
    sys.exit(not met)
