"""Configurations of the NaFlex image tower of SigLIP 2: timm's naflexvit_*_siglip and transformers' Siglip2VisionModel.

transformers calls the number of stored position embeddings `num_patches`, and the largest number of patches of
an image, which its image processor needs, `max_num_patches`. The latter is our `image_seq_len`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from ..config import CLIPVisionCfg
from ..transform.naflex import default_seq_len
from ..utils import to_2tuple

Config = dict[str, Any]

MODEL_TYPE = "siglip2"
IMAGE_PROCESSOR = "Siglip2ImageProcessor"
MAX_NUM_PATCHES = 256  # default of Siglip2ImageProcessor

# Values of timm_model_kwargs that describe a tower, of each name in timm. The grid is 16 x 16 in both.
_SIZES = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size")
_GRID = 16
_TOWERS = {
    "naflexvit_base_patch16_siglip": (768, 12, 12, 4.0, 16),
    "naflexvit_so400m_patch16_siglip": (1152, 27, 16, 3.7362, 16),
}
_BASE = "naflexvit_base_patch16_siglip"  # for towers of other sizes


def is_naflex_siglip(vision_cfg: Mapping[str, Any]) -> bool:
    """Whether an image tower is timm's NaFlex tower of SigLIP 2."""
    return _timm_name(vision_cfg) in _TOWERS


def _timm_name(vision_cfg: Mapping[str, Any]) -> str:
    """Return the name in timm without the tag of the weights."""
    return str(vision_cfg.get("timm_model_name") or "").partition(".")[0]


# From transformers


def vision_cfg_from_transformers(vision: Config, source: str) -> Config:
    """Convert `vision_config` (with defaults) to the size and the name of the tower in our configuration.

    Raises:
        ValueError: timm's tower has another epsilon or pooling, or the positions are not a square grid.
    """
    if not vision["vision_use_head"] or vision["layer_norm_eps"] != 1e-6:
        raise ValueError(
            f"{source}: the image tower has vision_use_head={vision['vision_use_head']} and "
            f"layer_norm_eps={vision['layer_norm_eps']}. timm's NaFlex tower has attention pooling and 1e-6."
        )
    patches = vision["num_patches"]
    grid = math.isqrt(patches)
    if grid * grid != patches:
        raise ValueError(f"{source} has num_patches={patches}, which is not the number of patches of a square grid.")
    name, kwargs = _find_tower(vision)
    if grid != _GRID:
        kwargs["pos_embed_grid_size"] = [grid, grid]
    cfg = {
        "image_size": grid * vision["patch_size"],
        "image_seq_len": MAX_NUM_PATCHES,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    return {**cfg, "timm_model_kwargs": kwargs} if kwargs else cfg


def _find_tower(vision: Config) -> tuple[str, Config]:
    """Return (name in timm, timm_model_kwargs)."""
    width, mlp_width = vision["hidden_size"], vision["intermediate_size"]
    keys = (width, vision["num_hidden_layers"], vision["num_attention_heads"], mlp_width, vision["patch_size"])
    for name, sizes in _TOWERS.items():
        if _with_mlp_width(sizes) == keys:
            return name, {}
    ratio = mlp_width / width
    if int(width * ratio) != mlp_width:  # timm computes it in this way
        ratio = math.nextafter(ratio, math.inf)
    wanted = dict(zip(_SIZES, (*keys[:3], ratio, keys[4]), strict=True))
    base = dict(zip(_SIZES, _TOWERS[_BASE], strict=True))
    return _BASE, {key: value for key, value in wanted.items() if value != base[key]}


def _with_mlp_width(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    width, layers, heads, ratio, patch_size = sizes
    return width, layers, heads, int(width * ratio), patch_size


def is_naflex_processor(config: Mapping[str, Any]) -> bool:
    """Whether a `preprocessor_config.json` resizes images to a number of patches."""
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    return kind.startswith("Siglip2") or "max_num_patches" in config


# To transformers


def vision_cfg_to_transformers(vision_cfg: Mapping[str, Any], name: str) -> Config:
    """Return the sizes of `vision_config` for the tower of a configuration.

    Args:
        vision_cfg: configuration of the image tower.
        name: name of the model in messages.

    Raises:
        ValueError: transformers has no such tower.
    """
    kwargs = dict(vision_cfg.get("timm_model_kwargs") or {})
    tower = dict(zip(_SIZES, _TOWERS[_timm_name(vision_cfg)], strict=True))
    grid = to_2tuple(kwargs.pop("pos_embed_grid_size", _GRID))
    check_timm_kwargs(kwargs, tower, name)
    tower |= kwargs
    patch_size = to_2tuple(tower["patch_size"])
    if grid[0] != grid[1] or patch_size[0] != patch_size[1]:
        raise ValueError(
            f"{name} has patches of {patch_size} pixels and a grid of {tuple(grid)} positions. transformers' towers "
            "support only squares."
        )
    return {
        "hidden_size": tower["embed_dim"],
        "num_hidden_layers": tower["depth"],
        "num_attention_heads": tower["num_heads"],
        "intermediate_size": int(tower["embed_dim"] * tower["mlp_ratio"]),
        "patch_size": patch_size[0],
        "num_patches": grid[0] * grid[1],
        "layer_norm_eps": 1e-6,
    }


def check_timm_kwargs(kwargs: Mapping[str, Any], supported: Collection[str], name: str) -> None:
    """Raise ValueError if `timm_model_kwargs` has names that are not in `supported`. `name` is that of the model."""
    unknown = sorted(set(kwargs).difference(supported))
    if unknown:
        raise ValueError(f"{name} sets {', '.join(unknown)} of timm's tower, which transformers does not support.")


def processor_to_transformers(vision_cfg: Mapping[str, Any], name: str) -> Config:
    """Return the fields of `preprocessor_config.json` that only `Siglip2ImageProcessor` has."""
    patch_size = vision_cfg_to_transformers(vision_cfg, name)["patch_size"]
    image_size = vision_cfg.get("image_size", CLIPVisionCfg.image_size)
    return {
        "image_processor_type": IMAGE_PROCESSOR,
        "processor_class": "Siglip2Processor",
        "patch_size": patch_size,
        "max_num_patches": vision_cfg.get("image_seq_len") or default_seq_len(image_size, patch_size),
    }
