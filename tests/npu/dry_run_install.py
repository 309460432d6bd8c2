"""Check what pip would install with each file of constraints/, on x86-64 and aarch64. Needs a package index.

    python tests/npu/dry_run_install.py                                    all pairs, with this Python
    python tests/npu/dry_run_install.py --python python3.10 python3.11 --torch 2.9.0 2.13.0

For each pair of torch and torch_npu, it creates an environment with the metadata of the CPU build of torch and of
torch_npu, including the requirements of the real wheels. There it runs
`pip install --dry-run -c constraints/torch-X.txt -r requirements.txt`. The result must contain no torch, no CUDA
package, and the torchvision for that torch. Nothing is installed. A release that the index does not have is skipped
with pip's reason. `--without-constraints` shows what pip does without the file.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA = re.compile(r"nvidia|cuda|triton")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")

sys.path.insert(0, str(ROOT / "constraints"))
import write  # noqa: E402  constraints/write.py

torch_versions = write.load_torch_versions()


class Unavailable(Exception):
    """Raised if the index does not have a release for this machine."""


class Environment:
    """A virtual environment whose pip resolves for another machine.

    `pip --platform` chooses wheels for the other machine but evaluates markers such as `platform_machine == "x86_64"`
    on this one, so `sitecustomize` makes Python report the other machine's name.
    """

    def __init__(self, python: str, machine: str, folder: Path) -> None:
        subprocess.run([python, "-m", "venv", folder], check=True)
        self.python = folder / "bin/python"
        # --platform together with --dry-run needs a newer pip than that of Python 3.10 and 3.11.
        subprocess.run([self.python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
        (self.site_packages,) = folder.glob("lib/python*/site-packages")
        self.name = f"{self.site_packages.parent.name} {machine}"
        text = f"import platform\nplatform.machine = lambda: {machine!r}\n"
        (self.site_packages / "sitecustomize.py").write_text(text, encoding="utf-8")
        self.platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_{machine}")]

    def resolve(self, *arguments: str) -> dict[str, dict]:
        """Return the metadata of the packages that `pip install` would install, by normalized name."""
        report = self.site_packages / "report.json"
        command = [
            self.python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--report",
            report,
            "--only-binary=:all:",
            *self.platforms,
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise Unavailable((errors or [done.stderr.strip()])[-1])
        found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
        return {metadata["name"].lower().replace("_", "-"): metadata for metadata in found}

    def pretend(self, name: str, version: str, requirements: list[str]) -> None:
        """Add the metadata of an installed distribution. Metadata of another version is replaced."""
        for old in self.site_packages.glob(f"{name}-*.dist-info"):
            shutil.rmtree(old)
        folder = self.site_packages / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
        (folder / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "INSTALLER").write_text("pip\n", encoding="utf-8")
        (folder / "RECORD").write_text("", encoding="utf-8")

    def pretend_pair(self, torch: str) -> str:
        """Add the metadata of torch's CPU build and of the newest torch_npu for it. Return the torch_npu version."""
        wheels = self.resolve("--ignore-installed", "--no-deps", f"torch=={torch}", f"torch_npu=={torch}.*")
        cpu_build = [line for line in wheels["torch"].get("requires_dist", []) if not CUDA.search(line)]
        self.pretend("torch", f"{torch}+cpu", cpu_build)
        npu = wheels["torch-npu"]
        self.pretend("torch_npu", npu["version"], npu.get("requires_dist", []))
        return npu["version"]


def try_pair(environment: Environment, torch: str, with_constraints: bool) -> tuple[str, list[str]]:
    """Return a description of the check, and the wrong packages that pip would install with this pair."""
    torch_npu = environment.pretend_pair(torch)
    constraints = ["-c", str(ROOT / f"constraints/torch-{torch}.txt")] if with_constraints else []
    found = environment.resolve(*constraints, "-r", str(ROOT / "requirements.txt"))
    wrong = [f"{name} {found[name]['version']}" for name in ("torch", "torch-npu") if name in found]
    wrong += [f"{name} {metadata['version']}" for name, metadata in found.items() if CUDA.search(name)]
    torchvision = found["torchvision"]["version"]
    if torchvision.split("+")[0] != torch_versions.torchvision_for(torch):
        wrong.append(f"torchvision {torchvision}")
    return f"torch {torch}, torch_npu {torch_npu}: torchvision {torchvision}, {len(found)} packages", wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters to resolve for")
    parser.add_argument("--machine", nargs="+", default=["x86_64", "aarch64"])
    parser.add_argument("--torch", nargs="+", default=list(write.TORCH), help="releases of torch")
    parser.add_argument("--without-constraints", action="store_true", help="do not use the constraint files")
    options = parser.parse_args()
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for python in options.python:
        for machine in options.machine:
            with tempfile.TemporaryDirectory() as folder:
                environment = Environment(python, machine, Path(folder))
                for torch in options.torch:
                    try:
                        tried, wrong = try_pair(environment, torch, not options.without_constraints)
                    except Unavailable as error:
                        outcome, tried, wrong = "skipped", f"torch {torch}: {error}", []
                    else:
                        outcome = "failed" if wrong else "passed"
                    counts[outcome] += 1
                    note = f". Would install {', '.join(wrong)}" if wrong else ""
                    print(f"{outcome}  {environment.name}  {tried}{note}", flush=True)
    print(", ".join(f"{number} {outcome}" for outcome, number in counts.items()))
    return 1 if counts["failed"] or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
