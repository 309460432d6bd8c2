"""`python -m training.doctor`: report what this machine has for training, and what to fix.

The exit status is 0 if training can run on any device. An accelerator that is present but not usable is a problem in
the report, and training can still run on the CPU. `--json` prints the report for programs. `--constraints` prints the
installed torch, torchvision and torch_npu as a pip constraint file: `pip install -c <(python -m training.doctor
--constraints) PACKAGE` installs a package without changing these.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from open_clip import device as devices
from open_clip import torch_versions
from open_clip.utils import exit_command
from open_clip.version import __version__
from training import precision

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 6)

# Distribution -> (module to import, purpose). They are imported because a wheel for another torch fails only then.
REQUIRED = {
    "torchvision": ("torchvision", "image transforms"),
    "pillow": ("PIL", "reading images"),
    "ftfy": ("ftfy", "the tokenizer"),
    "regex": ("regex", "the tokenizer"),
    "huggingface_hub": ("huggingface_hub", "pretrained weights"),
    "safetensors": ("safetensors", "pretrained weights"),
    "timm": ("timm", "timm image towers and augmentation"),
    "tqdm": ("tqdm", "progress bars"),
}
OPTIONAL = {
    "webdataset": "tar shards (--dataset-type webdataset)",
    "pandas": "CSV data (--dataset-type csv)",
    "tensorboard": "--report-to tensorboard",
    "wandb": "--report-to wandb",
    "transformers": "Hugging Face text towers and tokenizers",
    "onnx": "python -m open_clip.export",
    "onnxruntime": "python -m open_clip.export",
    "onnxscript": "python -m open_clip.export",
    "fsspec": "--remote-sync-protocol fsspec",
    "scikit-learn": "make demo",
    "matplotlib": "make demo",
}


@dataclass
class Report:
    """Facts about this machine. Memory is in bytes. A missing package has the version None."""

    versions: dict[str, str] = field(default_factory=dict)
    devices: list[dict[str, Any]] = field(default_factory=list)
    default_device: str = "cpu"
    missing_devices: dict[str, str] = field(default_factory=dict)
    fused_ops: dict[str, str | None] = field(default_factory=dict)  # None, or why it does not work
    backends: list[str] = field(default_factory=list)
    precisions: list[str] = field(default_factory=list)
    required: dict[str, str | None] = field(default_factory=dict)
    optional: dict[str, str | None] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # should be fixed, but training can run
    obstacles: list[str] = field(default_factory=list)  # training cannot run

    @property
    def can_train(self) -> bool:
        return not self.obstacles


def examine() -> Report:
    """Examine this machine. Errors become problems or obstacles in the report."""
    report = Report()
    _examine_versions(report)
    _examine_devices(report)
    _examine_packages(report)
    report.backends = _backends()
    report.default_device = devices.best().type
    report.precisions = precision.available(report.default_device)
    report.fused_ops = devices.get(report.default_device).fused_ops()
    failure = _try_a_step(report.default_device)
    if failure:
        report.obstacles.append(f"A training step on {report.default_device} failed: {failure}")
    return report


def _examine_versions(report: Report) -> None:
    report.versions = {
        "open_clip": __version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()}, {os.cpu_count()} cores)",
        "torch": str(torch.__version__),
    }
    if sys.version_info < OLDEST_PYTHON:
        report.obstacles.append(f"Python {platform.python_version()} is too old. Use 3.10 or later.")
    if tuple(int(part) for part in str(torch.__version__).split(".")[:2]) < OLDEST_TORCH:
        report.obstacles.append(f"torch {torch.__version__} is too old. Use 2.6 or later.")


def _examine_devices(report: Report) -> None:
    for kind in devices.DEVICES.values():
        report.versions.update(kind.software())
        report.problems.extend(kind.problems())
        if kind.is_available():
            report.problems.extend([*kind.environment_errors(), *kind.environment_warnings()])
        report.environment.update({name: os.environ[name] for name in kind.variables if name in os.environ})
        reason = kind.why_missing()
        if reason is not None:
            report.missing_devices[kind.type] = reason
        for index in range(kind.count()):
            name = f"{kind.type}:{index}" if kind.indexed else kind.type
            try:
                found = {"device": name, "name": kind.name(index), "memory": kind.memory(index).get("total")}
            except Exception as error:  # report any error of the driver
                report.problems.append(f"{name} does not answer: {_reason(error)}")
            else:
                report.devices.append(found)


def _examine_packages(report: Report) -> None:
    for distribution, (module, purpose) in REQUIRED.items():
        report.required[distribution] = version = _version(distribution)
        if version is None:
            report.obstacles.append(f"{distribution} ({purpose}) is not installed. Run: pip install {distribution}")
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # wheels for another torch raise many types of errors
            report.obstacles.append(
                f"{distribution} {version} is installed but cannot be imported ({_reason(error)}). Install the "
                f"version for torch {torch.__version__}."
            )
    report.optional = {distribution: _version(distribution) for distribution in OPTIONAL}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backends() -> list[str]:
    """List the available collective backends of the devices."""
    present = dict.fromkeys(kind.backend for kind in devices.DEVICES.values() if kind.is_available())
    return [backend for backend in present if torch.distributed.is_backend_available(backend)]


def _try_a_step(device: str) -> str | None:
    """Do one optimizer step of a tiny layer. Return the reason of a failure, or None."""
    try:
        layer = torch.nn.Linear(8, 8).to(device)
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.ones(4, 8, device=device)).square().sum().backward()
        optimizer.step()
        devices.get(device).synchronize()
        finite = bool(torch.isfinite(layer.weight).all())
    except Exception as error:  # report any error
        return _reason(error)
    return None if finite else "the weights are not finite afterwards"


def _reason(error: BaseException) -> str:
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    advice = devices.hint(str(error))
    return f"{reason} {advice}" if advice else reason


def render(report: Report) -> str:
    """Format the report as aligned text."""
    sections = [
        ("Versions", list(report.versions.items())),
        ("Devices", [(found["device"], _describe(found)) for found in report.devices]),
        ("Not available", list(report.missing_devices.items())),
        (
            "Training",
            [
                ("default device", report.default_device),
                ("precisions", ", ".join(report.precisions)),
                ("collectives", ", ".join(report.backends)),
            ],
        ),
        ("Fused operators", [(name, failure or "works") for name, failure in report.fused_ops.items()]),
        ("Required packages", [(name, version or "MISSING") for name, version in report.required.items()]),
        (
            "Optional packages",
            [(name, f"{version or '-':<12}{OPTIONAL[name]}") for name, version in report.optional.items()],
        ),
        ("Environment", list(report.environment.items())),
    ]
    width = max(len(label) for _, rows in sections for label, _ in rows) + 2
    lines = [line for title, rows in sections if rows for line in _section(title, rows, width)]
    for title, found in (("Problems", report.problems), ("Obstacles to training", report.obstacles)):
        if found:
            lines += [title, *(f"  ! {sentence}" for sentence in found), ""]
    lines.append(f"Training {'can run' if report.can_train else 'cannot run'} here.")
    return "\n".join(lines)


def _section(title: str, rows: Iterable[tuple[str, str]], width: int) -> list[str]:
    return [title, *(f"  {label:<{width}}{value}" for label, value in rows), ""]


def _describe(found: dict[str, Any]) -> str:
    memory = found["memory"]
    return found["name"] + (f", {memory / 2**30:.1f} GiB" if memory else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--constraints", action="store_true", help="print a pip constraint file that keeps the installed torch"
    )
    options = parser.parse_args(argv)
    if options.constraints:
        print("\n".join(torch_versions.installed_pins()))
        return 0
    report = examine()
    if options.json:
        print(json.dumps({**asdict(report), "can_train": report.can_train}, indent=2))
    else:
        print(render(report))
    return 0 if report.can_train else 1


if __name__ == "__main__":
    exit_command(main())
