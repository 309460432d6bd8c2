"""Runs the tests of this folder on open_clip_torch 3.3.0 and here, and prints one table of both.

    make peer                                      # installs open_clip_torch 3.3.0 into .peer
    python tests/compat/compare.py
    python tests/compat/compare.py -k attention    # arguments go to pytest

The exit status is 1 if a test fails on either side. Tests that 3.3.0 cannot pass carry `@pytest.mark.ours_only` with
the reason, which the table shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEER = ROOT / ".peer"


def run(package: Path, arguments: list[str]) -> dict[str, str]:
    """Run the tests over the open_clip in `package`; return outcome by test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", str(HERE), f"--junit-xml={report}", "-o", "pythonpath="),
                *("-p", "no:cacheprovider", *arguments),
            ],
            env={**os.environ, "PYTHONPATH": str(package)},
            check=False,
            cwd=ROOT,
        )
        return {
            f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}": _outcome(case)
            for case in ElementTree.parse(report).iter("testcase")
        }


def _outcome(case: ElementTree.Element) -> str:
    for child in case:
        if child.tag in ("failure", "error"):
            return "FAILS"
        if child.tag == "skipped":
            return f"- ({child.get('message')})"
    return "passes"


def main(arguments: list[str]) -> int:
    if not PEER.is_dir():
        sys.exit(f"{PEER} is missing: run `make peer`.")
    ours = run(ROOT / "src", arguments)
    peer = run(PEER, arguments)
    width = max(map(len, ours), default=0)
    print(f"\n{'test':{width}}  {'here':8}  open_clip_torch 3.3.0")
    for name, outcome in ours.items():
        print(f"{name:{width}}  {outcome:8}  {peer.get(name, 'missing')}")
    return int("FAILS" in [*ours.values(), *peer.values()] or ours.keys() != peer.keys())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
