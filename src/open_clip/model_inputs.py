"""What a model says about its inputs: preprocessing of images, tokenization of texts."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


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
