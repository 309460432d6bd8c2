"""Reading of checkpoint files.

A checkpoint is a file of `torch.save` (a state dict or a training checkpoint), safetensors, a NumPy archive, or
OpenAI's TorchScript archive. Each file is read once, directly into the memory of the tensors. Only files that nobody
edits, those in download caches, are memory-mapped: overwriting a mapped file changes the model or ends the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..formats.binary_file import BinaryFile, FileError, name_damage
from ..formats.inert_pickle import is_foreign, replace_records, to_plain_tree
from ..formats.mapped_zip import names_in_zip
from ..formats.npz import has_arrays_only, read_arrays
from ..formats.safetensors_file import MAX_HEADER, read_safetensors
from ..formats.sharded_folder import METADATA
from ..formats.tensor_records import TensorRecord, check_records, load_tensors
from ..formats.torch_archive import read_legacy, read_zip
from ..formats.torchscript import has_program, read_program_weights
from .key_prefixes import OPENAI_EXTRAS, strip_prefixes
from .mismatch import join_some

logger = logging.getLogger(__name__)

StateDict = dict[str, torch.Tensor]
# Keys under which training programs store weights, averaged weights (EMA) last. They may be nested.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "state_dict_ema", "model_ema", "ema")


def file_format(path: str | os.PathLike) -> str:
    """Detect the format of a checkpoint from its content.

    Returns:
        "torchscript", "torch", "legacy" (`torch.save` before torch 1.6), "safetensors" or "npz".

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has none of these formats. The message says what it looks like.
    """
    _check_is_file(path)
    with BinaryFile(path) as file:
        return _format_of(file)


def _check_is_file(path: str | os.PathLike) -> None:
    if not os.path.isfile(path):
        if os.path.isfile(os.path.join(path, METADATA)):
            raise FileNotFoundError(
                f"{path} is a sharded checkpoint. Make one file of it: python -m training.consolidate {path} OUT.pt"
            )
        kind = "is a folder" if os.path.isdir(path) else "does not exist"
        raise FileNotFoundError(f"No checkpoint can be read from {path}: it {kind}. Pass the path of a file.")


def _format_of(file: BinaryFile) -> str:
    head = file.read(0, min(64, file.size))
    if head.startswith(b"PK\x03\x04"):
        names = names_in_zip(file)
        if not names:
            raise FileError(f"{file.name} is damaged or cut off. Was its copy or download interrupted?")
        if has_arrays_only(names):
            return "npz"
        return "torchscript" if has_program(names) else "torch"
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "legacy"
    raise FileError(f"{file.name} is not a checkpoint: {_looks_like(head)}")


def _looks_like(head: bytes) -> str:
    if not head:
        return "it is empty."
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer. Download the file itself with `git lfs pull`."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page. Was it saved from a browser?"
    return (
        f"it starts with {head[:8]!r}. Supported formats: torch.save, safetensors, TorchScript archives, npz. "
        "If it was one of them, it is damaged."
    )


def load_state_dict(
    checkpoint_path: str | os.PathLike,
    device: str | torch.device = "cpu",
    weights_only: bool = True,
) -> StateDict:
    """Load the state dict in a file, without the prefixes of DDP and torch.compile.

    From a training checkpoint, this is its `state_dict`. The tensors are in memory, so the file may be overwritten or
    deleted afterwards.

    Args:
        checkpoint_path: file of `torch.save`, safetensors, NumPy archive, or OpenAI's TorchScript archive (whose
            program is not run).
        device: device of the tensors.
        weights_only: accepted for compatibility with open_clip, without effect. No code in a file is ever run: objects
            other than tensors, numbers and containers are dropped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, has another format, or contains no weights.
    """
    state_dict = read_state_dict(checkpoint_path)
    for key in state_dict:
        state_dict[key] = state_dict[key].to(device)
    return state_dict


def read_state_dict(path: str | os.PathLike, is_mapped: bool = False) -> StateDict:
    """Load a state dict on the CPU. With `is_mapped`, memory-map a file that nobody edits (see `BinaryFile`)."""
    _check_is_file(path)
    with BinaryFile(path, is_mapped=is_mapped) as file, name_damage(file.name):
        records = _find_weights(*_parse(file), file.name)
        load_tensors(file, records.values())
        weights = {key: record.tensor for key, record in records.items() if record.tensor is not None}
    return strip_prefixes(weights)


@contextlib.contextmanager
def open_state_dict(
    path: str | os.PathLike,
) -> Iterator[tuple[dict[str, TensorRecord], Callable[[str], torch.Tensor]]]:
    """Open a state dict whose tensors are read one at a time.

    Yields:
        The records, which have names, shapes and dtypes, and a function that reads the tensor of a name. The tensor is
        not kept, so each call reads the file.

    Raises:
        FileNotFoundError, ValueError: see `load_state_dict`.
    """
    _check_is_file(path)
    with BinaryFile(path) as file:
        with name_damage(file.name):
            records = strip_prefixes(_find_weights(*_parse(file), file.name))

        def load(name: str) -> torch.Tensor:
            record = dataclasses.replace(records[name])
            with name_damage(file.name):
                load_tensors(file, [record])
            assert record.tensor is not None
            return record.tensor

        yield records, load


def _parse_plain_tree(file: BinaryFile) -> tuple[Any, Any]:
    """Return (plain containers with `TensorRecord`s, the records). Log foreign objects, and raise if they are all."""
    tree, foreign = _parse(file)
    if is_foreign(tree):
        raise FileError(_holds_no_weights(tree, file.name))
    _log_foreign(foreign, file.name)
    return to_plain_tree(tree, file.name)


def _parse(file: BinaryFile) -> tuple[Any, list[str]]:
    """Return (nested containers with tensor records, names of the unknown classes in the file)."""
    kind = _format_of(file)
    if kind == "safetensors":
        return read_safetensors(file), []
    if kind == "npz":
        return read_arrays(file), []
    if kind == "torchscript":
        records, foreign = read_program_weights(file)
        return {key: value for key, value in records.items() if key not in OPENAI_EXTRAS}, foreign
    return read_legacy(file) if kind == "legacy" else read_zip(file)


def read_checkpoint(source: Any, name: str = "") -> Any:
    """Load everything that `torch.save` wrote: tensors, numbers and containers. Other objects are dropped.

    Args:
        source: path, or seekable binary file object.
        name: name of the file in messages; the path by default.

    Raises:
        ValueError: the file is damaged, or has another format.
    """
    with BinaryFile(source, name) as file, name_damage(file.name):
        tree, records = _parse_plain_tree(file)
        load_tensors(file, records)
        return replace_records(tree, file.name)


def check_layout(source: Any, name: str = "") -> dict[str, Any]:
    """Check the structure of a checkpoint without reading its tensors.

    Returns:
        The numbers and strings at the top level of the checkpoint.

    Raises:
        ValueError: the file is damaged, has another format, or is not a dict.
    """
    with BinaryFile(source, name) as file, name_damage(file.name):
        tree, records = to_plain_tree(_parse(file)[0], file.name)
        check_records(file, records)
        if not isinstance(tree, Mapping):
            raise FileError(_holds_no_weights(tree, file.name))
        return {key: value for key, value in tree.items() if isinstance(value, (int, float, str))}


def read_tree(path: str | os.PathLike) -> Any:
    """Read everything in a file of `torch.save` but its tensors, which are `TensorRecord`s. See `read_records`.

    Raises:
        ValueError: the file is damaged, or has another format.
    """
    with BinaryFile(path) as file, name_damage(file.name):
        tree, records = _parse_plain_tree(file)
        check_records(file, records)
        return tree


def read_records(path: str | os.PathLike, records: list[TensorRecord]) -> list[torch.Tensor]:
    """Read tensors of a file into host memory."""
    copies = [dataclasses.replace(record) for record in records]
    with BinaryFile(path) as file, name_damage(file.name):
        load_tensors(file, copies)
    tensors = []
    for copy in copies:
        assert copy.tensor is not None
        tensors.append(copy.tensor)
    return tensors


def _log_foreign(foreign: list[str], name: str) -> None:
    if foreign:
        logger.warning("%s: dropped objects that are not tensors, numbers or containers: %s.", name, join_some(foreign))


def _holds_no_weights(tree: Any, name: str) -> str:
    if is_foreign(tree):
        kind = getattr(tree, "name", type(tree).__name__)[:80]
        return (
            f"{name} contains an object of {kind}, which is not rebuilt because that could run code. "
            "Save a dict of tensors instead: model.state_dict()."
        )
    return f"{name} contains a {type(tree).__name__} instead of a state dict. Save model.state_dict()."


def _find_weights(checkpoint: Any, foreign: list[str], name: str) -> dict[str, TensorRecord]:
    """Find the state dict within the containers that training programs put around it."""
    if not isinstance(checkpoint, Mapping):
        raise FileError(_holds_no_weights(checkpoint, name))
    _log_foreign(foreign, name)
    seen: list[int] = []
    while inner := [key for key in _CONTAINERS if isinstance(checkpoint.get(key), Mapping)]:
        if len(inner) > 1:
            logger.warning("%s contains several sets of weights (%s). Using %s.", name, join_some(inner), inner[0])
        seen.append(id(checkpoint))
        checkpoint = checkpoint[inner[0]]
        if id(checkpoint) in seen:
            raise FileError(f"{name} is damaged: one of its containers contains itself.")
    tensors = {key: value for key, value in checkpoint.items() if isinstance(value, TensorRecord)}
    if not tensors:
        found = join_some(str(key)[:40] for key in checkpoint) or "no entries"
        raise FileError(f"{name} contains no state dict, only {found}. Save model.state_dict().")
    others = [str(key)[:40] for key, value in checkpoint.items() if key not in tensors and not is_foreign(value)]
    if others:
        logger.warning("%s: ignored entries that are not tensors: %s.", name, join_some(others))
    # A tensor with several names becomes several tensors.
    return {str(key): dataclasses.replace(value) for key, value in tensors.items()}
