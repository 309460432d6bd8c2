"""Encoders of Hugging Face's transformers: their configurations, and encoders with random or published weights.

An encoder computes attention with `device.attention` and the exact GELU.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import device as devices
from .hf_configs import arch_dict, import_transformers, known_architecture, unavailable
from .transformer.layers import GELU
from .utils import import_compiler

ATTENTION = "open_clip"  # the name under which transformers finds `_attention`


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention with the signature that transformers calls.

    Args:
        query, key, value: [batch, heads, tokens, dim].
        attention_mask: bool, True where a token may be attended to.
        position_bias: [1 or batch, heads, tokens, tokens], added to the scores (T5).

    Returns:
        [batch, tokens, heads, dim], and None for the attention weights.
    """
    if position_bias is not None:
        position_bias = position_bias.to(query.dtype)  # autocast leaves embeddings in float32, but not queries
        if attention_mask is None:
            attention_mask = position_bias
        else:
            attention_mask = position_bias.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    output = devices.attention(query, key, value, attention_mask, dropout_p=dropout, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def _transformers() -> Any:
    """Import transformers and register `_attention`."""
    import_compiler()
    transformers = import_transformers("A text tower of Hugging Face")
    from transformers.masking_utils import sdpa_mask

    transformers.AttentionInterface.register(ATTENTION, _attention)
    # For programs that call the encoder with a mask [batch, tokens].
    transformers.AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return transformers


def read_config(name_or_path: str, offline: bool, overrides: Mapping[str, Any] | None = None) -> Any:
    """Load the transformers configuration of a model.

    Args:
        offline: take the configuration from the table in hf_configs, if the model is in it.
        overrides: values that replace those of the configuration.

    Raises:
        RuntimeError: the configuration cannot be loaded.
        ValueError: it has no value that an override names.
    """
    transformers = _transformers()
    known = known_architecture(name_or_path)
    if offline and known is not None and not os.path.isdir(name_or_path):
        model_type, values = known
        config = transformers.AutoConfig.for_model(model_type, **values)
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise _unavailable(name_or_path, error) from error
    if not overrides:
        return config
    unknown = [name for name in overrides if name.startswith(("_", "model_type")) or not hasattr(config, name)]
    if unknown:
        raise ValueError(f"hf_model_config: the configuration of {name_or_path!r} has no {', '.join(unknown)}.")
    # The type of each layer follows from the number of layers, so it is computed again.
    values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "layer_types")}
    return type(config)(**values | dict(overrides))


def check_model_type(config: Any, name_or_path: str) -> None:
    if config.model_type not in arch_dict:
        raise ValueError(
            f"{name_or_path!r} has model_type {config.model_type!r}, which is not supported as a text tower. Use one "
            f"of {', '.join(arch_dict)}."
        )


def _unavailable(name_or_path: str, error: Exception) -> RuntimeError:
    return unavailable(
        "The text tower",
        name_or_path,
        "config.json, and for its weights model.safetensors (or pytorch_model.bin)",
        error,
        others="For random weights, pass pretrained_text=False to create_model.",
    )


def use_exact_gelu(encoder: nn.Module) -> None:
    """Replace the GELUs of transformers by ours: theirs compute the tanh approximation on some devices."""
    for module in encoder.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "GELUActivation":
                setattr(module, name, GELU())


def new_encoder(config: Any, add_pooling_layer: bool) -> Any:
    """Build the encoder of a configuration with random weights. The decoder of an encoder-decoder is not built."""
    transformers = _transformers()
    config = copy.deepcopy(config)
    if config.model_type == "m2m_100":  # transformers has no auto class for its encoder alone
        from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

        config._attn_implementation = ATTENTION
        return M2M100Encoder(config)
    options: dict[str, Any] = {"attn_implementation": ATTENTION, "dtype": torch.float32}
    if config.is_encoder_decoder:
        return transformers.AutoModelForTextEncoding.from_config(config, **options).encoder
    if arch_dict[config.model_type].get("has_pooling_layer"):
        options["add_pooling_layer"] = add_pooling_layer
    return transformers.AutoModel.from_config(config, **options)


def load_encoder(name_or_path: str, add_pooling_layer: bool, overrides: Mapping[str, Any]) -> Any:
    """Load an encoder with its published weights from a local folder, the hub's cache, or the hub."""
    transformers = _transformers()
    config = read_config(name_or_path, offline=False, overrides=overrides)
    check_model_type(config, name_or_path)
    options: dict[str, Any] = {"attn_implementation": ATTENTION, "dtype": torch.float32, "trust_remote_code": False}
    if overrides:
        options["config"] = config
    auto_model = transformers.AutoModel
    if config.model_type in ("t5", "mt5"):
        auto_model = transformers.AutoModelForTextEncoding  # does not load the decoder's weights
    elif arch_dict[config.model_type].get("has_pooling_layer"):
        options["add_pooling_layer"] = add_pooling_layer
    try:
        model = auto_model.from_pretrained(name_or_path, weights_only=True, **options)
    except OSError as error:
        raise _unavailable(name_or_path, error) from error
    return (model.get_encoder() if config.is_encoder_decoder else model).train()
