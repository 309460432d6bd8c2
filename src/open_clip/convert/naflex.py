"""Conversion of ViTs for one image size into towers for images of any size (NaFlex): configurations and weights.

Native towers and those of timm's families `vision_transformer` and `eva` are converted. Images of the size for which
the weights were trained have the same features after the conversion.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from ..config import CLIPVisionCfg, as_config, is_naflex_cfg
from ..timm_versions import import_timm, require_naflex
from ..utils import to_2tuple
from .layout import StateDict

_TRUNK = "visual.trunk."
_NAFLEX_MODEL = "naflexvit_base_patch16_gap"  # whose sizes and parts are all replaced
_EVA = "timm.models.eva"
_FAMILIES = ("timm.models.vision_transformer", _EVA)
_NORM_EPS = 1e-5  # of the native layer norms; timm's default is 1e-6
_POOLING = {"tok": "token", "avg": "avg"}
# Options of native towers that timm's NaFlexVit does not have, and the values with which they do nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "attentional_pool": (False,),
    "output_tokens": (False,),
    "pos_embed_type": ("learnable",),
    "block_type": (None, "default"),
    **dict.fromkeys(
        ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), (False,)
    ),
}


def apply_naflex_vision_config(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """Change the image tower of a configuration into one for images of any size, in place.

    Returns:
        The configuration.

    Raises:
        ValueError: the tower cannot be converted.
    """
    if "multimodal_cfg" in model_cfg:
        raise ValueError(
            "force_naflex_vision: a CoCa's decoder reads the tokens of its attentional pooler, which NaFlex towers do "
            "not have. Use a CLIP model."
        )
    cfg = as_config(CLIPVisionCfg, model_cfg["vision_cfg"])
    if cfg.timm_model_name:
        _convert_timm_config(model_cfg, cfg)
    else:
        model_cfg["vision_cfg"] = _from_native_config(cfg, bool(model_cfg.get("quick_gelu")))
    return model_cfg


def _convert_timm_config(model_cfg: dict[str, Any], cfg: CLIPVisionCfg) -> None:
    name = cfg.timm_model_name or ""
    if is_naflex_cfg(name):
        return
    require_naflex()  # older ones also fail to build models on the meta device, see _pooling_of
    family = _family_of(name)
    if family not in _FAMILIES:
        raise ValueError(
            f"force_naflex_vision: {name} of timm is not a ViT that NaFlex towers can compute ({family}). Use a model "
            "of timm's vision_transformer or eva, a native ViT, or one of timm's naflexvit."
        )
    kwargs = {**(cfg.timm_model_kwargs or {}), "use_naflex": True}
    if family == _EVA and _pooling_of(cfg, name) == "map":
        kwargs.setdefault("pool_include_prefix", True)  # the attention pooling of Eva reads the class token too
    model_cfg["vision_cfg"] = {**model_cfg["vision_cfg"], "timm_model_kwargs": kwargs}


def _family_of(name: str) -> str:
    """Return timm's module that defines a model, or "" if it does not have the model."""
    timm, plain = import_timm(), _plain(name)
    return timm.model_entrypoint(plain).__module__ if timm.is_model(plain) else ""


def _plain(name: str) -> str:
    """Return the name of timm's model without a source and the tag of the weights."""
    return name.rpartition("/")[2].partition(".")[0]


def _pooling_of(cfg: CLIPVisionCfg, name: str) -> str:
    """Return the pooling of a tower of timm."""
    pool = (cfg.timm_model_kwargs or {}).get("global_pool") or cfg.timm_pool
    if pool:
        return pool
    with torch.device("meta"):  # "" is the default of the model, which only the model has
        model: Any = import_timm().create_model(_plain(name))
        return model.global_pool


