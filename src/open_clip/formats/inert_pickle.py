"""Unpickling without importing or calling anything that the pickle names.

Tensors and plain containers are built. Everything else (NumPy scalars, `argparse.Namespace`, a function of `os`)
becomes a `Foreign`, which ignores its arguments and its state. Foreign objects are dropped afterwards.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from .binary_file import FileError
from .tensor_records import DTYPES, Storage, TensorRecord

# The Python implementation: in the C implementation, a few bytes can allocate gigabytes (LONG_BINPUT).
_Unpickler: Any = pickle._Unpickler

_SCALARS = (str, int, float, bool, bytes, complex, type(None), torch.dtype)
_MAX_DEPTH = 100  # nesting depth of containers
_MAX_KEY = 64  # elements of a tuple used as a key


class Foreign:
    """Replaces an unknown object, class or function. It does nothing and stores nothing but its name."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def append(self, *_: Any) -> None:
        pass

    extend = add = update = __setitem__ = append


class AllowedFunction:
    """Replaces a function or class that a pickle may call, by a function of this module."""

    __slots__ = ("build",)

    def __init__(self, build: Callable) -> None:
        self.build = build


class StorageType:
    """Replaces `torch.FloatStorage` and similar classes."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class StorageRef:
    """A storage that a pickle refers to: its bytes, their dtype, and the offset of a view (in old files)."""

    __slots__ = ("dtype", "shift", "storage")

    def __init__(self, storage: Storage, dtype: torch.dtype, shift: int = 0) -> None:
        self.storage, self.dtype, self.shift = storage, dtype, shift


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRecord:
    return _rebuild_typed(storage, offset, shape, stride, storage.dtype)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> TensorRecord:
    return _rebuild_typed(storage, offset, shape, stride, dtype)


def _rebuild_typed(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any) -> TensorRecord:
    if not isinstance(storage, StorageRef) or not isinstance(dtype, torch.dtype) or type(offset) is not int:
        raise pickle.UnpicklingError("a tensor has no storage")
    if not (_is_shape(shape) and _is_shape(stride)):
        raise pickle.UnpicklingError("a tensor has no shape or stride")
    return TensorRecord(storage.storage, dtype, storage.shift + offset, tuple(shape), tuple(stride))


def _rebuild_subclass(function: Any, _class: Any, arguments: Any, *_: Any) -> Any:
    return function.build(*arguments) if isinstance(function, AllowedFunction) else Foreign("torch.Tensor")


def _first(value: Any, *_: Any) -> Any:
    return value


def _dictionary(items: Any = (), *_: Any) -> OrderedDict:
    if isinstance(items, Mapping):
        return OrderedDict(items)
    pairs = [tuple(item) for item in items]
    for key, _value in pairs:
        check_key(key)
    return OrderedDict(pairs)


def _default_dictionary(_factory: Any = None, items: Any = ()) -> OrderedDict:
    return _dictionary(items)


def _set(items: Any = ()) -> set:
    for item in items:
        check_key(item)
    return set(items)


def _bytes(text: Any = "", encoding: Any = "latin1", *_: Any) -> bytes:
    """Replaces `_codecs.encode(text, "latin1")`, by which protocol 2 writes bytes, and `bytearray`."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes are not encoded as Latin-1 text")
    return text.encode("latin1")


def _complex(real: Any = 0, imaginary: Any = 0) -> complex:
    return complex(float(real), float(imaginary))


def _size(numbers: Any = ()) -> torch.Size:
    if not _is_shape(tuple(numbers)):
        raise pickle.UnpicklingError("a torch.Size contains something other than numbers")
    return torch.Size(numbers)


def _device(*parts: Any) -> str:
    """Return the device as a str, because its backend may be missing."""
    return ":".join(str(part) for part in parts if isinstance(part, (str, int)))


_ALLOWED: dict[tuple[str, str], Callable] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): _dictionary,
    ("collections", "Counter"): _dictionary,
    ("collections", "defaultdict"): _default_dictionary,
    ("builtins", "complex"): _complex,
    ("builtins", "dict"): _dictionary,
    ("builtins", "set"): _set,
    ("builtins", "frozenset"): _set,
    ("builtins", "bytearray"): _bytes,
    ("_codecs", "encode"): _bytes,
    # TorchScript functions that add types to values
    ("torch.jit._pickle", "build_boollist"): _first,
    ("torch.jit._pickle", "build_doublelist"): _first,
    ("torch.jit._pickle", "build_intlist"): _first,
    ("torch.jit._pickle", "build_tensorlist"): _first,
    ("torch.jit._pickle", "restore_type_tag"): _first,
}


def check_key(key: Any) -> None:
    """Raise UnpicklingError for a key that could take forever to hash: nested tuples with shared parts."""
    is_flat = isinstance(key, tuple) and len(key) <= _MAX_KEY and all(isinstance(part, _SCALARS) for part in key)
    if not (is_flat or isinstance(key, (*_SCALARS, Foreign, AllowedFunction))):
        raise pickle.UnpicklingError(f"a key has the type {type(key).__name__}")


class _ExactReader:
    """A stream whose `read` returns exactly `count` bytes or raises EOFError."""

    def __init__(self, stream: Any, size: int) -> None:
        self._stream, self._size = stream, size
        self.readline = stream.readline

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise EOFError(f"a value of {count} bytes is larger than the file")
        data = self._stream.read(count)
        if len(data) != count:
            raise EOFError("the pickle is cut off")
        return data


