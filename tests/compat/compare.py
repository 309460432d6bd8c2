"""Runs the tests of this folder on open_clip_torch 3.3.0 and here, and prints one table of both.

    python tests/compat/compare.py                 # installs open_clip_torch 3.3.0 into .peer first, if need be
    python tests/compat/compare.py -k attention    # further arguments go to pytest

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
# The loaders of open_clip 3.3.0 import names that webdataset 1.0 no longer has.
PEER_PACKAGES = ("open_clip_torch==3.3.0", "webdataset==0.2.86")


def install_peer(folder: Path = PEER) -> Path:
    """Install open_clip_torch without its dependencies into a folder; return the folder."""
    if not (folder / "open_clip").is_dir() or not (folder / "webdataset").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        environment = {key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}
        subprocess.run([*command, *PEER_PACKAGES], check=True, env=environment)
    return folder


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
    ours = run(ROOT / "src", arguments)
    peer = run(install_peer(), arguments)
    width = max(map(len, ours), default=0)
    print(f"\n{'test':{width}}  {'here':8}  open_clip_torch 3.3.0")
    for name, outcome in ours.items():
        print(f"{name:{width}}  {outcome:8}  {peer.get(name, 'missing')}")
    return int("FAILS" in [*ours.values(), *peer.values()] or ours.keys() != peer.keys())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
