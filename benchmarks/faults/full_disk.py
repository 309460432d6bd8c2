"""The disk becomes full during a save.

Only root can mount a small tmpfs, so a limit on the size of files (RLIMIT_FSIZE) is used instead: a write beyond it
fails half-way, as on a full disk. The earlier checkpoints still load, and no partial file can be resumed from.
`continue` trains on and ends with an error because its last save failed; `stop` ends immediately. With free space
again, `--resume latest` reaches the weights of the run that always had space.
"""

from __future__ import annotations

import signal

import torch
from harness import STEPS, Runs, differences, main

from training.checkpoint.latest import get_latest_checkpoint


def measure(runs: Runs) -> tuple[dict, bool]:
    options = ("--save-every-n-steps", 3, "--keep-last", 9, "--resume", "latest")
    assert runs.run("unbroken", *options).status == 0
    size = min(path.stat().st_size for path in runs.checkpoints("unbroken").glob("*.pt"))
    figures: dict = {}
    met = True
    for policy in ("continue", "stop"):
        killed = {"signal": {"rank": 0, "step": 7, "number": signal.SIGKILL}}
        runs.run(policy, *options, faults=killed)
        before = {path.name: path.read_bytes() for path in runs.checkpoints(policy).glob("*.pt")}
        full = runs.run(policy, *options, "--on-save-failure", policy, faults={"file_limit": size * 2 // 3})
        left = {path.name: path.read_bytes() for path in runs.checkpoints(policy).iterdir()}
        latest = get_latest_checkpoint(runs.checkpoints(policy))
        assert latest is not None
        made = max(runs.losses(policy)) + 1
        resumed = runs.run(policy, *options)
        figures[policy] = {
            "exit status": full.status,
            "steps made": made,
            "checkpoints that changed": differences(left, before),
            "the newest can be loaded": torch.load(latest, weights_only=True)["train_state"]["step"] >= 3,
            "tensors that differ in the end": differences(runs.final_weights(policy), runs.final_weights("unbroken")),
        }
        found = figures[policy]
        met &= resumed.status == 0 and full.status == 1 and found["the newest can be loaded"]
        met &= not found["checkpoints that changed"] and not found["tensors that differ in the end"]
        met &= made == STEPS if policy == "continue" else made < STEPS
        met &= "failed" in full.printed
    return figures, met


if __name__ == "__main__":
    main(measure)
