"""The torchvision and torch_npu for a torch, and the pip constraint files for them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from open_clip import torch_versions

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "constraints").glob("*.txt"))

# From the metadata of the wheels.
TORCHVISION = {
    "2.6.0": "0.21.0",
    "2.7.1": "0.22.1",
    "2.8.0": "0.23.0",
    "2.9.0": "0.24.0",
    "2.9.1": "0.24.1",
    "2.10.0": "0.25.0",
    "2.11.0": "0.26.0",
    "2.12.0": "0.27.0",
    "2.13.0": "0.28.0",
    "2.14.0": "0.29.0",
    "2.14.1": "0.29.1",
}


@pytest.mark.parametrize(
    ("version", "three"),
    [
        ("2.9.0.post2", "2.9.0"),
        ("2.13.0+cpu", "2.13.0"),
        ("2.6.0a0+git1a2b", "2.6.0"),
        ("2.7", "2.7.0"),
        ("2.7.1.post8+gitabc", "2.7.1"),
        ("2.10.0.dev20260101", "2.10.0"),
    ],
)
def test_a_release_is_three_numbers(version, three):
    assert torch_versions.release(version) == three


def test_an_invalid_version_raises():
    with pytest.raises(ValueError, match="'unknown' is not a version"):
        torch_versions.release("unknown")


@pytest.mark.parametrize(
    ("torch_npu", "torch", "fits"),
    [
        ("2.7.1.post11", "2.7.1", True),
        ("2.7.1", "2.7.0", False),
        ("2.14.0", "2.14.1+cpu", False),
        ("2.13.0", "2.13.0+cpu", True),
        ("2.1.0", "2.10.0", False),
    ],
)
def test_torch_npu_needs_torch_to_all_three_numbers(torch_npu, torch, fits):
    assert torch_versions.is_built_for(torch_npu, torch) == fits


@pytest.mark.parametrize(("torch", "torchvision"), TORCHVISION.items())
def test_torchvision_follows_from_torch(torch, torchvision):
    assert torch_versions.torchvision_for(torch) == torchvision
    assert torch_versions.torchvision_for(f"{torch}+cpu") == torchvision


@pytest.mark.parametrize(
    ("installed", "pins"),
    [
        (
            {"torch": "2.9.0+cpu", "torchvision": "0.24.0+cpu", "torch-npu": "2.9.0.post2"},
            ["torch==2.9.0+cpu", "torchvision==0.24.0+cpu", "torch-npu==2.9.0.post2"],
        ),
        ({"torch": "2.9.0", "torchvision": "0.29.1"}, ["torch==2.9.0", "torchvision==0.24.0"]),
        ({"torch": "2.9.0"}, ["torch==2.9.0", "torchvision==0.24.0"]),
        ({"torch": "3.0.0"}, ["torch==3.0.0"]),
        ({"torch": "3.0.0", "torchvision": "1.2"}, ["torch==3.0.0", "torchvision==1.2"]),
    ],
)
def test_installed_pins(monkeypatch, installed, pins):
    def version(name):
        if name in installed:
            return installed[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert torch_versions.installed_pins() == pins


def test_constraint_files_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "constraints/write.py", "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert len(FILES) >= 15


def pins_of(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_constraint_file_pins_three_releases_that_match(path):
    pins = pins_of(path)
    assert pins.keys() == {"torch", "torchvision", "torch_npu"}
    assert pins["torchvision"] == TORCHVISION[pins["torch"]]
    assert torch_versions.is_built_for(pins["torch_npu"].removesuffix(".*"), pins["torch"])
    # cann-*.txt names one torch_npu; torch-*.txt leaves the .postN open and is called after torch
    assert pins["torch_npu"].endswith(".*") == path.name.startswith("torch-")
    assert path.name.startswith("cann-") or path.stem == f"torch-{pins['torch']}"
    assert (ROOT / f"constraints/torch-{pins['torch']}.txt").exists()


# What pip does with them. The test's index has empty wheels with the requirements of the real ones.

NAMES = [
    line.split(">")[0]
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
CUDA = "nvidia-cublas"


def metadata_of(name: str, version: str, requirements: list[str]) -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    return "\n".join([*lines, *(f"Requires-Dist: {requirement}" for requirement in requirements)]) + "\n"


def write_wheel(folder: Path, name: str, version: str, *requirements: str) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata_of(name, version, list(requirements)))
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    for torch in ("2.9.0", "2.10.0", "2.14.0", "2.14.1"):
        write_wheel(folder, "torch", torch, CUDA)
        write_wheel(folder, "torchvision", TORCHVISION[torch], f"torch=={torch}")
    for torch_npu, torch in (("2.9.0.post2", "2.9.0"), ("2.10.0", "2.10.0"), ("2.14.0", "2.14.0.*")):
        write_wheel(folder, "torch_npu", torch_npu, f"torch=={torch}")
    write_wheel(folder, "timm", "99.0", "torch", "torchvision")
    for name in (CUDA, *NAMES):
        if name not in ("torch", "torchvision", "timm"):
            write_wheel(folder, name, "99.0")
    return folder


@pytest.fixture
def dry_run(index, tmp_path):
    """Return a function that runs `pip install --dry-run` in an environment that contains only fake metadata."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site_packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}

    def run(*arguments: str, **variables: str) -> dict[str, str] | str:
        """Return the versions that pip would install by name, or its error."""
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "--python",
                tmp_path / "venv/bin/python",
                "install",
                "--quiet",
                "--dry-run",
                "--no-index",
                "--find-links",
                index,
                "--report",
                tmp_path / "report.json",
                *arguments,
            ],
            env={**environment, "PIP_CONFIG_FILE": os.devnull, **variables},
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return done.stderr
        report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        return {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}

    def pretend(name: str, version: str, *requirements: str) -> None:
        folder = site_packages / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(metadata_of(name, version, list(requirements)), encoding="utf-8")

    run.pretend = pretend
    return run


