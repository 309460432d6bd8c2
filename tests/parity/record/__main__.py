"""Record again what tests/parity compares with, from open_clip_torch 3.3.0.

    make peer
    python tests/parity/record [NAME ...]

Each recorder runs in a process of its own in which `open_clip` is 3.3.0. `git diff` then shows what changed. Two of
them need older packages than the tests do and run only when they are named: coca needs transformers 4 (beam search
there takes a class that transformers 5 removed), training_api needs numpy before 2.4.

fixtures/profile_examples.csv is not recorded: it is a part of the table that open_clip publishes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "__main__")
NEED_OLDER_PACKAGES = ("coca", "training_api")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default: all that can run)")
    parser.add_argument("--peer", type=Path, default=ROOT / ".peer", help="folder of 3.3.0 (default: .peer)")
    options = parser.parse_args()
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"There is no recorder {', '.join(sorted(unknown))}. Choose from {', '.join(NAMES)}.")
    if not options.peer.is_dir():
        parser.error(f"{options.peer} does not exist. Run `make peer`.")
    folders = (options.peer.resolve(), ROOT / "tests/helpers")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    for name in options.names or [name for name in NAMES if name not in NEED_OLDER_PACKAGES]:
        print(f"Recording {name} ...", flush=True)
        subprocess.run([sys.executable, str(HERE / f"{name}.py")], env=environment, check=True)


if __name__ == "__main__":
    main()