class InertUnpickler(_Unpickler):
    """Reads one pickle from a stream.

    A damaged pickle can raise any exception: use it within `name_damage`.

    Args:
        stream: binary file object. Afterwards its position is the end of the pickle.
        size: maximum size of a value in the pickle, in bytes.
        load_storage: returns the storage for a key and a minimum size in bytes.

    Attributes:
        foreign: names of the objects that were not built.
    """

    dispatch: ClassVar[dict[int, Callable]] = dict(_Unpickler.dispatch)

    def __init__(self, stream: Any, size: int, load_storage: Callable[[str, int], Storage] | None = None) -> None:
        super().__init__(_ExactReader(stream, size), encoding="utf-8", errors="replace")
        self._load_storage = load_storage
        self.foreign: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) in _ALLOWED:
            return AllowedFunction(_ALLOWED[module, name])
        if module in ("torch", "torch.storage") and name in DTYPES:
            return StorageType(DTYPES[name])
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        return self._foreign(f"{module}.{name}")

    def _foreign(self, name: str) -> Foreign:
        self.foreign.setdefault(name)
        return Foreign(name)

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":
            return self._foreign("torch.nn.Module")
        kind, storage_type, key, _location, numel, *view = pid
        if kind != "storage" or not isinstance(storage_type, StorageType) or self._load_storage is None:
            raise pickle.UnpicklingError("a persistent reference is not to a storage")
        if not isinstance(key, (str, int)) or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a storage has no key or size")
        storage = self._load_storage(str(key), numel * storage_type.dtype.itemsize)
        shift = view[0][1] if view and view[0] is not None else 0
        return StorageRef(storage, storage_type.dtype, shift)

    def call(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, AllowedFunction):
            return function.build(*arguments)
        if isinstance(function, Foreign):
            return function
        raise pickle.UnpicklingError(f"a {type(function).__name__} is called")

    # Opcodes that call a function, set a state, or rely on a length

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_reduce()

    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def _instantiate(self, function: Any, arguments: Any) -> None:
        """Handle the opcodes INST and OBJ of protocols 0 and 1."""
        self.append(self.call(function, arguments))

    def get_extension(self, code: int) -> None:
        self.append(self._foreign(f"the extension {code}"))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if hasattr(target, "set_state"):
            target.set_state(state)

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(min(count, sys.maxsize)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    # Opcodes that hash a key

    def load_dict(self) -> None:
        items = self.pop_mark()
        for key in items[::2]:
            check_key(key)
        self.append({items[i]: items[i + 1] for i in range(0, len(items), 2)})

    dispatch[pickle.DICT[0]] = load_dict

    def load_setitem(self) -> None:
        check_key(self.stack[-2])
        _Unpickler.load_setitem(self)

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            check_key(key)
        _Unpickler.load_setitems(self)

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_frozenset(self) -> None:
        self.append(_set(self.pop_mark()))

    dispatch[pickle.FROZENSET[0]] = load_frozenset

    def load_additems(self) -> None:
        for item in self.stack:
            check_key(item)
        _Unpickler.load_additems(self)

    dispatch[pickle.ADDITEMS[0]] = load_additems


def unpickle(data: bytes, load_storage: Callable[[str, int], Storage]) -> tuple[Any, list[str]]:
    """Return (contents of a pickle, names of the foreign objects in it)."""
    unpickler = InertUnpickler(io.BytesIO(data), len(data), load_storage)
    return unpickler.load(), list(unpickler.foreign)


def to_plain_tree(tree: Any, name: str) -> tuple[Any, list[TensorRecord]]:
    """Copy a tree into plain dicts, lists, tuples and sets without foreign objects, and collect its tensor records.

    A tensor with several names gets a record for each. Dict entries that are foreign are dropped; in a list or tuple, a
    foreign value becomes None, so that the indices of the others do not change.

    Raises:
        FileError: a container contains itself, or containers are nested too deeply.
    """
    records: list[TensorRecord] = []

    def convert(value: Any) -> Any:
        if isinstance(value, TensorRecord):
            records.append(dataclasses.replace(value))
            return records[-1]
        return None if is_foreign(value) else value

    return _map_tree(tree, convert, name), records


def replace_records(tree: Any, name: str) -> Any:
    """Copy a tree, with the records replaced by their tensors."""
    return _map_tree(tree, lambda value: value.tensor if isinstance(value, TensorRecord) else value, name)


def _map_tree(tree: Any, convert: Callable[[Any], Any], name: str) -> Any:
    """Copy a tree, with `convert` applied to everything but containers. A shared container stays shared."""
    done: dict[int, Any] = {}
    in_progress: set[int] = set()

    def visit(value: Any) -> Any:
        if not isinstance(value, (Mapping, list, tuple, set)) or isinstance(value, torch.Size):
            return convert(value)
        if id(value) in in_progress or len(in_progress) > _MAX_DEPTH:
            raise FileError(f"{name} is damaged: its containers are nested more than {_MAX_DEPTH} deep.")
        if id(value) not in done:
            in_progress.add(id(value))
            done[id(value)] = visit_items(value)
            in_progress.discard(id(value))
        return done[id(value)]

    def visit_items(value: Any) -> Any:
        if isinstance(value, Mapping):
            kept = {key: item for key, item in value.items() if not (is_foreign(key) or is_foreign(item))}
            return {key: visit(item) for key, item in kept.items()}
        if isinstance(value, set):
            return {item for item in value if not is_foreign(item)}
        return type(value)(visit(item) for item in value)

    return visit(tree)


def is_foreign(value: Any) -> bool:
    return isinstance(value, (Foreign, AllowedFunction, StorageType, StorageRef))
