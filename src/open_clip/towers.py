"""Building of the towers that a configuration describes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch

from .config import CLIPTextCfg, CLIPVisionCfg, as_config, expect_defaults, is_naflex_cfg
from .constants import RESNET_STRIDE
from .hf_model import HFTextEncoder
from .modern_text import ModernTextTransformer
from .modified_resnet import ModifiedResNet
from .naflex import NaFlexTower
from .timm_model import TimmModel
from .transformer import VisionTransformer
from .transformer.layers import GELU, LayerNorm, LayerNormFp32, ModuleFactory, QuickGELU
from .transformer.text import TextTransformer
from .utils import expect

logger = logging.getLogger(__name__)


def layer_types(
    cfg: CLIPVisionCfg | CLIPTextCfg, quick_gelu: bool, cast_dtype: torch.dtype | None
) -> dict[str, ModuleFactory]:
    """Return `act_layer` and `norm_layer` of a native tower. Norms compute in float32 if weights are half precision."""
    act_layer: ModuleFactory = QuickGELU if quick_gelu else GELU
    norm_layer: ModuleFactory = LayerNormFp32 if cast_dtype in (torch.float16, torch.bfloat16) else LayerNorm
    if cfg.act_kwargs:
        if quick_gelu:
            raise ValueError(f"act_kwargs {cfg.act_kwargs} have no effect on QuickGELU. Remove one of the two.")
        act_layer = functools.partial(act_layer, **cfg.act_kwargs)
    if cfg.norm_kwargs:
        norm_layer = functools.partial(norm_layer, **cfg.norm_kwargs)
    return {"act_layer": act_layer, "norm_layer": norm_layer}


def _tower_options(cfg: CLIPVisionCfg | CLIPTextCfg, tower: type) -> dict[str, Any]:
    """Return the fields of `cfg` that are arguments of a native tower."""
    known = inspect.signature(tower).parameters
    return {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.name in known}


def build_vision_tower(
    embed_dim: int,
    vision_cfg: CLIPVisionCfg | Mapping[str, Any],
    quick_gelu: bool = False,
    cast_dtype: torch.dtype | None = None,
) -> VisionTransformer | ModifiedResNet | TimmModel:
    """Build a timm tower if `timm_model_name` is set, a ModifiedResNet if `layers` has four numbers, else a ViT."""
    cfg = as_config(CLIPVisionCfg, vision_cfg)
    if cfg.timm_model_name:
        is_naflex = is_naflex_cfg(cfg.timm_model_name, cfg.timm_model_kwargs)
        tower_class = functools.partial(NaFlexTower, **_naflex_options(cfg)) if is_naflex else TimmModel
        return tower_class(
            cfg.timm_model_name,
            embed_dim,
            image_size=cfg.image_size,
            pool=cfg.timm_pool,
            proj=cfg.timm_proj,
            proj_bias=cfg.timm_proj_bias,
            drop=cfg.timm_drop,
            drop_path=cfg.timm_drop_path,
            patch_drop=cfg.patch_dropout or None,
            pretrained=cfg.timm_model_pretrained,
            act_kwargs=cfg.act_kwargs,
            model_kwargs=cfg.timm_model_kwargs,
        )
    if isinstance(cfg.layers, (tuple, list)):
        if cfg.patch_dropout:
            logger.warning("patch_dropout=%s has no effect: a ResNet has no patches.", cfg.patch_dropout)
        heads = cfg.width * RESNET_STRIDE // cfg.head_width
        return ModifiedResNet(cfg.layers, embed_dim, heads, image_size=cfg.image_size, width=cfg.width)
    options = _tower_options(cfg, VisionTransformer) | layer_types(cfg, quick_gelu, cast_dtype)
    return VisionTransformer(heads=cfg.width // cfg.head_width, output_dim=embed_dim, **options)


def _naflex_options(cfg: CLIPVisionCfg) -> dict[str, Any]:
    return {"image_seq_len": cfg.image_seq_len, "norm_eps": (cfg.norm_kwargs or {}).get("eps")}


def build_text_tower(
    embed_dim: int,
    text_cfg: CLIPTextCfg | Mapping[str, Any],
    quick_gelu: bool = False,
    cast_dtype: torch.dtype | None = None,
) -> TextTransformer | ModernTextTransformer | HFTextEncoder:
    """Build a Hugging Face tower if `hf_model_name` is set, else a modern or native transformer (`text_arch`)."""
    cfg = as_config(CLIPTextCfg, text_cfg)
    if cfg.hf_model_name:
        return HFTextEncoder(
            cfg.hf_model_name,
            output_dim=embed_dim,
            pooler_type=cfg.hf_pooler_type,
            proj_type=cfg.hf_proj_type,
            pretrained=cfg.hf_model_pretrained,
            output_tokens=cfg.output_tokens,
            config_overrides=cfg.hf_model_config,
            num_tokens=cfg.context_length,
        )
    expect("text_arch", cfg.text_arch, ("clip", "modern"))
    if cfg.text_arch == "modern":
        return ModernTextTransformer(cfg, embed_dim)
    reason = "has no effect on a native text tower. Set text_arch to 'modern', or remove it."
    expect_defaults(cfg, _MODERN_FIELDS, reason)
    options = _tower_options(cfg, TextTransformer)
    return TextTransformer(output_dim=embed_dim, **(options | layer_types(cfg, quick_gelu, cast_dtype)))


# Fields of CLIPTextCfg that only the modern tower has.
_MODERN_FIELDS = (
    *("attention_mode", "pos_embed", "rope_temperature", "mlp_type", "norm_type", "norm_eps", "attn_gated"),
    *("pre_norm", "norm_placement", "zero_init_residual", "reg_tokens", "value_residual"),
    *("attention_bias", "mlp_bias", "gate_bias"),
)
