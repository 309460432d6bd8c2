"""`python -m training.doctor`: what this machine has for training, and what to mend.

The exit status is 0 if training can run, on whatever device: an accelerator that is there and cannot be used is a
problem in the report, and the CPU still trains. `--json` prints the same findings for programs.
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
from open_clip.version import __version__
from training import precision

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 6)

# Distribution -> (module to import, what it is for). Imported, since a wheel for another torch installs and fails here.
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
    """What was found. Memory is in bytes; a package that is missing has the version None."""

    versions: dict[str, str] = field(default_factory=dict)
    devices: list[dict[str, Any]] = field(default_factory=list)
    default_device: str = "cpu"
    missing_devices: dict[str, str] = field(default_factory=dict)
    fused_ops: dict[str, str | None] = field(default_factory=dict)  # None: works; else why it does not
    backends: list[str] = field(default_factory=list)
    precisions: list[str] = field(default_factory=list)
    required: dict[str, str | None] = field(default_factory=dict)
    optional: dict[str, str | None] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # worth mending; training runs nevertheless
    obstacles: list[str] = field(default_factory=list)  # training cannot run

    @property
    def can_train(self) -> bool:
        return not self.obstacles


def examine() -> Report:
    """Looks at this machine; what breaks while being looked at becomes a problem or an obstacle of the report."""
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
        report.obstacles.append(f"Python {platform.python_version()} is too old: 3.10 or later is needed.")
    if tuple(int(part) for part in str(torch.__version__).split(".")[:2]) < OLDEST_TORCH:
        report.obstacles.append(f"torch {torch.__version__} is too old: 2.6 or later is needed.")


def _examine_devices(report: Report) -> None:
    for kind in devices.DEVICES.values():
        report.versions.update(kind.software())
        report.problems.extend(kind.problems())
        report.environment.update({name: os.environ[name] for name in kind.variables if name in os.environ})
        reason = kind.why_missing()
        if reason is not None:
            report.missing_devices[kind.type] = reason
        for index in range(kind.count()):
            name = f"{kind.type}:{index}" if kind.indexed else kind.type
            try:
                found = {"device": name, "name": kind.name(index), "memory": kind.memory(index).get("total")}
            except Exception as error:  # whatever a driver raises is what the reader has to know
                report.problems.append(f"{name} does not answer: {_first_line(error)}")
            else:
                report.devices.append(found)


def _examine_packages(report: Report) -> None:
    for distribution, (module, purpose) in REQUIRED.items():
        report.required[distribution] = version = _version(distribution)
        if version is None:
            report.obstacles.append(f"{distribution} is not installed ({purpose}): pip install {distribution}")
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # a wheel built for another torch raises errors of many types
            report.obstacles.append(
                f"{distribution} {version} is installed and cannot be imported ({_first_line(error)}): install the "
                f"version that belongs to torch {torch.__version__}."
            )
    report.optional = {distribution: _version(distribution) for distribution in OPTIONAL}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backends() -> list[str]:
    """Collective backends of the devices present that this torch has, without repetition."""
    present = dict.fromkeys(kind.backend for kind in devices.DEVICES.values() if kind.is_available())
    return [backend for backend in present if torch.distributed.is_backend_available(backend)]


def _try_a_step(device: str) -> str | None:
    """One optimizer step of a tiny layer; what went wrong, or None."""
    try:
        layer = torch.nn.Linear(8, 8).to(device)
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.ones(4, 8, device=device)).square().sum().backward()
        optimizer.step()
        devices.get(device).synchronize()
        finite = bool(torch.isfinite(layer.weight).all())
    except Exception as error:  # the point is to report whatever it is
        return _first_line(error)
    return None if finite else "the weights are not finite after it"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def render(report: Report) -> str:
    """The report as aligned text."""
    sections = [
        ("Versions", list(report.versions.items())),
        ("Devices", [(found["device"], _describe(found)) for found in report.devices]),
        ("Not there", list(report.missing_devices.items())),
        ("Training", [
            ("default device", report.default_device),
            ("precisions", ", ".join(report.precisions)),
            ("collectives", ", ".join(report.backends)),
        ]),
        ("Fused operators", [(name, failure or "works") for name, failure in report.fused_ops.items()]),
        ("Packages needed", [(name, version or "MISSING") for name, version in report.required.items()]),
        ("Packages optional", [
            (name, f"{version or '-':<12}{OPTIONAL[name]}") for name, version in report.optional.items()
        ]),
        ("Environment", list(report.environment.items())),
    ]
    width = max(len(label) for _, rows in sections for label, _ in rows) + 2
    lines = [line for title, rows in sections if rows for line in _section(title, rows, width)]
    for title, found in (("To mend", report.problems), ("In the way of training", report.obstacles)):
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
    options = parser.parse_args(argv)
    report = examine()
    if options.json:
        print(json.dumps({**asdict(report), "can_train": report.can_train}, indent=2))
    else:
        print(render(report))
    return 0 if report.can_train else 1


if __name__ == "__main__":
    sys.exit(main())
