"""Conversion of weights to the layout and sizes of a model. The layout of a file is recognized by its names."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..formats.npz import read_npz
from ..pos_embed import resize_pos_embed, resize_text_pos_embed
from .big_vision import from_big_vision, is_big_vision
from .layout import StateDict, to_custom_text_layout, to_plain_layout
from .naflex import convert_naflex_state_dict, is_naflex_model
from .original import (
    from_mobile_clip,
    from_perception_encoder,
    is_mobile_clip,
    is_perception_encoder,
)
from .transformers_clip import from_transformers, is_transformers


def load_big_vision_weights(model: nn.Module, checkpoint_path: str | os.PathLike) -> Any:
    """Load the weights of a big_vision `.npz` (SigLIP, CLIPA) into a model, as `load_checkpoint` does.

    Returns:
        The incompatible keys (there are none).

    Raises:
        ValueError: the file is damaged, or its names are not those of big_vision.
        RuntimeError: names or shapes do not match the model.
    """
    arrays = read_npz(checkpoint_path)
    if not is_big_vision(arrays):
        found = ", ".join(list(arrays)[:4])
        raise ValueError(f"{checkpoint_path} is not a big_vision model with two towers. It has {found}.")
    return model.load_state_dict(fit_state_dict(model, arrays))


def convert_foreign(model: nn.Module, state_dict: StateDict) -> StateDict:
    """Convert weights in the layout of another project to that of CLIP or CustomTextCLIP. Others are unchanged.

    The weights of a ViT for one image size are converted too if the model's tower takes images of any size.
    """
    state_dict = _convert_layout(model, state_dict)
    return convert_naflex_state_dict(state_dict, model) if is_naflex_model(model) else state_dict


def _convert_layout(model: nn.Module, state_dict: StateDict) -> StateDict:
    state_dict = _drop_position_ids(state_dict)
    if is_big_vision(state_dict):
        return from_big_vision(model, state_dict)
    if is_mobile_clip(state_dict):
        return from_mobile_clip(model, state_dict)
    if is_transformers(state_dict):
        return from_transformers(state_dict)
    if is_perception_encoder(model, state_dict):
        return from_perception_encoder(model, state_dict)
    return state_dict


def convert_state_dict(model: nn.Module, state_dict: StateDict) -> StateDict:
    """Convert a state dict to the layout of `model`.

    Tensors are shared, not copied, except those that must be transposed or joined.
    """
    state_dict = convert_foreign(model, state_dict)
    return to_custom_text_layout(state_dict) if hasattr(model, "text") else to_plain_layout(state_dict)


def fit_state_dict(model: nn.Module, state_dict: StateDict) -> StateDict:
    """Convert a state dict to the layout and sizes of `model`, as far as possible."""
    state_dict = dict(convert_state_dict(model, state_dict))
    _fit_scalars(model, state_dict)
    for name, buffer in model.named_buffers():
        # frozen batch norms (of a locked tower) and old files have no num_batches_tracked
        norm, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked" and name not in state_dict and f"{norm}.running_mean" in state_dict:
            state_dict[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    resize_pos_embed(state_dict, model)
    if _has_same_text_width(model, state_dict):
        resize_text_pos_embed(state_dict, model)
    return state_dict


def _drop_position_ids(state_dict: StateDict) -> StateDict:
    """Drop the tensors 0, 1, 2, ... that older releases of transformers stored with the weights."""
    return {key: value for key, value in state_dict.items() if not key.endswith("embeddings.position_ids")}


def _fit_scalars(model: nn.Module, state_dict: StateDict) -> None:
    for name in ("logit_scale", "logit_bias"):
        target = getattr(model, name, None)
        if target is None:
            continue
        if name == "logit_bias" and name not in state_dict and "logit_scale" in state_dict:
            state_dict[name] = torch.zeros(target.shape)  # trained without a bias: zero does not change the logits
        elif name in state_dict and state_dict[name].numel() == target.numel():
            state_dict[name] = state_dict[name].reshape(target.shape)  # some files have the shape [], others [1]


def _has_same_text_width(model: nn.Module, state_dict: StateDict) -> bool:
    """Whether the text towers have the same width, so that only the context length can differ."""
    target = getattr(getattr(model, "text", model), "positional_embedding", None)
    table = next((v for k, v in state_dict.items() if k in ("positional_embedding", "text.positional_embedding")), None)
    return table is not None and target is not None and table.shape[-1] == target.shape[-1]
