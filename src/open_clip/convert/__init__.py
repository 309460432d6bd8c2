"""Conversion of state dicts between layouts. Models know only their own layout.

`CLIP` has the parameters of the text tower at the top level (`token_embedding.weight`), `CustomTextCLIP` has the same
parameters under `text.` (`text.token_embedding.weight`). The layouts of big_vision, MobileCLIP, the Perception Encoder
and transformers are recognized by their parameter names. Tensors are shared where possible.
"""

from __future__ import annotations

from .. import aliases
from .foreign import convert_foreign, convert_state_dict, fit_state_dict, load_big_vision_weights
from .layout import is_text_key, to_custom_text_layout, to_plain_layout
from .naflex import apply_naflex_vision_config, convert_naflex_state_dict
from .original import convert_mobile_clip_state_dict
from .transformers_clip import from_transformers, to_transformers
from .transformers_config import (
    is_siglip_model_cfg,
    model_cfg_from_transformers,
    model_cfg_to_transformers,
    preprocess_cfg_from_transformers,
    preprocess_cfg_to_transformers,
)

__all__ = [
    "apply_naflex_vision_config",
    "convert_foreign",
    "convert_mobile_clip_state_dict",
    "convert_naflex_state_dict",
    "convert_state_dict",
    "fit_state_dict",
    "from_transformers",
    "is_siglip_model_cfg",
    "is_text_key",
    "load_big_vision_weights",
    "model_cfg_from_transformers",
    "model_cfg_to_transformers",
    "preprocess_cfg_from_transformers",
    "preprocess_cfg_to_transformers",
    "to_custom_text_layout",
    "to_plain_layout",
    "to_transformers",
]

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here