def test_requirements_over_a_pair_keep_its_torch_with_the_constraint_file_alone(dry_run):
    dry_run.pretend("torch", "2.9.0+cpu")
    dry_run.pretend("torch_npu", "2.9.0.post2", "torch==2.9.0")
    without = dry_run("-r", "requirements.txt")
    assert {"torch", CUDA} <= without.keys()  # the failure: this torch_npu cannot load with them
    found = dry_run("-c", "constraints/torch-2.9.0.txt", "-r", "requirements.txt")
    assert found.keys() == set(NAMES) - {"torch"}
    assert found["torchvision"] == "0.24.0"


def test_a_constraint_file_refuses_the_torch_npu_of_another_torch(dry_run):
    assert "Cannot install torch_npu==2.14.0" in dry_run("-c", "constraints/torch-2.9.0.txt", "torch_npu==2.14.0")


def test_requirements_npu_takes_the_pair_of_this_cann_and_nothing_without_it(dry_run):
    found = dry_run("-r", "requirements-npu.txt", CANN="9.0")
    assert found == {"torch": "2.10.0", "torchvision": "0.25.0", "torch_npu": "2.10.0", CUDA: "99.0"}
    for variables in ({}, {"CANN": "1.0"}):
        assert "No such file" in dry_run("-r", "requirements-npu.txt", **variables)


def test_the_package_itself_does_not_require_torch_npu():
    """An extra cannot depend on the CANN of the host."""
    assert "torch_npu" not in NAMES
    code = [line for line in (ROOT / "setup.py").read_text(encoding="utf-8").splitlines() if "#" not in line]
    assert not any("torch_npu" in line or "requirements-npu" in line for line in code)


@pytest.mark.parametrize("page", ["docs/npu.md", "docs/zh/npu.md"])
def test_the_documents_have_the_pairs_of_the_constraint_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^ *\| (\d+\.\d+) \| (\S+) \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    names = ("torch", "torch_npu", "torchvision")
    pairs = {f"cann-{cann}": dict(zip(names, versions, strict=True)) for cann, *versions in rows}
    assert pairs == {path.stem: pins_of(path) for path in FILES if path.name.startswith("cann-")}


SHELL = re.compile(r"```shell\n(.*?)```", re.DOTALL)


def commands_of(page: str) -> list[str]:
    """Return the shell blocks of a page without comments and trailing blanks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [re.sub(r" *#.*", "", block) for block in SHELL.findall(text)]


def test_the_installation_is_the_same_on_every_page():
    pages = ("docs/quick_start.md", "docs/zh/quick_start.md", "docs/npu.md", "docs/zh/npu.md")
    first = {commands_of(page)[0] for page in pages}
    assert len(first) == 1
    lines = first.pop().splitlines()
    assert lines.index("pip install -e '.[training]'") > lines.index("pip install -r requirements-npu.txt")
    assert commands_of("docs/npu.md") == commands_of("docs/zh/npu.md")


def test_the_dockerfile_and_the_pages_name_constraint_files_that_exist():
    cann = {path.stem.removeprefix("cann-") for path in FILES if path.name.startswith("cann-")}
    torch = {path.stem for path in FILES} - {f"cann-{version}" for version in cann}
    pages = (*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "docker/Dockerfile.ascend", *ROOT.glob("*.txt"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"constraints/(torch-[\d.]+)\.txt", text))
    assert named
    assert named <= torch
    versions = set(re.findall(r"\bCANN=(\d[\d.]*)|constraints/cann-([\d.]+)\.txt", text))
    assert {first or second for first, second in versions} <= cann
