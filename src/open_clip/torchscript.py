"""The weights of a TorchScript archive, read without running anything that is in it.

OpenAI published CLIP as TorchScript, and `torch.jit.load` of such a file brings its program along. Here the archive
is taken for what it is, a zip: `data.pkl` is the tree of modules, `data/N` are the tensors' bytes, `code/` is the
program. The tree is unpickled with a reader that knows tensors and a few containers and refuses every other name;
classes of the program (`__torch__...`) become inert boxes for their attributes. Of the program, two lines per class
are read as text: which attributes are parameters and which are buffers.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .zipped import MappedZip

_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_MAX_PICKLE = 64 << 20  # bytes; the tree of the largest CLIP takes a fraction of one megabyte
_MAX_DEPTH = 64  # of nested modules


def is_torchscript(path: str | os.PathLike) -> bool:
    """Whether the file is a TorchScript archive (and not what `torch.save` writes, which is a zip too)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """State dict of a TorchScript archive.

    Tensors lie in the file, memory-mapped copy-on-write: a page is read when it is touched, and writing to a tensor
    never writes to the file.

    Raises:
        pickle.UnpicklingError: the tree needs a name that a tree of weights has no need for.
        ValueError: the archive is damaged or not little-endian.
    """
    try:
        with MappedZip(path) as archive:
            return _Archive(archive).state_dict()
    except (zipfile.BadZipFile, KeyError, EOFError, struct.error, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


class _Module:
    """Stands in for any class of the program; holds what the pickle says of its attributes."""

    qualified_name = ""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _StorageType:
    """Stands in for `torch.FloatStorage` and its like."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage:
    """Bytes of the archive, and how many elements of which type they are."""

    def __init__(self, data: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.data = data
        self.dtype = dtype
        self.numel = data.nbytes() // dtype.itemsize


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    """What `torch._utils._rebuild_tensor_v2` is called with, checked: nothing beyond the storage is addressed."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError("a tensor without a valid storage, size or stride")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.numel:
        raise ValueError(f"a tensor of size {tuple(size)} reaches beyond its storage of {storage.numel} elements")
    return torch.empty(0, dtype=storage.dtype).set_(storage.data, offset, size, stride)


def _first(value: Any, *_: Any) -> Any:
    """`torch.jit._pickle.build_intlist(list)`, `restore_type_tag(value, type)` and the like add types, not values."""
    return value


_CALLABLE: dict[tuple[str, str], Callable] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch.jit._pickle", "build_boollist"): _first,
    ("torch.jit._pickle", "build_doublelist"): _first,
    ("torch.jit._pickle", "build_intlist"): _first,
    ("torch.jit._pickle", "build_tensorlist"): _first,
    ("torch.jit._pickle", "restore_type_tag"): _first,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, load_storage: Callable[[str, torch.dtype, int], _Storage]) -> None:
        super().__init__(io.BytesIO(data))
        self._load_storage = load_storage
        self._classes: dict[str, type[_Module]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            qualified = f"{module}.{name}"
            return self._classes.setdefault(qualified, type("Module", (_Module,), {"qualified_name": qualified}))
        if module == "torch" and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if (module, name) in _CALLABLE:
            return _CALLABLE[module, name]
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was refused")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _location, numel = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError(f"a reference to {kind!r} was refused")
        return self._load_storage(key, storage_type.dtype, numel)


class _Archive:
    """One open TorchScript archive."""

    def __init__(self, archive: MappedZip) -> None:
        self.archive = archive
        self.path = archive.path
        self.root = next(name for name in archive.namelist() if name.endswith("/constants.pkl"))[
            : -len("constants.pkl")
        ]
        self.entries = {info.filename: info for info in archive.infolist()}
        self.storages: dict[str, torch.UntypedStorage] = {}
        self.sources: dict[str, str] = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        byteorder = self.entries.get(f"{self.root}byteorder")
        if byteorder is not None and self.archive.read(byteorder) != b"little":
            raise ValueError(f"{self.path} was written on a big-endian machine, which is not supported.")
        tree = self.entries[f"{self.root}data.pkl"]
        if tree.file_size > _MAX_PICKLE:
            raise ValueError(f"{self.path}: a tree of {tree.file_size} bytes is not one of a CLIP's modules.")
        module = _Unpickler(self.archive.read(tree), self.load_storage).load()
        return dict(self.walk(module, "", 0))

    def load_storage(self, key: str, dtype: torch.dtype, numel: int) -> _Storage:
        if key not in self.storages:
            self.storages[key] = self.archive.storage(self.entries[f"{self.root}data/{key}"])
        storage = _Storage(self.storages[key], dtype)
        if storage.numel < numel:
            raise ValueError(f"storage {key} has {storage.numel} elements instead of {numel}")
        return storage

    def walk(self, module: Any, prefix: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of all parameters and buffers, depth first as in nn.Module.state_dict."""
        if depth > _MAX_DEPTH or not isinstance(module, _Module):
            raise ValueError(f"{self.path}: {prefix or 'the top'} is not a module, or modules are nested without end")
        registered = self.registered(module.qualified_name)
        for name, value in module.attributes.items():
            if isinstance(value, torch.Tensor) and (registered is None or name in registered):
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
            entry = self.entries.get(f"{self.root}code/{module.replace('.', '/')}.py")
            self.sources[module] = self.archive.read(entry).decode("utf-8", errors="replace") if entry else ""
        return self.sources[module]
