"""Reading of the weights in a TorchScript archive, without running its program.

OpenAI published CLIP as TorchScript, and `torch.jit.load` would load the program as well. Here the archive is read as a
zip file: `data.pkl` is the module tree, `data/N` are the bytes of the tensors, `code/` is the program. The unpickler
builds tensors and containers only; an instance of a class of the program (`__torch__...`) becomes a `_Module` with its
attributes. Two lines of each class are read as text: the names of its parameters and of its buffers.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from typing import Any

import torch

from .binary_file import BinaryFile, FileError, name_damage
from .inert_pickle import InertUnpickler
from .mapped_zip import ZipArchive, names_in_zip
from .tensor_records import Storage, TensorRecord, load_tensors
from .torch_archive import MAX_PICKLE, archive_root, check_byteorder

_MAX_SOURCE = 16 << 20  # bytes of a source file
_MAX_DEPTH = 64  # nesting depth of modules
_MAX_MODULES = 100_000


def is_torchscript(path: str | os.PathLike) -> bool:
    """Whether the file is a TorchScript archive. (Files of `torch.save` are zip archives too.)"""
    with BinaryFile(path) as file:
        return has_program(names_in_zip(file))


def has_program(names: list[str]) -> bool:
    return any(name.endswith("/constants.pkl") for name in names)


def read_torchscript(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read the state dict of a TorchScript archive.

    Raises:
        ValueError: the archive is damaged or not little-endian.
    """
    with BinaryFile(path) as file, name_damage(file.name):
        records, _foreign = read_program_weights(file)
        load_tensors(file, records.values())
        return {name: record.tensor for name, record in records.items() if record.tensor is not None}


def read_program_weights(file: BinaryFile) -> tuple[dict[str, TensorRecord], list[str]]:
    """Return (records of the weights by name, names of the unknown classes in the archive)."""
    return _Archive(ZipArchive(file)).read()


class _Module:
    """Replaces an instance of any class of the program; stores its attributes."""

    def __init__(self, qualified_name: str) -> None:
        self.qualified_name = qualified_name
        self.attributes: dict[str, Any] = {}

    def set_state(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Class:
    """A class of the program."""

    def __init__(self, qualified_name: str) -> None:
        self.qualified_name = qualified_name


class _Unpickler(InertUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_program_class = module.split(".")[0] == "__torch__"
        return _Class(f"{module}.{name}") if is_program_class else super().find_class(module, name)

    def call(self, function: Any, arguments: Any) -> Any:
        return _Module(function.qualified_name) if isinstance(function, _Class) else super().call(function, arguments)


class _Archive:
    """One open TorchScript archive."""

    def __init__(self, archive: ZipArchive) -> None:
        self.archive = archive
        self.name = archive.name
        self.root = archive_root(archive, "constants.pkl")
        self.storages: dict[str, Storage] = {}
        self.sources: dict[str, str] = {}
        self.num_modules = 0

    def read(self) -> tuple[dict[str, TensorRecord], list[str]]:
        check_byteorder(self.archive, self.root)
        tree = self.archive.read(f"{self.root}data.pkl", MAX_PICKLE)
        unpickler = _Unpickler(io.BytesIO(tree), len(tree), self.load_storage)
        return dict(self.walk(unpickler.load(), "", 0)), list(unpickler.foreign)

    def load_storage(self, key: str, nbytes: int) -> Storage:
        if key not in self.storages:
            self.storages[key] = self.archive.storage(f"{self.root}data/{key}")
        if self.storages[key].nbytes < nbytes:
            raise FileError(f"{self.name} is damaged: storage {key} has less than {nbytes} bytes.")
        return self.storages[key]

    def walk(self, module: Any, prefix: str, depth: int) -> Iterator[tuple[str, TensorRecord]]:
        """Yield names and records of all parameters and buffers, depth first as in nn.Module.state_dict."""
        self.num_modules += 1
        if depth > _MAX_DEPTH or self.num_modules > _MAX_MODULES or not isinstance(module, _Module):
            position = prefix[:80] or "the top level"
            raise FileError(f"{self.name} is damaged: {position} is not a module, or modules are nested too deeply.")
        registered = self.registered_names(module.qualified_name)
        for name, value in module.attributes.items():
            if isinstance(value, TensorRecord) and (registered is None or name in registered):
                yield prefix + name, value
        for name, value in module.attributes.items():
            if isinstance(value, _Module):
                yield from self.walk(value, f"{prefix}{name}.", depth + 1)

    def registered_names(self, qualified_name: str) -> set[str] | None:
        """Find the names of a class's parameters and buffers; None (all tensors) if the program does not list them."""
        module, _, name = qualified_name.rpartition(".")
        header = re.search(
            rf"^class {re.escape(name)}\(Module\):\n\s*__parameters__ = \[(.*?)\]\n\s*__buffers__ = \[(.*?)\]$",
            self.read_source(module),
            re.MULTILINE,
        )
        return set(re.findall(r'"([^"]+)"', header[1] + header[2])) if header else None

    def read_source(self, module: str) -> str:
        if module not in self.sources:
            path = f"{self.root}code/{module.replace('.', '/')}.py"
            source = self.archive.read(path, _MAX_SOURCE) if path in self.archive.entries else b""
            self.sources[module] = source.decode("utf-8", errors="replace")
        return self.sources[module]
