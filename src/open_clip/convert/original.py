"""Conversion of the weights that the authors of MobileCLIP and of the Perception Encoder published.

The image towers are timm models, and timm converts their weights. The text towers are native.
"""

from __future__ import annotations

import re
from typing import Any

import torch

StateDict = dict[str, torch.Tensor]

# Parameters of the first layer of the image tower, by which the layouts are recognized.
_FASTVIT_MARK = "image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight"
_MOBILE_VIT_MARK = "image_encoder.model.patch_emb.0.block.conv.weight"
_PERCEPTION_MARK = "visual.conv1.weight"

# Names in Apple's text tower -> names in ours. Apple groups norm and attention, and norm and MLP, into sequences.
_MOBILE_CLIP_TEXT = (
    (r"^embedding_layer\.", "token_embedding."),
    (r"^positional_embedding\.pos_embed\.pos_embed$", "positional_embedding"),
    (r"^transformer\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.pre_norm_mha\.0\.", ".ln_1."),
    (r"\.pre_norm_mha\.1\.qkv_proj\.", ".attn.in_proj_"),
    (r"\.pre_norm_mha\.1\.out_proj\.", ".attn.out_proj."),
    (r"\.pre_norm_ffn\.0\.", ".ln_2."),
    (r"\.pre_norm_ffn\.1\.", ".mlp.c_fc."),
    (r"\.pre_norm_ffn\.4\.", ".mlp.c_proj."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^projection_layer$", "text_projection"),
)


def is_mobile_clip(state_dict: StateDict) -> bool:
    """Whether the names are those of Apple's MobileCLIP (github.com/apple/ml-mobileclip)."""
    return _FASTVIT_MARK in state_dict or _MOBILE_VIT_MARK in state_dict


def is_perception_encoder(model: Any, state_dict: StateDict) -> bool:
    """Whether the weights are Meta's Perception Encoder (github.com/facebookresearch/perception_models).

    The names are those of a native CLIP, so the timm tower of the model decides. A NaFlex tower without rotary
    positions is made for weights of a native tower.
    """
    trunk: Any = getattr(model.visual, "trunk", None)
    takes_native = hasattr(trunk, "embeds") and trunk.rope is None
    return _PERCEPTION_MARK in state_dict and trunk is not None and not takes_native


def convert_mobile_clip_state_dict(model: Any, state_dict: StateDict, fastvit: bool = True) -> StateDict:
    """Convert weights of MobileCLIP (https://arxiv.org/abs/2311.17049) from Apple's layout to ours.

    Args:
        model: CustomTextCLIP with the same image tower as the checkpoint.
        state_dict: weights by Apple's names.
        fastvit: whether the image tower is a FastViT (S1, S2, ...); else it is the hybrid ViT of MobileCLIP-B.
    """
    if fastvit:
        from timm.models.fastvit import checkpoint_filter_fn
    else:
        from timm.models.vision_transformer_hybrid import checkpoint_filter_fn
    converted = _add_trunk_prefix(checkpoint_filter_fn(state_dict, model.visual.trunk))
    for key, value in state_dict.items():
        if key.startswith("text_encoder."):
            name = key.removeprefix("text_encoder.")
            for pattern, ours in _MOBILE_CLIP_TEXT:
                name = re.sub(pattern, ours, name)
            converted[f"text.{name}"] = value.flatten(0, -2) if name == "positional_embedding" else value
        elif key == "logit_scale":
            converted[key] = value
    return converted


def from_mobile_clip(model: Any, state_dict: StateDict) -> StateDict:
    """Convert weights of MobileCLIP; the names tell the kind of the image tower."""
    return convert_mobile_clip_state_dict(model, state_dict, fastvit=_FASTVIT_MARK in state_dict)


def from_perception_encoder(model: Any, state_dict: StateDict) -> StateDict:
    """Convert weights of PE-Core (https://arxiv.org/abs/2504.13181) from Meta's layout to the layout of CLIP."""
    from timm.models.eva import checkpoint_filter_fn

    image = {key: value for key, value in state_dict.items() if key.startswith("visual.")}
    rest = {key: value for key, value in state_dict.items() if key not in image and key != "attn_mask"}
    return _add_trunk_prefix(checkpoint_filter_fn(image, model.visual.trunk)) | rest


def _add_trunk_prefix(state_dict: StateDict) -> StateDict:
    """Add the prefix of our models, and make tensors contiguous (timm transposes projections)."""
    return {f"visual.trunk.{key}": value.contiguous() for key, value in state_dict.items()}
