"""Models that are built without memory for their weights, and get the same random values later, tensor by tensor.

While a model is built, large tensors are created on the meta device, and the operations on them are recorded. Random
numbers are drawn as usual and dropped, and the state of the generator before each draw is recorded.
`DeferredInit.compute` repeats the operations of one tensor. Its values equal those of a model that was built normally
with the same seed.

torchdistx had the same idea (`deferred_init`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
_SMALLEST = 4096  # elements; smaller tensors are created as usual

_offered: list[DeferredInit] = []


def offered() -> DeferredInit | None:
    """Return the DeferredInit whose `offered` context is open, or None. It records when `recording` is entered."""
    return _offered[-1] if _offered else None


@dataclass(frozen=True)
class _View:
    """A meta tensor in a recorded operation, with the number of operations that had changed its memory before."""

    tensor: Tensor
    changes: int


@dataclass(frozen=True)
class _Operation:
    """An operation that creates or changes memory.

    Attributes:
        output: which of its outputs has the memory; None: it changes its first argument in place.
        generator_state: of the CPU, before the operation; None: it draws no random numbers.
    """

    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    output: int | None
    generator_state: Tensor | None


class DeferredInit:
    """Records how the tensors of a model are initialized.

    Example:
        deferred = DeferredInit()
        with deferred.recording():
            model = build()
        weight = deferred.compute(model.weight)
    """

    def __init__(self, smallest: int = _SMALLEST) -> None:
        """Create it. `smallest`: number of elements from which tensors are created on the meta device."""
        self._smallest = smallest
        self._operations: dict[int, list[_Operation]] = {}  # by memory
        self._kept: list[Tensor] = []  # so that no address is used again

    @contextlib.contextmanager
    def offered(self) -> Iterator[None]:
        """Let `create_model` use this object: a model with random weights is built without memory for them.

        Other weights stay in host memory, and those of a checkpoint in its file, which is mapped.
        """
        _offered.append(self)
        try:
            yield
        finally:
            _offered.remove(self)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the operations in this context."""
        with _Recorder(self), _CreateOnMeta(self._smallest):
            yield

    @torch.no_grad()
    def compute(self, tensor: Tensor) -> Tensor:
        """Compute the values of a meta tensor on the CPU. The state of the random generator does not change.

        Raises:
            RuntimeError: the tensor was not created while recording.
        """
        with torch.random.fork_rng(devices=[]):
            return self._view(tensor, self._memory(_address(tensor), None)).clone()

    def _memory(self, address: int, changes: int | None) -> Any:
        """Return the memory at an address after its first `changes` operations (None: all), as an untyped storage."""
        operations = self._operations.get(address)
        if not operations:
            raise RuntimeError("The values of a tensor on the meta device are unknown: its creation was not recorded.")
        memory: Any = None
        for operation in operations[:changes]:
            if operation.generator_state is not None:
                torch.set_rng_state(operation.generator_state)

            def real(value: Any, memory: Any = memory) -> Any:
                if not isinstance(value, _View):
                    return value
                other = _address(value.tensor)
                return self._view(value.tensor, memory if other == address else self._memory(other, value.changes))

            result = operation.function(*tree_map(real, operation.args), **tree_map(real, operation.kwargs))
            if operation.output is not None:
                result = result[operation.output] if isinstance(result, (tuple, list)) else result
                memory = result.untyped_storage()
        return memory

    @staticmethod
    def _view(tensor: Tensor, memory: Any) -> Tensor:
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())

    def record(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Record an operation with meta tensors, and return its result on the meta device."""

        def remember(value: Any) -> Any:
            if not _is_meta(value):
                return value
            return _View(value.detach(), len(self._operations.get(_address(value), ())))

        with torch.utils._python_dispatch._disable_current_modes():
            arguments = tree_map(remember, args), {**tree_map(remember, kwargs), **_on_cpu(kwargs)}
            state = self._draw(function, args, kwargs)
            if function._schema.is_mutable:
                self._add(args[0], _Operation(function, *arguments, None, state))
                return args[0]
            result = function(*args, **kwargs)
            for index, output in enumerate(result if isinstance(result, (tuple, list)) else [result]):
                if _is_meta(output):
                    self._add(output, _Operation(function, *arguments, index, state))
        return result

    def _add(self, tensor: Tensor, operation: _Operation) -> None:
        self._operations.setdefault(_address(tensor), []).append(operation)
        self._kept.append(tensor.detach())

    def _draw(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """Draw the random numbers of an operation and drop them. Return the state of the generator before."""
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return None
        state = torch.get_rng_state()
        function(*tree_map(_empty_like, args), **{**tree_map(_empty_like, kwargs), **_on_cpu(kwargs)})
        return state


class _CreateOnMeta(TorchFunctionMode):
    """Creates large tensors on the meta device. Small ones may be read while a model is built, as in timm.

    `is_meta` is False, because modules do not initialize parameters that are on the meta device.
    """

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self._smallest = smallest

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_META:
            return False
        is_free = func in _FACTORIES and kwargs.get("device") is None and kwargs.get("out") is None
        if is_free and _numel(func, args, kwargs) >= self._smallest:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


class _Recorder(TorchDispatchMode):
    """Passes operations with meta tensors to a DeferredInit."""

    def __init__(self, deferred: DeferredInit) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = torch.utils._pytree.tree_leaves((args, kwargs))
        if not any(_is_meta(value) for value in values) and not _on_cpu(kwargs):
            return func(*args, **kwargs)
        if func.is_view:
            return func(*args, **kwargs)
        return self._deferred.record(func, args, kwargs)


def _numel(func: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
    return math.prod(size)


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the argument that creates on the CPU what the given ones create on the meta device, or {}."""
    device = kwargs.get("device")
    return {"device": "cpu"} if device is not None and torch.device(device).type == "meta" else {}


def _empty_like(value: Any) -> Any:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype) if _is_meta(value) else value


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
