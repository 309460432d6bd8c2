"""SIGKILL during sharded saves (--fsdp --fsdp-checkpoint sharded), each time with `--resume latest`.

First the rank that completes the folder is killed right after each of its steps: POINTS. Then ranks are killed at
random moments: every second time all, as by a power failure; the other times only one, and the others end. Every
restart succeeds, no checkpoint is ever damaged, and the losses and final weights are bit-identical to those of an
undisturbed run.
"""

from __future__ import annotations

import random
import re

from harness import Runs, differences, main

from training.checkpoint.folder import MANIFEST, METADATA, TRAINING, find_damage
from training.checkpoint.latest import find_numbered

EVERY = 3
POINTS = (METADATA, MANIFEST, TRAINING, "rename")
OPTIONS = (
    "--fsdp", "--fsdp-checkpoint", "sharded", "--save-every-n-steps", EVERY, "--resume", "latest", "--dist-timeout", 30,
)  # fmt: skip


def choose_fault(number: int, choose: random.Random, ranks: int, longest: float) -> dict:
    """Return the fault of a kill: number -1 is at the first of POINTS, -2 at the second; those from 0 are random."""
    if number < 0:
        return {"ranks": [0], "save": 1, "after": POINTS[-number - 1]}
    victims = list(range(ranks)) if number % 2 == 0 else [choose.randrange(ranks)]
    return {"ranks": victims, "save": choose.randint(1, 2), "seconds": choose.uniform(0, longest)}


def measure(runs: Runs, ranks: int, points: int, kills: int, seed: int) -> tuple[dict, bool]:
    """Measure. `points`: how many of POINTS; `kills`: at random moments."""
    choose = random.Random(seed)
    unbroken = runs.run("unbroken", *OPTIONS, ranks=ranks)
    assert unbroken.status == 0, unbroken.printed
    longest = max(float(seconds) for seconds in re.findall(r"Saved .* in ([\d.]+) s", unbroken.printed))
    reached, failed, late, damaged, unfinished, lost = 0, 0, 0, 0, 0, [0]
    for number in range(-points, kills):
        fault = choose_fault(number, choose, ranks, longest)
        ended = runs.run("killed", *OPTIONS, ranks=ranks, faults={"kill_in_folder": fault})
        late += ended.status == 0  # the run ended before it had made so many saves
        failed += ended.status != 0 and "exitcode  : -9" not in ended.printed
        lost.append(reached - ended.resumed_at())
        reached = 1 + max(runs.losses("killed"), default=-1)
        folder = runs.checkpoints("killed")
        unfinished += len(list(folder.glob(".*.tmp")))
        damaged += sum(find_damage(path) is not None for path in find_numbered(folder))
    ended = runs.run("killed", *OPTIONS, ranks=ranks)
    lost.append(reached - ended.resumed_at())
    figures = {
        "kills right after a step of completing the folder": points,
        "kills at random moments of a sharded save": kills,
        "of them too late, because the run had ended": late,
        "restarts that failed": failed + (ended.status != 0),
        "unfinished folders found": unfinished,
        "checkpoints that were damaged": damaged,
        "steps lost at most": max(lost),
        "steps between saves": EVERY,
        "losses that differ": differences(runs.losses("killed"), runs.losses("unbroken")),
        "tensors that differ": differences(runs.final_weights("killed"), runs.final_weights("unbroken")),
    }
    wrong = ("restarts that failed", "checkpoints that were damaged", "losses that differ", "tensors that differ")
    return figures, not any(figures[name] for name in wrong) and max(lost) <= 2 * EVERY


if __name__ == "__main__":
    main(measure, ranks=2, points=4, kills=10, seed=0)
