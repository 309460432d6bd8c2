"""Bar 2: SIGTERM (and SIGUSR1, Ctrl-C) at random steps of a process, and of one of two ranks; then `--resume latest`.

No step is lost, each process exits with 143 (130 after Ctrl-C; torchrun itself with 1), and the stitched losses are
bit for bit those of the run that was not stopped.

The same while the loop waits for data that do not come: on one process, with and without workers, and on two ranks of
which one waits for data and the other for it, whichever of them gets the signal. And while a process waits for others
that never come: it says so, and the signal ends it.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time

from harness import STEPS, TIMEOUT, Ended, Runs, differences, main

STOPS_WITHIN = 30  # seconds, on a busy machine; torchrun and Kubernetes give as many


def stop(runs: Runs, name: str, ranks: int, numbers: list[signal.Signals], seed: int) -> dict:
    choose = random.Random(seed)
    assert runs.run(f"unbroken-{ranks}", ranks=ranks).status == 0
    lost, right, reached = 0, 0, 0
    for number in numbers:
        step = reached + choose.randint(0, STEPS // len(numbers) - 2)
        faults = {"signal": {"rank": choose.randrange(ranks), "step": step, "number": number}}
        ended = runs.run(name, "--resume", "latest", ranks=ranks, faults=faults)
        right += exit_statuses(ended, ranks) == [130 if number == signal.SIGINT else 143] * ranks
        lost += reached - ended.resumed_at()
        reached = 1 + max(runs.losses(name))
    ended = runs.run(name, "--resume", "latest", ranks=ranks)
    assert ended.status == 0, ended.printed[-3000:]
    return {
        "signals": len(numbers),
        "steps lost": lost + reached - ended.resumed_at(),
        "exits with another status": len(numbers) - right,
        "losses that differ": differences(runs.losses(name), runs.losses(f"unbroken-{ranks}")),
        "tensors that differ": differences(runs.final_weights(name), runs.final_weights(f"unbroken-{ranks}")),
    }


def stop_stalled(
    runs: Runs, name: str, number: signal.Signals, ranks: int = 1, workers: int = 0, told: int | None = None
) -> dict:
    """A run whose last rank's data stall; rank `told` gets the signal, or the launcher where it is None."""
    options = ("--workers", workers, "--resume", "latest")
    process = runs.start(name, *options, ranks=ranks, faults={"stall": {"rank": ranks - 1, "step": 5}})
    try:
        _wait_for_stall(runs, name, ranks - 1, process)
        start = time.perf_counter()
        os.kill(process.pid if told is None else runs.process_id(name, told), number)
        printed, _ = process.communicate(timeout=STOPS_WITHIN)
        seconds = time.perf_counter() - start
    finally:
        runs.end(process)
    if ranks > 1 and told is None:  # torchrun does not print its processes' statuses then
        right = printed.count(f"Stopped by {number.name}") == 1  # the first rank writes it for all of them
    else:
        statuses = exit_statuses(Ended(process.returncode, printed, seconds), ranks)
        right = statuses == [130 if number == signal.SIGINT else 143] * ranks
    reached = 1 + max(runs.losses(name))
    (runs.folder / f"{name}.jsonl.stall-{ranks - 1}").unlink()
    resumed = runs.run(name, *options, ranks=ranks)
    assert resumed.status == 0, resumed.printed[-3000:]
    return {
        "seconds": round(seconds, 1),
        "steps lost": reached - resumed.resumed_at(),
        "exits with another status": int(not right),
        "losses that differ": differences(runs.losses(name), runs.losses(f"unbroken-{ranks}")),
        "tensors that differ": differences(runs.final_weights(name), runs.final_weights(f"unbroken-{ranks}")),
    }


def stop_waiting_for_others(runs: Runs, number: signal.Signals) -> dict:
    """A process that SLURM's variables call the first of two, without the second."""
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "localhost"}
    process = runs.start("alone", variables={**slurm, "SLURM_JOB_ID": str(os.getpid())})
    try:
        lines = iter(process.stdout or ())
        said = any("SLURM_NTASKS asks for 2 processes. Waiting for all of them" in line for line in lines)
        time.sleep(2)
        start = time.perf_counter()
        process.send_signal(number)
        status = process.wait(timeout=STOPS_WITHIN)
    finally:
        runs.end(process)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "does not say what it waits for": int(not said),
        "exits with another status": int(status != -number),  # the shell shows 128 + number
    }


def _wait_for_stall(runs: Runs, name: str, rank: int, process: subprocess.Popen) -> None:
    """Until the run makes no more steps."""
    deadline, steps = time.monotonic() + TIMEOUT, -1
    while time.monotonic() < deadline and process.poll() is None:
        if runs.stalled(name, rank) and steps == len(runs.losses(name)):
            return
        steps = len(runs.losses(name)) if runs.stalled(name, rank) else -1
        time.sleep(3)
    raise AssertionError(f"{name} did not stall")


def exit_statuses(ended: Ended, ranks: int) -> list[int]:
    """Of each rank, as torchrun tells them."""
    if ranks == 1:
        return [ended.status]
    assert ended.status == 1, ended.printed[-3000:]
    return [int(code) for code in re.findall(r"(?m)^ *exitcode +: (-?\d+)", ended.printed)]


def measure(runs: Runs, signals: int, seed: int) -> tuple[dict, bool]:
    kinds = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    alone = stop(runs, "stopped-1", 1, [kinds[i % 3] for i in range(signals)], seed)
    both = stop(runs, "stopped-2", 2, [kinds[i % 2] for i in range(max(signals // 2, 1))], seed)
    figures = {
        "one process": alone,
        "two ranks, one of them told": both,
        "no data": stop_stalled(runs, "stalled-1", signal.SIGTERM),
        "no data, 2 workers": stop_stalled(runs, "stalled-workers", signal.SIGINT, workers=2),
        "no data on rank 1, torchrun told": stop_stalled(runs, "stalled-2", signal.SIGTERM, ranks=2),
        "no data on rank 1, rank 0 told": stop_stalled(runs, "stalled-0-told", signal.SIGUSR1, ranks=2, told=0),
        "no data on rank 1, which is told": stop_stalled(runs, "stalled-1-told", signal.SIGUSR1, 2, workers=1, told=1),
        "other processes do not come": stop_waiting_for_others(runs, signal.SIGTERM),
    }
    return figures, not any(part[name] for part in figures.values() for name in part.keys() - {"signals", "seconds"})


if __name__ == "__main__":
    main(measure, signals=6, seed=0)
