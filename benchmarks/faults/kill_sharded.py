"""SIGKILL at random moments of sharded saves (--fsdp --fsdp-checkpoint sharded), each time with `--resume latest`.

Every second time all ranks are killed, as by a power failure; the other times only one, and the others end. Every
restart succeeds, no checkpoint is ever damaged, and the losses and final weights are bit-identical to those of an
undisturbed run.
"""

from __future__ import annotations

import random
import re

from harness import Runs, differences, main

from training.checkpoint.folder import find_damage
from training.checkpoint.latest import find_numbered

EVERY = 3
OPTIONS = (
    "--fsdp", "--fsdp-checkpoint", "sharded", "--save-every-n-steps", EVERY, "--resume", "latest", "--dist-timeout", 30,
)  # fmt: skip


def measure(runs: Runs, ranks: int, kills: int, seed: int) -> tuple[dict, bool]:
    choose = random.Random(seed)
    unbroken = runs.run("unbroken", *OPTIONS, ranks=ranks)
    assert unbroken.status == 0, unbroken.printed
    longest = max(float(seconds) for seconds in re.findall(r"Saved .* in ([\d.]+) s", unbroken.printed))
    reached, failed, damaged, unfinished, lost = 0, 0, 0, 0, [0]
    for number in range(kills):
        victims = list(range(ranks)) if number % 2 == 0 else [choose.randrange(ranks)]
        fault = {"ranks": victims, "save": choose.randint(1, 2), "seconds": choose.uniform(0, longest)}
        ended = runs.run("killed", *OPTIONS, ranks=ranks, faults={"kill_in_folder": fault})
        failed += "exitcode  : -9" not in ended.printed
        lost.append(reached - ended.resumed_at())
        reached = 1 + max(runs.losses("killed"), default=-1)
        folder = runs.checkpoints("killed")
        unfinished += len(list(folder.glob(".*.tmp")))
        damaged += sum(find_damage(path) is not None for path in find_numbered(folder))
    ended = runs.run("killed", *OPTIONS, ranks=ranks)
    lost.append(reached - ended.resumed_at())
    figures = {
        "kills in a sharded save": kills,
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
    main(measure, ranks=2, kills=10, seed=0)
