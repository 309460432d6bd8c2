"""What a model says about its inputs: preprocessing of images, tokenization of texts, examples."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .model_traits import traits_of
from .utils import to_2tuple

_TOWERS = {"image": "visual", "text": "text"}  # where the tower of an input is


def get_model_preprocess_cfg(model: nn.Module) -> dict[str, Any]:
    """Return the preprocessing configuration of `model`: "size", and "mean", "std" and other fields if they are set."""
    visual = getattr(model, "visual", model)
    cfg = copy.copy(getattr(visual, "preprocess_cfg", {}))
    if cfg:
        return cfg
    size = getattr(visual, "image_size", None)
    if size is not None:
        cfg["size"] = size
    for key, attribute in (("mean", "image_mean"), ("std", "image_std")):
        value = getattr(visual, attribute, None)
        if value is not None:
            cfg[key] = value
    return cfg


def set_model_preprocess_cfg(model: nn.Module, preprocess_cfg: dict[str, Any]) -> None:
    """Store the preprocessing configuration in `model`. It must have "mean" and "std"."""
    visual = getattr(model, "visual", model)
    visual.image_mean = preprocess_cfg["mean"]
    visual.image_std = preprocess_cfg["std"]
    visual.preprocess_cfg = copy.deepcopy(preprocess_cfg)


def get_model_tokenize_cfg(model: nn.Module) -> dict[str, int]:
    """Return "context_length" and "vocab_size" of the text tower, each if it is known."""
    text = getattr(model, "text", model)
    cfg = {}
    for key in ("context_length", "vocab_size"):
        value = getattr(text, key, None)
        if value is not None:
            cfg[key] = value
    return cfg


def example_inputs(
    model: nn.Module,
    batch_size: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return the keyword arguments of a forward pass whose shapes are those of evaluation.

    The input NAME is made by the method `example_NAME(batch_size, device, dtype)` of the model or its tower, if there
    is one. Otherwise images are [batch_size, 3, height, width] of `visual.image_size`, and texts int64 [batch_size,
    context_length].

    Args:
        model: not wrapped by DDP. Its traits name the inputs.
        device: None: that of the parameters.
        dtype: of floating point inputs. None: that of the parameters.

    Raises:
        ValueError: an input is neither an image nor a text, and there is no such method.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device if device is None else device, parameter.dtype if dtype is None else dtype
    return {name: _example_input(model, name, batch_size, device, dtype) for name in traits_of(model).inputs}


def _example_input(model: Any, name: str, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> Any:
    for owner in (model, getattr(model, _TOWERS.get(name, name), None)):
        make = getattr(owner, f"example_{name}", None)
        if make is not None:
            return make(batch_size, device, dtype)
    if name == "image":
        return _ones((batch_size, 3, *to_2tuple(model.visual.image_size)), device, dtype)
    if name == "text":
        return _ones((batch_size, model.context_length), device, torch.int64)
    raise ValueError(
        f"{type(model).__name__} takes {name!r}, and its size is unknown. Add a method "
        f"example_{name}(batch_size, device, dtype) to the model."
    )


def _ones(size: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    return torch.ones(size, device=device, dtype=dtype)
