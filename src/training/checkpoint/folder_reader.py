"""Reading of sharded checkpoints: the content of a checkpoint file, with tensors that are read in parts."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.checkpoint.mismatch import join_some
from open_clip.formats.sharded_folder import METADATA, ShardedFolder
from training import file_utils
from training.checkpoint.file_format import OPTIMIZER_NAMES
from training.checkpoint.folder import MANIFEST, TRAINING
from training.checkpoint.stored_tensor import StoredTensor

_OPEN_CLIP_EXTRA = "_metadata_extra.pt"  # of open_clip's sharded checkpoints: epoch, name, scaler
_STATE = "optimizer.state."


def is_folder(path: str | Path) -> bool:
    """Return whether a path or URL is a sharded checkpoint."""
    try:
        return file_utils.check_exists(f"{path}/{METADATA}")
    except (NotADirectoryError, FileExistsError):  # from stores in which `path` is a file
        return False


def is_complete(url: str) -> bool:
    """Return whether a remote folder has the files of its manifest, with their sizes."""
    import fsspec.core

    filesystem, root = fsspec.core.url_to_fs(url)
    try:
        sizes = json.loads(filesystem.cat_file(f"{root}/{MANIFEST}"))["bytes"]
        return all(filesystem.info(f"{root}/{name}")["size"] == size for name, size in sizes.items())
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def read_folder(path: str | Path) -> dict[str, Any]:
    """Read the content of a sharded checkpoint, see `file_format`. The tensors are `StoredTensor`s.

    Args:
        path: the folder, or its URL. It may be from open_clip.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file of the folder is damaged.
    """
    folder = ShardedFolder(str(path), functools.partial(_open, str(path)))
    if file_utils.check_exists(f"{path}/{TRAINING}"):
        rest = dict(file_utils.pt_load(f"{path}/{TRAINING}"))
        saved, names = rest.pop("optimizer", None), rest.pop("tensors")
    elif file_utils.check_exists(f"{path}/{MANIFEST}"):
        raise ValueError(f"{path} is damaged: it has no {TRAINING}. Copy the folder again, or use another checkpoint.")
    else:
        (rest, saved), names = _read_open_clip(folder, str(path)), list(folder.tensors)
    if missing := [name for name in names if name not in folder.tensors]:
        raise ValueError(f"{path} is damaged: it lacks {join_some(missing)}.")
    tensors = {name: _stored(folder, name) for name in names}
    weights = _under("model.", tensors)
    content: dict[str, Any] = {**rest, "state_dict": weights}
    averages = _under("average.", tensors)
    if averages:
        content["state_dict_ema"] = {**weights, **averages}
    if saved is not None:
        content["optimizer"] = _optimizer_state(saved, tensors)
    return content


def _stored(folder: ShardedFolder, name: str) -> StoredTensor:
    tensor = folder.tensors[name]
    return StoredTensor.create(tensor.shape, tensor.dtype, functools.partial(folder.read, name))


def _open(path: str, name: str) -> Any:
    return file_utils.open_binary(f"{path}/{name}")


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _optimizer_state(saved: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict of an optimizer: states by index of the parameter, and groups."""
    by_parameter: dict[str, dict[str, Any]] = {}
    for name, value in _under(_STATE, tensors).items():
        parameter, _, key = name.rpartition(".")
        by_parameter.setdefault(parameter, {})[key] = value
    values = saved.get("values", {})
    states = {
        index: {**by_parameter.get(name, {}), **values.get(name, {})} for index, name in enumerate(saved["parameters"])
    }
    return {"state": {i: state for i, state in states.items() if state}, "param_groups": saved["param_groups"]}


def _read_open_clip(folder: ShardedFolder, path: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return (epoch, name and so on, groups of the optimizer) of a folder from open_clip."""
    rest: dict[str, Any] = {}
    if file_utils.check_exists(f"{path}/{_OPEN_CLIP_EXTRA}"):
        extra = file_utils.pt_load(f"{path}/{_OPEN_CLIP_EXTRA}")
        rest = {key: extra[key] for key in ("epoch", "name", "scaler") if extra.get(key) is not None}
    groups: dict[int, dict[str, Any]] = {}
    for name in folder.objects:
        if match := re.fullmatch(r"optimizer\.param_groups\.(\d+)\.(\w+)", name):
            groups.setdefault(int(match[1]), {})[match[2]] = folder.read_object(name)
    ordered = [groups[number] for number in sorted(groups)]
    if not ordered or not all(isinstance(group.get("params"), list) for group in ordered):
        return rest, None
    names = [group["params"] for group in ordered]
    rest["train_state"] = {OPTIMIZER_NAMES: names}
    numbers = itertools.count()
    return rest, {
        "parameters": list(itertools.chain.from_iterable(names)),
        "param_groups": [{**group, "params": [next(numbers) for _ in group["params"]]} for group in ordered],
    }
