"""SIGKILL of one of 4 ranks at a random step, with `torchrun --max-restarts 1`.

The other ranks end within --dist-timeout, torchrun restarts all of them, and the losses and final weights are
bit-identical to those of an undisturbed run. A second run without restarts measures how long the other ranks took.
"""

from __future__ import annotations

import random
import re
import signal

from harness import STEPS, Runs, differences, main


def measure(runs: Runs, ranks: int, timeout: int, seed: int) -> tuple[dict, bool]:
    choose = random.Random(seed)
    options = ("--save-every-n-steps", 3, "--resume", "latest", "--dist-timeout", timeout)
    step, rank = choose.randrange(4, STEPS - 1), choose.randrange(ranks)
    faults = {"signal": {"rank": rank, "step": step, "number": signal.SIGKILL}}
    assert runs.run("unbroken", *options, ranks=ranks).status == 0
    alone = runs.run("alone", *options, ranks=ranks, faults=faults)
    restarted = runs.run("restarted", *options, ranks=ranks, faults=faults, torchrun=("--max-restarts", 1))
    figures = {
        "rank, step": [rank, step],
        "exit status without restarts": alone.status,
        "ranks that log it": len(re.findall("Another process of this run", alone.printed)),
        "exit status with one restart": restarted.status,
        "resumed at step": restarted.resumed_at(),
        "losses that differ": differences(runs.losses("restarted"), runs.losses("unbroken")),
        "tensors that differ": differences(runs.final_weights("restarted"), runs.final_weights("unbroken")),
        "seconds from the start to the end without restarts": round(alone.seconds, 1),
    }
    met = alone.status == 1 and restarted.status == 0 and 0 < restarted.resumed_at() <= step
    return figures, met and not figures["losses that differ"] and not figures["tensors that differ"]


if __name__ == "__main__":
    main(measure, ranks=4, timeout=30, seed=0)
