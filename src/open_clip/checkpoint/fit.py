"""Loading of checkpoints into models: conversion to the model's layout, sizes and names."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn

from ..convert import convert_foreign, convert_state_dict, fit_state_dict, is_text_key, to_custom_text_layout
from .files import StateDict, read_state_dict
from .key_prefixes import common_prefixes, drop_extras, strip_to_fit
from .meta import assign_weights
from .mismatch import Mismatch, compare, explain_mismatch, explain_naflex, join_some

logger = logging.getLogger(__name__)


def load_checkpoint(
    model: nn.Module,
    checkpoint_path: str | os.PathLike,
    strict: bool = True,
    weights_only: bool = True,
    device: str | torch.device = "cpu",
    is_mapped: bool = False,
) -> Any:
    """Load a checkpoint into a model.

    Position embeddings are resized to the model. The layouts of CLIP and CustomTextCLIP are converted into each other.
    A missing `logit_bias` becomes zero. A prefix that all names share is removed if the remaining names fit. If an
    error is raised, the model is unchanged. A model on the meta device takes the tensors of the file, cast to the
    model's dtypes and moved to `device`.

    Args:
        model: the model to load into.
        checkpoint_path: see `load_state_dict`.
        strict: whether missing and unexpected names are errors; otherwise they are logged. A wrong shape always is one.
        weights_only: see `load_state_dict`.
        device: device for a model that is on the meta device.
        is_mapped: memory-map the file instead of reading it. Only for files in a cache, which nobody overwrites.

    Returns:
        The incompatible keys: a tuple (missing_keys, unexpected_keys).

    Raises:
        FileNotFoundError, ValueError: see `load_state_dict`.
        RuntimeError: names or shapes do not match the model.
    """
    weights = read_state_dict(checkpoint_path, is_mapped)
    fitted = _fit(model, weights, str(checkpoint_path))
    weights.clear()  # so that each tensor is freed once it is converted
    return _load_fitted(model, fitted, strict, device, str(checkpoint_path))


def put_weights(
    model: nn.Module,
    state_dict: StateDict,
    strict: bool = True,
    device: str | torch.device = "cpu",
    source: str = "the state dict",
) -> Any:
    """Load a state dict that is in memory, see `load_checkpoint`. `source` is its name in messages."""
    return _load_fitted(model, _fit(model, state_dict, source), strict, device, source)


def load_tower_checkpoint(
    model: nn.Module,
    tower: str,
    checkpoint_path: str | os.PathLike,
    weights_only: bool = True,
) -> Any:
    """Load the weights of one tower. The rest of the model is unchanged. Missing and unexpected names are logged.

    Args:
        model: the model to load into.
        tower: "visual" or "text".
        checkpoint_path: file with the weights of the tower alone (named as in the tower, or as in the timm or Hugging
            Face model inside it) or of a whole model, from which this tower is taken.
        weights_only: see `load_state_dict`.

    Returns:
        The incompatible keys of this tower: a tuple (missing_keys, unexpected_keys).

    Raises:
        FileNotFoundError, ValueError: see `load_state_dict`.
        RuntimeError: no name matches the tower, or a shape is wrong.
    """
    expected = {key: value for key, value in model.state_dict().items() if _is_of_tower(model, key, tower)}
    weights = read_state_dict(checkpoint_path)
    for prefix in ("", *common_prefixes(weights)):
        stripped = {key.removeprefix(prefix): value for key, value in weights.items()}
        state_dict = _select_tower(convert_foreign(model, stripped), tower, to_custom_text_layout(expected))
        state_dict = drop_extras(fit_state_dict(model, state_dict), expected)
        if expected.keys() & state_dict.keys():
            break
    if not expected.keys() & state_dict.keys():
        raise RuntimeError(
            f"{checkpoint_path} has no weights of this {tower} tower: "
            f"it has {join_some(state_dict) or 'none'}, and the model has {join_some(expected)}. "
            f"{explain_naflex(state_dict, expected)}".rstrip()
        )
    mismatch = compare(expected, state_dict)
    if mismatch.wrong_shapes:
        raise RuntimeError(f"{checkpoint_path} does not fit the {tower} tower: {mismatch}")
    if mismatch:
        reason = f"{mismatch} {explain_naflex(state_dict, expected)}".rstrip()
        logger.warning("%s fits the %s tower only in part: %s", checkpoint_path, tower, reason)
    incompatible = model.load_state_dict({k: v for k, v in state_dict.items() if k in expected}, strict=False)
    return type(incompatible)(mismatch.missing, mismatch.unexpected)


def _fit(model: nn.Module, state_dict: StateDict, source: str) -> StateDict:
    """Convert a state dict to the model's layout, sizes and prefix, as far as possible."""
    expected = model.state_dict().keys()
    fitted = fit_state_dict(model, state_dict)
    if not expected <= fitted.keys():
        stripped = strip_to_fit(state_dict, expected, lambda weights: convert_state_dict(model, weights), source)
        if stripped is not None:
            fitted = fit_state_dict(model, stripped)
    return drop_extras(fitted, expected)


def _load_fitted(model: nn.Module, state_dict: StateDict, strict: bool, device: str | torch.device, source: str) -> Any:
    """Load weights that have the model's names. A model on the meta device removes them from `state_dict`."""
    expected = model.state_dict()
    mismatch = compare(expected, state_dict)
    if mismatch.wrong_shapes or (strict and mismatch):
        advice = _advise(state_dict, expected, mismatch)
        raise RuntimeError(f"{source} does not fit {type(model).__name__}: {mismatch} {advice}")
    if mismatch:
        logger.warning("%s fits %s only in part: %s", source, type(model).__name__, mismatch)
    if any(value.is_meta for value in expected.values()):
        return assign_weights(model, state_dict, expected, device, source)
    return model.load_state_dict(state_dict, strict=False)


def _advise(state_dict: StateDict, expected: StateDict, mismatch: Mismatch) -> str:
    """Say what probably caused the mismatch, and how to fix it."""
    if mismatch.unexpected == ["logit_bias"] and not mismatch.missing:
        return "It was trained with a logit bias. Build the model with init_logit_bias=-10 (SigLIP)."
    prefix = "".join(common_prefixes(state_dict)[-1:])
    named = f"All names start with {prefix[:60]!r}. " if prefix and len(state_dict) > 1 else ""
    return named + (explain_mismatch(state_dict, expected) or "Is it a checkpoint of another model?")


def _select_tower(state_dict: StateDict, tower: str, expected: StateDict) -> StateDict:
    """Select the weights of one tower, named as in CustomTextCLIP, from those of the tower or of a whole model."""
    if any(key.startswith("visual.") for key in state_dict):
        return {key: v for key, v in to_custom_text_layout(state_dict).items() if key.startswith(f"{tower}.")}
    # names may start at the model, at its tower, or at the timm or Hugging Face model in the tower
    prefixes = ("", f"{tower}.", f"{tower}.trunk.", f"{tower}.transformer.")
    counts = {prefix: sum(f"{prefix}{key}" in expected for key in state_dict) for prefix in prefixes}
    prefix = max(prefixes, key=lambda prefix: counts[prefix])
    return {f"{prefix}{key}": value for key, value in state_dict.items()}


def _is_of_tower(model: nn.Module, key: str, tower: str) -> bool:
    return key.startswith(f"{tower}.") or (tower == "text" and not hasattr(model, "text") and is_text_key(key))
