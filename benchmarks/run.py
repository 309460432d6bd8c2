"""Measure speed and memory of this project against open_clip_torch.

    python benchmarks/run.py                    # every workload
    python benchmarks/run.py tokenizer loading  # some of them

A workload (benchmarks/workloads/NAME.py) uses only functions that both packages have, and prints its figures as JSON.
It runs several times in a fresh process, alternately for each side. The output is the median of each side and their
ratio, which varies less between machines than the figures. open_clip_torch is installed without its dependencies into a
separate folder, so that nothing else imports it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OURS = HERE.parent / "src"
PEER = HERE.parent / ".peer"
WORKLOADS = sorted(path.stem for path in (HERE / "workloads").glob("*.py"))


def measure(workload: str, package: Path, scratch: Path, threads: int) -> dict[str, float]:
    """Run a workload once with the open_clip in `package`; return figure -> value (the names have the units)."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(package), str(HERE))),  # for `inputs`
        "OMP_NUM_THREADS": str(threads),
        "BENCHMARK_SCRATCH": str(scratch),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "workloads" / f"{workload}.py")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{workload} over {package} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(workload: str, peer: Path, scratch: Path, repeats: int, threads: int) -> list[tuple[str, float, float]]:
    """Return medians (figure, ours, peer's) of `repeats` runs. The sides alternate, so that noise affects both."""
    sides: dict[Path, list[dict[str, float]]] = {OURS: [], peer: []}
    for _ in range(repeats):
        for package, runs in sides.items():
            runs.append(measure(workload, package, scratch, threads))
    names = [name for name in sides[OURS][0] if name in sides[peer][0]]
    return [(name, *(statistics.median(run[name] for run in runs) for runs in sides.values())) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of each run (default: %(default)s)")
    parser.add_argument("--peer", type=Path, default=PEER, help="folder with open_clip_torch 3.3.0 (default: .peer)")
    args = parser.parse_args()
    unknown = set(args.workloads) - set(WORKLOADS)
    if unknown:
        parser.error(f"Unknown workload {', '.join(unknown)}. Use any of {', '.join(WORKLOADS)}.")
    peer = args.peer.resolve()
    if not peer.is_dir():
        parser.error(f"{peer} is missing: run `make peer`, which installs open_clip_torch 3.3.0.")
    scratch = HERE / ".scratch"
    scratch.mkdir(exist_ok=True)
    print(f"{'workload':12} {'figure':38} {'ours':>12} {'peer':>12} {'peer / ours':>12}")
    for workload in args.workloads or WORKLOADS:
        for name, ours, theirs in compare(workload, peer, scratch, args.repeats, args.threads):
            print(f"{workload:12} {name:38} {ours:12.4g} {theirs:12.4g} {theirs / ours:12.2f}", flush=True)


if __name__ == "__main__":
    main()
