"""The weights of a TorchScript archive, read without running anything that is in it.

OpenAI published CLIP as TorchScript, and `torch.jit.load` of such a file brings its program along. Here the archive
is read as a zip: `data.pkl` is the tree of modules, `data/N` are the tensors' bytes, `code/` is the program. The tree
is unpickled by a reader that knows tensors and containers and builds nothing else; classes of the program
(`__torch__...`) become boxes for their attributes. Of the program, two lines per class are read as text: which
attributes are parameters and which are buffers.
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
from .tensor_records import Storage, TensorRecord, load_tensors
from .torch_archive import MAX_PICKLE, archive_root, check_byteorder
from .zipped import ZipArchive, names_in_zip

_MAX_SOURCE = 16 << 20  # bytes of a file of the program
_MAX_DEPTH = 64  # of nested modules
_MAX_MODULES = 100_000


def is_torchscript(path: str | os.PathLike) -> bool:
    """Whether the file is a TorchScript archive (and not what `torch.save` writes, which is a zip too)."""
    with BinaryFile(path) as file:
        return has_program(names_in_zip(file))


def has_program(names: list[str]) -> bool:
    return any(name.endswith("/constants.pkl") for name in names)


def read_torchscript(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """State dict of a TorchScript archive.

    Raises:
        ValueError: the archive is damaged or not little-endian.
    """
    with BinaryFile(path) as file, name_damage(file.name):
        records, _foreign = read_program_weights(file)
        load_tensors(file, records.values())
        return {name: record.tensor for name, record in records.items() if record.tensor is not None}


def read_program_weights(file: BinaryFile) -> tuple[dict[str, TensorRecord], list[str]]:
    """(the records of the weights by name, names of what in the archive is foreign)."""
    return _Archive(ZipArchive(file)).read()


class _Module:
    """Stands in for any class of the program; holds what the pickle says of its attributes."""

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
        is_of_program = module.split(".")[0] == "__torch__"
        return _Class(f"{module}.{name}") if is_of_program else super().find_class(module, name)

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
        self.modules = 0

    def read(self) -> tuple[dict[str, TensorRecord], list[str]]:
        check_byteorder(self.archive, self.root)
        tree = self.archive.read(f"{self.root}data.pkl", MAX_PICKLE)
        unpickler = _Unpickler(io.BytesIO(tree), len(tree), self.load_storage)
        return dict(self.walk(unpickler.load(), "", 0)), list(unpickler.foreign)

    def load_storage(self, key: str, nbytes: int) -> Storage:
        if key not in self.storages:
            self.storages[key] = self.archive.storage(f"{self.root}data/{key}")
        if self.storages[key].nbytes < nbytes:
            raise FileError(f"{self.name} is damaged: storage {key} in it has less than {nbytes} bytes.")
        return self.storages[key]

    def walk(self, module: Any, prefix: str, depth: int) -> Iterator[tuple[str, TensorRecord]]:
        """Names and tensors of all parameters and buffers, depth first as in nn.Module.state_dict."""
        self.modules += 1
        if depth > _MAX_DEPTH or self.modules > _MAX_MODULES or not isinstance(module, _Module):
            place = prefix[:80] or "its top"
            raise FileError(f"{self.name} is damaged: {place} is not a module, or modules are nested without end.")
        registered = self.registered(module.qualified_name)
        for name, value in module.attributes.items():
            if isinstance(value, TensorRecord) and (registered is None or name in registered):
                yield prefix + name, value
        for name, value in module.attributes.items():
            if isinstance(value, _Module):
                yield from self.walk(value, f"{prefix}{name}.", depth + 1)

    def registered(self, qualified_name: str) -> set[str] | None:
        """Names of a class's parameters and buffers; None (all tensors) where the program does not tell."""
        module, _, name = qualified_name.rpartition(".")
        header = re.search(
            rf"^class {re.escape(name)}\(Module\):\n\s*__parameters__ = \[(.*?)\]\n\s*__buffers__ = \[(.*?)\]$",
            self.source(module),
            re.MULTILINE,
        )
        return set(re.findall(r'"([^"]+)"', header[1] + header[2])) if header else None

    def source(self, module: str) -> str:
        if module not in self.sources:
            path = f"{self.root}code/{module.replace('.', '/')}.py"
            found = path in self.archive.entries
            source = self.archive.read(path, _MAX_SOURCE) if found else b""
            self.sources[module] = source.decode("utf-8", errors="replace")
        return self.sources[module]
