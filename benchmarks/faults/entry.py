"""`python -m training.main` that records its steps and injects faults.

FAULTS_LOSSES names a file that gets one JSON line per step, {"step", "loss"}, with the exact loss of the log. It is
written when the step is done, so it survives any later fault. FAULTS is a JSON object with:

    signal        {"rank", "step", "number"}: the process sends itself a signal during that step
    stall         {"rank", "step"}: from that step on, reading an image blocks
    kill_in_save  n: SIGKILL in the middle of the n-th save (from 1) of the process
    kill_in_folder {"ranks", "save", "seconds"}: SIGKILL of these ranks so long after the start of the n-th save (from
                  1) of a sharded checkpoint. With {"after"} instead of "seconds": right after the file of this name
                  was synced, or "rename": after the folder was renamed
    nan           {"rank", "steps"}: the images of these steps are NaN
    file_limit    bytes: files cannot grow beyond this size (RLIMIT_FSIZE), as on a full disk

Processes that torchrun has restarted get no faults.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import torch

from training import file_utils, logger, main, signals
from training.checkpoint import folder
from training.data.rows import csv_file
from training.trainer import Trainer

RANK = int(os.environ.get("RANK", 0))
IS_RESTARTED = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
FAULTS: dict[str, Any] = {} if IS_RESTARTED else json.loads(os.environ.get("FAULTS", "{}"))


def record(metrics: dict[str, float], step: int, prefix: str) -> None:
    if prefix == "train" and RANK == 0:
        with open(os.environ["FAULTS_LOSSES"], "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": metrics["loss"]}) + "\n")


def is_due(fault: str, step: int) -> bool:
    wanted = FAULTS.get(fault)
    return wanted is not None and wanted["rank"] == RANK and step in wanted.get("steps", [wanted.get("step")])


def install_stall() -> None:
    """Simulate storage that stalls: this process and its workers block when they open a pipe without a writer."""
    load, pipe = csv_file.load_image, stall_pipe(RANK)

    def loading(*args: Any) -> Any:
        if pipe.exists():
            pipe.open("rb").close()
        return load(*args)

    csv_file.load_image = loading  # type: ignore[attr-defined]


def install_kill_in_folder() -> None:
    fault, write = FAULTS["kill_in_folder"], folder.write
    saves = 0

    def writing(*args: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == fault["save"] and "after" in fault:
            install_kill_after(fault["after"])
        elif saves == fault["save"]:
            threading.Timer(fault["seconds"], os.kill, [os.getpid(), signal.SIGKILL]).start()
        write(*args)

    if RANK in fault["ranks"]:
        folder.write = writing  # type: ignore[assignment]


def install_kill_after(name: str) -> None:
    """Let the process die right after the next sync of a file of this name, or after the next "rename"."""
    fsync, rename = os.fsync, os.rename

    def syncing(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        fsync(descriptor)
        if os.path.basename(path) == name:
            os.kill(os.getpid(), signal.SIGKILL)

    def renaming(*args: Any, **options: Any) -> None:
        rename(*args, **options)
        if name == "rename":
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync, os.rename = syncing, renaming


def stall_pipe(rank: int) -> Path:
    return Path(f"{os.environ['FAULTS_LOSSES']}.stall-{rank}")


def install() -> None:
    write, make_step, save = logger.MetricsWriter.write, Trainer.step, torch.save
    saves = 0

    def writing(self: Any, metrics: Any, step: int, prefix: str = "") -> None:
        record(metrics, step, prefix)
        write(self, metrics, step, prefix)

    def stepping(self: Any, batches: list, number: int) -> Any:
        if is_due("signal", number):
            os.kill(os.getpid(), FAULTS["signal"]["number"])
        if is_due("stall", number):
            os.mkfifo(stall_pipe(RANK))
        if is_due("nan", number):
            batches = [{**batch, "image": batch["image"] * float("nan")} for batch in batches]
        return make_step(self, batches, number)

    def saving(checkpoint: Any, path: Any) -> None:
        nonlocal saves
        saves += 1
        save(checkpoint, path)
        if saves == FAULTS.get("kill_in_save"):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    logger.MetricsWriter.write = writing  # type: ignore[method-assign]
    Trainer.step = stepping  # type: ignore[method-assign]
    file_utils.torch = type("torch", (), {"save": staticmethod(saving), "load": staticmethod(torch.load)})  # type: ignore
    stall_pipe(RANK).with_suffix(f".pid-{RANK}").write_text(str(os.getpid()))
    if "stall" in FAULTS:
        install_stall()
    if "kill_in_folder" in FAULTS:
        install_kill_in_folder()
    if "file_limit" in FAULTS:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with EFBIG instead of ENOSPC
        resource.setrlimit(resource.RLIMIT_FSIZE, (FAULTS["file_limit"],) * 2)


if __name__ == "__main__":
    install()
    signals.exit_with(main.command())
