"""Models on the meta device: building them without initialization, and giving them the weights of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .files import StateDict
from .mismatch import join_some


class NoInitialization(TorchFunctionMode):
    """Context in which modules that are built on the meta device skip their initialization.

    Meta tensors have no values to initialize. The first random or scaling operator on them would import the compiler,
    which takes longer than the rest of loading a model. Tensors on other devices are computed as usual, and skipped
    operators return tensors of the same shape and dtype as usual.
    """

    _DRAW = (torch.rand, torch.randn)
    _CHANGE_IN_PLACE = (
        *(torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_, torch.Tensor.clamp_, torch.Tensor.fill_),
        *(torch.Tensor.zero_, torch.Tensor.mul_, torch.Tensor.add_),
    )
    _SCALE = (torch.Tensor.mul, torch.Tensor.__rmul__)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = (*args, *kwargs.values())
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if len(tensors) == 1 and tensors[0].is_meta:
            if func in self._CHANGE_IN_PLACE or getattr(func, "__module__", "") == nn.init.__name__:
                return tensors[0]
            if func in self._SCALE and tensors[0].is_floating_point() and not any(map(_is_complex, values)):
                return torch.empty(tensors[0].shape, dtype=tensors[0].dtype, device="meta")  # empty_like is slow
        return (torch.empty if func in self._DRAW else func)(*args, **kwargs)


def _is_complex(value: Any) -> bool:
    return isinstance(value, complex)


def assign_weights(
    model: nn.Module, state_dict: StateDict, expected: StateDict, device: str | torch.device, source: str
) -> Any:
    """Assign the tensors of the state dict to a model on the meta device, cast to the model's dtypes."""
    unexpected = [key for key in state_dict if key not in expected]
    placed = {}
    for key in [key for key in expected if key in state_dict]:
        placed[key] = state_dict.pop(key).to(device=device, dtype=expected[key].dtype)
    tied = _tied_parameters(model)
    incompatible = model.load_state_dict(placed, strict=False, assign=True)
    for first, *others in tied:
        for name in others:
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, model.get_parameter(first))
    incompatible.unexpected_keys.extend(unexpected)
    _fill_buffers(model, device)
    check_nothing_on_meta(model, source)
    return incompatible


def _tied_parameters(model: nn.Module) -> list[list[str]]:
    """List, for each parameter that the model uses in several places, its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _fill_buffers(model: nn.Module, device: str | torch.device) -> None:
    """Allocate and compute non-persistent buffers (rotary positions, indices of relative positions).

    A module with such buffers computes them in `init_non_persistent_buffers`, as timm's modules do.
    """
    for module in model.modules():
        fill: Any = getattr(module, "init_non_persistent_buffers", None)
        tables = {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_meta and name in module._non_persistent_buffers_set
        }
        if fill and tables:
            for name, buffer in tables.items():
                setattr(module, name, torch.empty_like(buffer, device=device))
            fill()


def check_nothing_on_meta(model: nn.Module, source: str) -> None:
    """Raise RuntimeError if a parameter or buffer of the model is still on the meta device."""
    named = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, value in named if value.is_meta]
    if left:
        raise RuntimeError(f"{source} has no {join_some(left)}, which the model needs.")
