"""Ten malicious pickles are refused or inert in every loader of the training command.

Each would create a file if it were unpickled, which is first shown with pickle itself. Each comes in torch's new and
old file formats and as a bare pickle, as the whole file and nested in a checkpoint. In the latter case it is dropped.
"""

from __future__ import annotations

import builtins
import functools
import io
import os
import pickle
import runpy
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Runs, main

import open_clip
from open_clip.checkpoint.files import load_state_dict
from training import file_utils
from training.checkpoint import weights
from training.checkpoint.latest import get_latest_checkpoint

OTHERS = (ValueError, RuntimeError, OSError)


class Call:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.reduced


class Sets:
    """An object whose state is set by a function of the attacker when it is unpickled."""

    def __init__(self, setter: Callable) -> None:
        self.setter = setter

    def __reduce__(self) -> tuple:
        return OrderedDict, (), {"a": 1}, None, None, self.setter


def payloads(marker: Path, script: Path) -> dict[str, Any]:
    code = f"open({str(marker)!r}, 'w').close()"
    script.write_text(code)
    (script.with_suffix(".pkl")).write_bytes(pickle.dumps(Call(os.mkdir, str(marker))))
    return {
        "os.mkdir": Call(os.mkdir, str(marker)),
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(builtins.eval, code),
        "exec": Call(builtins.exec, code),
        "subprocess": Call(subprocess.check_call, ["touch", str(marker)]),
        "open": Call(builtins.open, str(marker), "w"),
        "runpy": Call(runpy.run_path, str(script)),
        "copy": Call(shutil.copyfile, str(script), str(marker)),
        "a nested pickle": Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(marker)))),
        "a state's setter": Sets(functools.partial(make_folder, str(marker))),
    }


def make_folder(path: str, *_: Any) -> None:
    os.mkdir(path)


def forms(payload: Any) -> dict[str, bytes]:
    def saved(content: Any, **how: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer, **how)
        return buffer.getvalue()

    deep = {"epoch": 1, "name": "x", "state_dict": OrderedDict(weight=torch.ones(2)), "train_state": {"rng": [payload]}}
    return {
        "a checkpoint": saved(deep),
        "an old checkpoint": saved(deep, _use_new_zipfile_serialization=False),
        "the whole file": saved(payload),
        "a bare pickle": pickle.dumps(payload),
    }


def loaders(folder: Path, model: str) -> dict[str, Callable[[Path], Any]]:
    def latest(path: Path) -> Any:
        (folder / "run").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "run/epoch_1.pt")
        return get_latest_checkpoint(folder / "run")

    def most_recent(path: Path) -> Any:
        (folder / "recent").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "recent/epoch_latest.pt")
        return get_latest_checkpoint(folder / "recent")

    clip = open_clip.create_model(model)
    return {
        "--resume FILE": weights.load_checkpoint,
        "--resume latest": latest,
        "--resume latest, epoch_latest.pt": most_recent,
        "pt_load": file_utils.pt_load,
        "load_state_dict": load_state_dict,
        "load_checkpoint": lambda path: open_clip.load_checkpoint(clip, str(path)),
        "--pretrained FILE": lambda path: open_clip.create_model(model, pretrained=str(path)),
    }


def measure(runs: Runs) -> tuple[dict, bool]:
    folder, marker = runs.folder, runs.folder / "ran"
    inert, ran, refused, live = 0, [], 0, 0
    all_payloads = payloads(marker, folder / "script.py")
    for name, payload in all_payloads.items():
        pickle.loads(pickle.dumps(payload))
        live += remove_marker(marker)
        for form, content in forms(payload).items():
            for loader, load in loaders(folder, runs.model).items():
                (folder / "evil.pt").write_bytes(content)
                try:
                    found = load(folder / "evil.pt")
                    inert += 1
                    if holds_objects(found):
                        ran.append(f"{name}, {form}, {loader}: returned an object")
                except OTHERS:
                    refused += 1
                if remove_marker(marker):
                    ran.append(f"{name}, {form}, {loader}")
    figures = {
        "pickles": len(all_payloads),
        "of them that would run": live,
        "attempts refused": refused,
        "attempts that loaded without the pickle's objects": inert,
        "attempts that ran": ran,
        "names of runs refused": names_refused(),
    }
    return figures, not ran and live == len(all_payloads) and figures["names of runs refused"] == 6


def holds_objects(loaded: Any) -> bool:
    """Return whether the loaded object contains anything but tensors, plain values and containers of them."""
    if isinstance(loaded, dict):
        return any(map(holds_objects, loaded.values()))
    if isinstance(loaded, (list, tuple)):
        return any(map(holds_objects, loaded))
    return not isinstance(loaded, (torch.Tensor, str, int, float, type(None)))


def names_refused() -> int:
    from training.params import parse_args

    refused = 0
    for name in ("..", "../x", "/tmp/x", "a/b", "a\\b", "."):
        try:
            parse_args(["--name", name])
        except SystemExit:
            refused += 1
    return refused


def remove_marker(marker: Path) -> bool:
    """Remove the marker; return whether it existed."""
    if marker.is_dir():
        marker.rmdir()
    elif marker.exists():
        marker.unlink()
    else:
        return False
    return True


if __name__ == "__main__":
    main(measure)
