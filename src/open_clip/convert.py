"""State dicts of one layout turned into another. Models know their own layout only.

`CLIP` keeps the text tower's parameters at the top (`token_embedding.weight`), `CustomTextCLIP` below `text.`
(`text.token_embedding.weight`); the numbers are the same.
"""

from __future__ import annotations

import torch
from torch import nn

# Parameters of the native text tower that CLIP keeps at the top.
_TEXT_PARTS = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final", "cls_emb")
# Tables that transformers made part of state dicts before 4.31, and that its models make anew since.
_OLD_TABLES = ("text.transformer.embeddings.position_ids",)


def is_text_key(key: str) -> bool:
    """Whether a parameter of CLIP's plain layout belongs to the text tower."""
    return key.split(".")[0] in _TEXT_PARTS


def to_custom_text_layout(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layout of CustomTextCLIP; a state dict that has it already is returned as it is."""
    if not any(is_text_key(key) for key in state_dict):
        return state_dict
    return {f"text.{key}" if is_text_key(key) else key: value for key, value in state_dict.items()}


def to_plain_layout(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layout of CLIP; a state dict that has it already is returned as it is."""
    if not any(key.startswith("text.") for key in state_dict):
        return state_dict
    return {key.removeprefix("text."): value for key, value in state_dict.items()}


def convert_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict in the layout of `model`, as far as it is known; tensors are shared, not copied."""
    if not hasattr(model, "text"):
        return to_plain_layout(state_dict)
    return {key: value for key, value in to_custom_text_layout(state_dict).items() if key not in _OLD_TABLES}
