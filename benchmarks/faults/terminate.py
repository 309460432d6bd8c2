"""Bar 2: SIGTERM (and SIGUSR1, Ctrl-C) at random steps of a process, and of one of two ranks; then `--resume latest`.

No step is lost, each process exits with 143 (130 after Ctrl-C; torchrun itself with 1), and the stitched losses are
bit for bit those of the run that was not stopped.
"""

from __future__ import annotations

import random
import re
import signal

from harness import STEPS, Ended, Runs, differences, main


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
    figures = {"one process": alone, "two ranks, one of them told": both}
    bad = ("steps lost", "exits with another status", "losses that differ", "tensors that differ")
    return figures, not any(part[name] for part in (alone, both) for name in bad)


if __name__ == "__main__":
    main(measure, signals=6, seed=0)
