"""NaN images on one of 4 ranks (gloo; on NPUs see tests/npu/test_npu_training.py).

After such a step the parameters of all ranks, the moments and the averaged weights equal those before it. Two such
steps are counted and the run continues; --max-bad-steps of them in a row stop it, and their sample keys are saved.
"""

from __future__ import annotations

import json
import re

import torch
from harness import Runs, differences, main

RANKS, RANK, STEP = 4, 2, 5


def measure(runs: Runs) -> tuple[dict, bool]:
    options = ("--save-every-n-steps", 1, "--keep-last", 99, "--max-bad-steps", 3)
    two_steps = {"nan": {"rank": RANK, "steps": [STEP, STEP + 1]}}
    continued = runs.run("continued", *options, ranks=RANKS, faults=two_steps)
    folder = runs.checkpoints("continued")
    saved = [torch.load(folder / f"epoch_0_step_{STEP + n}.pt", weights_only=True) for n in range(3)]
    changed = [differences(flatten(saved[0]), flatten(later)) for later in saved[1:]]

    all_steps = {"nan": {"rank": RANK, "steps": list(range(STEP, 99))}}
    stopped = runs.run("stops", *options, ranks=RANKS, faults=all_steps)
    named = [json.loads(path.read_text()) for path in sorted((runs.folder / "logs/stops").glob("bad_steps-*.json"))]
    figures = {
        "exit status": continued.status,
        "tensors that a bad step changed": changed,
        "bad steps in the log": int(re.findall(r"Bad steps: (\d+)", continued.printed)[-1]),
        "exit status of the run that stops": stopped.status,
        "ranks that saved the sample keys": len(named),
        "steps in these files": sorted({step for entry in named for step in entry}),
    }
    met = continued.status == 0 and changed == [0, 0] and figures["bad steps in the log"] == 2 and stopped.status == 1
    return figures, met and len(named) == RANKS and figures["steps in these files"] == ["5", "6", "7"]


def flatten(saved: dict) -> dict:
    moments = {f"{n} {key}": value for n, state in saved["optimizer"]["state"].items() for key, value in state.items()}
    average = {f"average {key}": value for key, value in saved["state_dict_ema"].items()}
    return {**saved["state_dict"], **moments, **average}


if __name__ == "__main__":
    main(measure)