def _from_native_config(cfg: CLIPVisionCfg, quick_gelu: bool) -> dict[str, Any]:
    if not isinstance(cfg.layers, int):
        raise ValueError("force_naflex_vision: a ResNet has no patches. Use a model with a ViT.")
    for name, allowed in _REFUSED.items():
        if getattr(cfg, name) not in allowed:
            raise ValueError(
                f"force_naflex_vision: the image tower has {name}={getattr(cfg, name)!r}, which NaFlex towers do not "
                "have. Use another model, or leave out force_naflex_vision."
            )
    if cfg.pool_type not in _POOLING:
        raise ValueError(
            f"force_naflex_vision: the image tower has pool_type={cfg.pool_type!r}, and a NaFlex tower has one feature "
            "vector per image. Use a model that pools 'tok' or 'avg'."
        )
    patch_size, image_size = to_2tuple(cfg.patch_size), to_2tuple(cfg.image_size)
    grid = [side // patch for side, patch in zip(image_size, patch_size, strict=True)]
    pool = _POOLING[cfg.pool_type]
    return {
        "image_size": cfg.image_size,
        "image_seq_len": cfg.image_seq_len or math.prod(grid),
        "patch_dropout": cfg.patch_dropout,
        "act_kwargs": cfg.act_kwargs,
        "norm_kwargs": {"eps": _NORM_EPS, **(cfg.norm_kwargs or {})},
        "timm_model_name": _NAFLEX_MODEL,
        "timm_pool": pool,
        "timm_proj": "linear",
        "timm_model_kwargs": {
            "patch_size": cfg.patch_size,
            "embed_dim": cfg.width,
            "depth": cfg.layers,
            "num_heads": cfg.width // cfg.head_width,
            "mlp_ratio": cfg.mlp_ratio,
            "class_token": True,
            "reg_tokens": 0,
            "pos_embed_grid_size": grid,
            "pre_norm": not cfg.no_ln_pre,
            "init_values": cfg.ls_init_value or 0,  # timm ignores None
            "global_pool": pool,
            "fc_norm": cfg.final_ln_after_pool,
            "act_layer": "quick_gelu" if quick_gelu else "gelu",
        },
    }


def is_naflex_model(model: Any) -> bool:
    """Whether the image tower of a model is one for images of any size."""
    return hasattr(getattr(getattr(model, "visual", None), "trunk", None), "embeds")


def convert_naflex_state_dict(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Convert the weights of a ViT for one image size to those of a model with a NaFlex tower.

    Args:
        state_dict: of a whole model or of its image tower, native or from timm. Others are returned unchanged.
        model: the model that the weights are for, whose image tower is a NaFlexTower.
    """
    trunk: Any = model.visual.trunk  # type: ignore[union-attr]
    for prefix in ("visual.", ""):
        if f"{prefix}conv1.weight" in state_dict and f"{prefix}class_embedding" in state_dict:
            return _from_native(state_dict, prefix, trunk)
    for prefix in (_TRUNK, "trunk.", ""):
        if f"{prefix}patch_embed.proj.weight" in state_dict:
            return _from_timm(state_dict, prefix, trunk)
    return state_dict


_NATIVE_NAMES = (
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.ls_([12])\.", r".ls\1."),
    (r"^ln_pre\.", "norm_pre."),
)


def _from_native(state_dict: StateDict, prefix: str, trunk: Any) -> StateDict:
    converted, tower = _split(state_dict, prefix)
    table, token = tower.pop("positional_embedding"), tower.pop("class_embedding")
    converted[f"{_TRUNK}embeds.cls_token"] = (token.float() + table[0].float())[None, None]
    converted[f"{_TRUNK}embeds.pos_embed"] = _as_grid(table[1:], trunk)
    weight = converted[f"{_TRUNK}embeds.proj.weight"] = _as_linear(tower.pop("conv1.weight"))
    if trunk.embeds.proj.bias is not None:  # the native convolution has none
        converted[f"{_TRUNK}embeds.proj.bias"] = weight.new_zeros(len(weight))
    if "proj" in tower:
        converted["visual.head.proj.weight"] = tower.pop("proj").T
    final_norm = "norm." if isinstance(trunk.fc_norm, nn.Identity) else "fc_norm."
    for name, value in tower.items():
        for pattern, replacement in (*_NATIVE_NAMES, (r"^ln_post\.", final_norm)):
            name = re.sub(pattern, replacement, name)
        converted[f"{_TRUNK}{name}"] = value
    return converted


def _from_timm(state_dict: StateDict, prefix: str, trunk: Any) -> StateDict:
    converted, tower = _split(state_dict, prefix)
    tokens = {name: tower.pop(name).float() for name in ("cls_token", "reg_token") if name in tower}
    table = tower.pop("pos_embed", None)
    if table is not None:
        num_prefix = sum(token.shape[1] for token in tokens.values())
        if _has_positions_of_tokens(table.shape[1], num_prefix, trunk):
            parts = table[:, :num_prefix].split([token.shape[1] for token in tokens.values()], dim=1)
            tokens = {name: tokens[name] + part.float() for name, part in zip(tokens, parts, strict=True)}
            table = table[:, num_prefix:]
        converted[f"{_TRUNK}embeds.pos_embed"] = _as_grid(table[0], trunk)
    converted |= {f"{_TRUNK}embeds.{name}": token for name, token in tokens.items()}
    converted[f"{_TRUNK}embeds.proj.weight"] = _as_linear(tower.pop("patch_embed.proj.weight"))
    for name, value in tower.items():
        converted[_TRUNK + name.replace("patch_embed.", "embeds.", 1)] = value
    return converted


def _split(state_dict: StateDict, prefix: str) -> tuple[StateDict, StateDict]:
    """Split weights into those that do not start with `prefix` and those that do, the latter without it."""
    others = {name: value for name, value in state_dict.items() if not name.startswith(prefix)}
    return others, {name.removeprefix(prefix): v for name, v in state_dict.items() if name.startswith(prefix)}


def _has_positions_of_tokens(length: int, num_prefix: int, trunk: Any) -> bool:
    """Whether a position table of timm has entries for class and register tokens before those of the patches."""
    rows, columns = trunk.embeds.pos_embed.shape[1:3]
    if not num_prefix or length == rows * columns:
        return False
    return length - num_prefix == rows * columns or math.isqrt(length) ** 2 != length


def _as_grid(table: Tensor, trunk: Any) -> Tensor:
    """Reshape positions [patches, width] to [1, rows, columns, width]. A grid of another size is square."""
    grid = tuple(trunk.embeds.pos_embed.shape[1:3])
    if math.prod(grid) != len(table):
        side = math.isqrt(len(table))
        if side * side != len(table):
            raise ValueError(
                f"The weights have positions for {len(table)} patches, which is not a square grid, and the model's "
                f"grid is {grid[0]} x {grid[1]}. Only square grids can be resized."
            )
        grid = (side, side)
    return table.reshape(1, *grid, -1)


def _as_linear(weight: Tensor) -> Tensor:
    """Turn a convolution [width, channels, P, P] into a linear layer over (row, column, channel)."""
    return weight.permute(0, 2, 3, 1).flatten(1)
