"""SIGTERM, SIGUSR1 or Ctrl-C at random steps, to a process or one of two ranks; then `--resume latest`.

No step is lost, each process exits with 143 (130 after Ctrl-C; torchrun itself with 1), and the stitched losses are
bit-identical to those of an undisturbed run.

The same holds while the loop waits for data that never arrive: in one process, with and without workers, and in two
ranks of which one waits for data and the other for that rank, for a signal to either of them. A process that
waits for others that never join logs this, and the signal ends it.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time

from harness import STEPS, TIMEOUT, Ended, Runs, differences, main

STOPS_WITHIN = 30  # seconds, on a busy machine; torchrun and Kubernetes wait as long


def stop(runs: Runs, name: str, ranks: int, numbers: list[signal.Signals], seed: int) -> dict:
    choose = random.Random(seed)
    assert runs.run(f"unbroken-{ranks}", ranks=ranks).status == 0
    lost, expected_exits, reached = 0, 0, 0
    for number in numbers:
        step = reached + choose.randint(0, STEPS // len(numbers) - 2)
        faults = {"signal": {"rank": choose.randrange(ranks), "step": step, "number": number}}
        ended = runs.run(name, "--resume", "latest", ranks=ranks, faults=faults)
        expected_exits += exit_statuses(ended, ranks) == [130 if number == signal.SIGINT else 143] * ranks
        lost += reached - ended.resumed_at()
        reached = 1 + max(runs.losses(name))
    ended = runs.run(name, "--resume", "latest", ranks=ranks)
    assert ended.status == 0, ended.printed[-3000:]
    return {
        "signals": len(numbers),
        "steps lost": lost + reached - ended.resumed_at(),
        "exits with another status": len(numbers) - expected_exits,
        "losses that differ": differences(runs.losses(name), runs.losses(f"unbroken-{ranks}")),
        "tensors that differ": differences(runs.final_weights(name), runs.final_weights(f"unbroken-{ranks}")),
    }


def stop_stalled(
    runs: Runs, name: str, number: signal.Signals, ranks: int = 1, workers: int = 0, signaled: int | None = None
) -> dict:
    """Stop a run whose last rank's data stall. Rank `signaled` gets the signal; None: the launcher."""
    options = ("--workers", workers, "--resume", "latest")
    process = runs.start(name, *options, ranks=ranks, faults={"stall": {"rank": ranks - 1, "step": 5}})
    try:
        wait_for_stall(runs, name, ranks - 1, process)
        start = time.perf_counter()
        os.kill(process.pid if signaled is None else runs.process_id(name, signaled), number)
        printed, _ = process.communicate(timeout=STOPS_WITHIN)
        seconds = time.perf_counter() - start
    finally:
        runs.kill(process)
    if ranks > 1 and signaled is None:  # then torchrun does not print the statuses of its processes
        is_expected = printed.count(f"Stopped by {number.name}") == 1  # only rank 0 logs it
    else:
        statuses = exit_statuses(Ended(process.returncode, printed, seconds), ranks)
        is_expected = statuses == [130 if number == signal.SIGINT else 143] * ranks
    reached = 1 + max(runs.losses(name))
    (runs.folder / f"{name}.jsonl.stall-{ranks - 1}").unlink()
    resumed = runs.run(name, *options, ranks=ranks)
    assert resumed.status == 0, resumed.printed[-3000:]
    return {
        "seconds": round(seconds, 1),
        "steps lost": reached - resumed.resumed_at(),
        "exits with another status": int(not is_expected),
        "losses that differ": differences(runs.losses(name), runs.losses(f"unbroken-{ranks}")),
        "tensors that differ": differences(runs.final_weights(name), runs.final_weights(f"unbroken-{ranks}")),
    }


def stop_waiting_for_others(runs: Runs, number: signal.Signals) -> dict:
    """Stop a process that is the first of two by SLURM's variables, without the second."""
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "localhost"}
    process = runs.start("alone", variables={**slurm, "SLURM_JOB_ID": str(os.getpid())})
    try:
        lines = iter(process.stdout or ())
        is_logged = any("SLURM_NTASKS asks for 2 processes. Waiting for all of them" in line for line in lines)
        time.sleep(2)
        start = time.perf_counter()
        process.send_signal(number)
        status = process.wait(timeout=STOPS_WITHIN)
    finally:
        runs.kill(process)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "does not log what it waits for": int(not is_logged),
        "exits with another status": int(status != -number),  # the shell shows 128 + number
    }


def wait_for_stall(runs: Runs, name: str, rank: int, process: subprocess.Popen) -> None:
    """Wait until the run makes no more steps."""
    deadline, steps = time.monotonic() + TIMEOUT, -1
    while time.monotonic() < deadline and process.poll() is None:
        if runs.is_stalled(name, rank) and steps == len(runs.losses(name)):
            return
        steps = len(runs.losses(name)) if runs.is_stalled(name, rank) else -1
        time.sleep(3)
    raise AssertionError(f"{name} did not stall")


def exit_statuses(ended: Ended, ranks: int) -> list[int]:
    """Parse the exit status of each rank from the output of torchrun."""
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
        "two ranks, signal to one of them": both,
        "no data": stop_stalled(runs, "stalled-1", signal.SIGTERM),
        "no data, 2 workers": stop_stalled(runs, "stalled-workers", signal.SIGINT, workers=2),
        "no data on rank 1, signal to torchrun": stop_stalled(runs, "stalled-2", signal.SIGTERM, ranks=2),
        "no data on rank 1, signal to rank 0": stop_stalled(runs, "stalled-on-0", signal.SIGUSR1, 2, signaled=0),
        "no data on rank 1, signal to rank 1": stop_stalled(runs, "stalled-on-1", signal.SIGUSR1, 2, 1, signaled=1),
        "other processes do not join": stop_waiting_for_others(runs, signal.SIGTERM),
    }
    return figures, not any(part[name] for part in figures.values() for name in part.keys() - {"signals", "seconds"})


if __name__ == "__main__":
    main(measure, signals=6, seed=0)
