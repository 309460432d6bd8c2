"""SIGKILL at random steps, every fourth time in the middle of a save, each time with `--resume latest`.

Every restart succeeds. The stitched losses and the final weights are bit-identical to those of an undisturbed run, and
at most the steps between two saves, plus those during a save, are lost.
"""

from __future__ import annotations

import random
import signal

from harness import STEPS, Runs, differences, main

EVERY = 3


def measure(runs: Runs, kills: int, seed: int) -> tuple[dict, bool]:
    choose = random.Random(seed)
    options = ("--save-every-n-steps", EVERY, "--resume", "latest")
    assert runs.run("unbroken", *options).status == 0
    reached, failed, in_saves, lost = 0, 0, 0, [0]
    for number in range(kills):
        if number % 4 == 3:
            faults: dict = {"kill_in_save": choose.randint(1, 2)}
        else:  # spread the kills over the run, and leave steps after the last one
            step = min(reached + choose.randint(0, max(1, 2 * STEPS // kills)), STEPS - 1)
            faults = {"signal": {"rank": 0, "step": step, "number": signal.SIGKILL}}
        ended = runs.run("killed", *options, faults=faults)
        failed += ended.status != -signal.SIGKILL
        in_saves += "kill_in_save" in faults
        lost.append(reached - ended.resumed_at())
        reached = 1 + max(runs.losses("killed"), default=-1)
    ended = runs.run("killed", *options)
    lost.append(reached - ended.resumed_at())
    wrong_losses = differences(runs.losses("killed"), runs.losses("unbroken"))
    wrong_tensors = differences(runs.final_weights("killed"), runs.final_weights("unbroken"))
    figures = {
        "kills": kills,
        "of them in a save": in_saves,
        "restarts that failed": failed + (ended.status != 0),
        "steps lost at most": max(lost),
        "steps between saves": EVERY,
        "losses that differ": wrong_losses,
        "tensors that differ": wrong_tensors,
    }
    met = not (figures["restarts that failed"] or wrong_losses or wrong_tensors) and max(lost) <= 2 * EVERY
    return figures, met


if __name__ == "__main__":
    main(measure, kills=20, seed=0)
