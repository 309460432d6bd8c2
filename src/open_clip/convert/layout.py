"""The two layouts of this package's models.

`CLIP` has the parameters of the text tower at the top level (`token_embedding.weight`), `CustomTextCLIP` has the same
parameters under `text.` (`text.token_embedding.weight`).
"""

from __future__ import annotations

import torch

StateDict = dict[str, torch.Tensor]
# Parts of the native text tower that CLIP has at the top level.
_TEXT_PARTS = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final", "cls_emb")


def is_text_key(key: str) -> bool:
    """Whether a parameter in the layout of CLIP belongs to the text tower."""
    return key.split(".")[0] in _TEXT_PARTS


def to_custom_text_layout(state_dict: StateDict) -> StateDict:
    """Convert to the layout of CustomTextCLIP. A state dict that has it already is returned unchanged."""
    if not any(is_text_key(key) for key in state_dict):
        return state_dict
    return {f"text.{key}" if is_text_key(key) else key: value for key, value in state_dict.items()}


def to_plain_layout(state_dict: StateDict) -> StateDict:
    """Convert to the layout of CLIP. A state dict that has it already is returned unchanged."""
    if not any(key.startswith("text.") for key in state_dict):
        return state_dict
    return {key.removeprefix("text."): value for key, value in state_dict.items()}
