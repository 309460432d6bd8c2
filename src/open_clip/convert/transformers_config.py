"""Conversion of configurations between our models and transformers' CLIP, SigLIP and SigLIP 2, in both directions.

The files of transformers are `config.json` and `preprocessor_config.json`. A `config.json` omits values that are
defaults, so this file contains the defaults of the released classes. `transformers_naflex` has SigLIP 2's image tower.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

from ..config import CLIPTextCfg, CLIPVisionCfg, as_config, is_naflex_cfg
from ..constants import INCEPTION_MEAN, INCEPTION_STD, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from ..utils import to_2tuple
from . import transformers_naflex as naflex

logger = logging.getLogger(__name__)

Config = dict[str, Any]


def _tower(width: int, heads: int, act: str, eps: float, **others: Any) -> Config:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 12}
    return {**sizes, "num_attention_heads": heads, "hidden_act": act, "layer_norm_eps": eps, **others}


_CLIP_TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
_SIGLIP_TEXT = {"vocab_size": 32000, "max_position_embeddings": 64}
_IMAGES = {"num_channels": 3, "image_size": 224}
_PATCHES = {"num_channels": 3, "num_patches": 256}
_DEFAULTS: dict[tuple[str, str], Config] = {
    ("clip", "text"): _tower(512, 8, "quick_gelu", 1e-5, **_CLIP_TEXT),
    ("clip", "vision"): _tower(768, 12, "quick_gelu", 1e-5, **_IMAGES, patch_size=32),
    ("siglip", "text"): _tower(768, 12, "gelu_pytorch_tanh", 1e-6, **_SIGLIP_TEXT),
    ("siglip", "vision"): _tower(768, 12, "gelu_pytorch_tanh", 1e-6, **_IMAGES, patch_size=16, vision_use_head=True),
    ("siglip2", "text"): _tower(768, 12, "gelu_pytorch_tanh", 1e-6, **_SIGLIP_TEXT),
    ("siglip2", "vision"): _tower(768, 12, "gelu_pytorch_tanh", 1e-6, **_PATCHES, patch_size=16, vision_use_head=True),
}
_PROJECTION_DIM = 512  # default of CLIPConfig
_LOGIT_SCALE = 2.6592
# A wrong eos_token_id in older configurations of CLIP. For it, transformers pools at the highest id.
_LEGACY_END = 2

# (width, layers, heads, width of the MLP, patch size) of an image tower -> name in timm, for any image size
SIGLIP_TOWERS = {
    (768, 12, 12, 3072, 16): "vit_base_patch16_siglip_224",
    (768, 12, 12, 3072, 32): "vit_base_patch32_siglip_256",
    (1024, 24, 16, 4096, 16): "vit_large_patch16_siglip_256",
    (1152, 27, 16, 4304, 14): "vit_so400m_patch14_siglip_224",
    (1152, 27, 16, 4304, 16): "vit_so400m_patch16_siglip_256",
    (1536, 40, 16, 6144, 16): "vit_giantopt_patch16_siglip_256",
}

# From transformers


def model_cfg_from_transformers(config: Mapping[str, Any], source: str) -> Config:
    """Convert transformers' `config.json` to the configuration of our model.

    Args:
        config: contents of the file.
        source: name of the file in messages.

    Raises:
        ValueError: it is another kind of model, or a CLIP or SigLIP that this package cannot build.
    """
    kind = config.get("model_type")
    if kind not in ("clip", "siglip", naflex.MODEL_TYPE):
        raise ValueError(
            f"{source} has the model_type {str(kind)[:40]!r}. Of transformers' models, open_clip supports 'clip', "
            "'siglip' (also SigLIP 2 with a fixed resolution) and 'siglip2'."
        )
    text, vision = _part(config, kind, "text"), _part(config, kind, "vision")
    if vision["num_channels"] != 3:
        raise ValueError(f"{source}: images have {vision['num_channels']} channels, and open_clip supports only 3.")
    build = _clip_model_cfg if kind == "clip" else _siglip_model_cfg
    return build(config, text, vision, source)


def _part(config: Mapping[str, Any], kind: str, tower: str) -> Config:
    """Return the configuration of a tower with defaults. The old key `..._config_dict` takes precedence."""
    given = config.get(f"{tower}_config_dict") or config.get(f"{tower}_config") or {}
    return {**_DEFAULTS[kind, tower], **{key: value for key, value in given.items() if value is not None}}


def _sizes(part: Config) -> Config:
    width, mlp_width = part["hidden_size"], part["intermediate_size"]
    ratio = mlp_width / width
    if int(width * ratio) != mlp_width:  # the towers compute it in this way
        ratio = math.nextafter(ratio, math.inf)
    return {"width": width, "layers": part["num_hidden_layers"], "mlp_ratio": ratio}


def _numerics(part: Config, source: str) -> Config:
    """Convert activation and epsilon if they are not our defaults. QuickGELU is an option of the whole model."""
    cfg: Config = {}
    if part["hidden_act"] in ("gelu_pytorch_tanh", "gelu_new"):
        cfg["act_kwargs"] = {"approximate": "tanh"}
    elif part["hidden_act"] not in ("gelu", "quick_gelu"):
        raise ValueError(
            f"{source} has the activation {part['hidden_act']!r}. Supported are quick_gelu, gelu and gelu_pytorch_tanh."
        )
    if part["layer_norm_eps"] != 1e-5:
        cfg["norm_kwargs"] = {"eps": part["layer_norm_eps"]}
    return cfg


def _clip_model_cfg(config: Mapping[str, Any], text: Config, vision: Config, source: str) -> Config:
    quick = {part["hidden_act"] == "quick_gelu" for part in (text, vision)}
    if len(quick) > 1:
        raise ValueError(
            f"{source} has QuickGELU in one tower only ({text['hidden_act']} for texts, {vision['hidden_act']} for "
            "images). Models of open_clip have it in both towers or in none."
        )
    text_cfg = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        **_sizes(text),
        "heads": text["num_attention_heads"],
        **_numerics(text, source),
    }
    # usually the end of text is the highest id, and pooling at the highest id finds it
    if text["eos_token_id"] not in (_LEGACY_END, text["vocab_size"] - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": text["eos_token_id"]}
    vision_cfg = {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        **_sizes(vision),
        "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        **_numerics(vision, source),
    }
    return {
        "embed_dim": config.get("projection_dim") or _PROJECTION_DIM,
        "quick_gelu": quick.pop(),
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
    }


def _siglip_vision_cfg(vision: Config, source: str) -> Config:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    tower = tuple(vision[key] for key in keys)
    if tower not in SIGLIP_TOWERS or not vision["vision_use_head"] or vision["layer_norm_eps"] != 1e-6:
        raise ValueError(
            f"{source} has an image tower that is not in timm: width, layers, heads, MLP and patch size are {tower}. "
            f"timm has {', '.join(map(str, SIGLIP_TOWERS))}, with attention pooling and an epsilon of 1e-6."
        )
    return {
        "image_size": vision["image_size"],
        "timm_model_name": SIGLIP_TOWERS[tower],
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }


def _siglip_model_cfg(config: Mapping[str, Any], text: Config, vision: Config, source: str) -> Config:
    is_naflex = config["model_type"] == naflex.MODEL_TYPE
    vision_cfg = (naflex.vision_cfg_from_transformers if is_naflex else _siglip_vision_cfg)(vision, source)
    vision_cfg["act_kwargs"] = {"approximate": "none", **_numerics(vision, source).get("act_kwargs", {})}
    width, output = vision["hidden_size"], text.get("projection_size") or text["hidden_size"]
    if output != width:
        raise ValueError(f"{source}: text features have the width {output}, image features {width}. They must agree.")
    text_cfg = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "tokenizer_kwargs": {"clean": "lower" if is_naflex else "canonicalize"},  # as their tokenizers
        **_sizes(text),
        "heads": text["num_attention_heads"],
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        **_numerics(text, source),
    }
    return {
        "embed_dim": width,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
    }


_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # codes of PIL


def preprocess_cfg_from_transformers(config: Mapping[str, Any], source: str) -> Config:
    """Convert transformers' `preprocessor_config.json` to our preprocessing configuration.

    Raises:
        ValueError: our preprocessing does not support its interpolation.
    """
    is_naflex = naflex.is_naflex_processor(config)
    resample, size = config.get("resample", 2 if is_naflex else 3), config.get("size") or {}
    if resample not in _RESAMPLE:
        raise ValueError(f"{source} has resample={resample}. Supported are 2 (bilinear) and 3 (bicubic).")
    # An int or "shortest_edge": resize the shorter side, crop the centre. "height" and "width": resize both sides.
    squash = isinstance(size, Mapping) and "height" in size and not config.get("do_center_crop", False)
    squash = squash or is_naflex  # images of a fixed size; patches keep the aspect ratio
    sides = [set(side.values()) if isinstance(side, Mapping) else {side} for side in (size, config.get("crop_size"))]
    if not squash and all(sides) and None not in sides[1] and sides[0] != sides[1]:
        logger.warning("%s resizes to %s and crops to %s. Images will be resized to the crop size.", source, *sides)
    return {
        "mean": config.get("image_mean") or list(INCEPTION_MEAN if is_naflex else OPENAI_DATASET_MEAN),
        "std": config.get("image_std") or list(INCEPTION_STD if is_naflex else OPENAI_DATASET_STD),
        "interpolation": _RESAMPLE[resample],
        "resize_mode": "squash" if squash else "shortest",
    }


# To transformers

# Fields that transformers' towers have, or that do not affect features. Other fields must have their defaults.
_SIZES = {"layers", "width", "mlp_ratio", "act_kwargs", "norm_kwargs"}
_VISION_FIELDS = _SIZES | {"head_width", "patch_size", "image_size", "patch_dropout", "final_ln_after_pool"}
_TIMM_FIELDS = {"image_size", "act_kwargs", "patch_dropout", "timm_drop_path", "timm_drop", "timm_model_pretrained"}
_TIMM_FIELDS |= {"timm_model_kwargs", "image_seq_len"}  # of NaFlex towers
_NEUTRAL_KWARGS = {"dynamic_img_size", "strict_img_size", "use_naflex"}  # the last one if it is False
_TEXT_FIELDS = _SIZES | {"heads", "context_length", "vocab_size", "eos_id", "pad_id", "final_ln_after_pool"}
_TEXT_FIELDS |= {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "hf_model_pretrained"}


def is_siglip_model_cfg(model_cfg: Mapping[str, Any]) -> bool:
    """Whether a configuration of open_clip has the image tower of SigLIP or SigLIP 2."""
    vision_cfg = model_cfg["vision_cfg"]
    return naflex.is_naflex_siglip(vision_cfg) or _timm_stem(vision_cfg.get("timm_model_name")) in _tower_sizes()


def _timm_stem(name: str | None) -> str:
    """Return a timm name without the image size and the tag of the weights."""
    return (name or "").partition(".")[0].rpartition("_")[0]


def _tower_sizes() -> dict[str, tuple[int, ...]]:
    return {_timm_stem(name): sizes for sizes, name in SIGLIP_TOWERS.items()}


def model_cfg_to_transformers(model_cfg: Mapping[str, Any], name: str, image_gelu: str = "none") -> Config:
    """Convert the configuration of a model to transformers' `config.json`.

    Args:
        model_cfg: configuration of the model.
        name: name of the model in messages.
        image_gelu: approximation of GELU in SigLIP's image tower, "none" or "tanh". It depends on timm.

    Raises:
        ValueError: transformers has no such model. The message names the difference.
    """
    if "multimodal_cfg" in model_cfg:
        raise ValueError(f"{name} is a CoCa, and transformers has no model with a captioning decoder.")
    text = as_config(CLIPTextCfg, model_cfg["text_cfg"])
    vision = as_config(CLIPVisionCfg, model_cfg["vision_cfg"])
    if text.hf_model_name:
        raise ValueError(f"{name} has the text tower {text.hf_model_name}. transformers' CLIP supports only its own.")
    if is_siglip_model_cfg(model_cfg):
        return _siglip_config(model_cfg, text, vision, name, image_gelu)
    if vision.timm_model_name or isinstance(vision.layers, (list, tuple)):
        tower = f"{vision.timm_model_name} of timm" if vision.timm_model_name else "ModifiedResNet"
        raise ValueError(f"{name} has the image tower {tower}. transformers supports only the ViTs of CLIP and SigLIP.")
    return _clip_config(model_cfg, text, vision, name)


def _clip_config(model_cfg: Mapping[str, Any], text: CLIPTextCfg, vision: CLIPVisionCfg, name: str) -> Config:
    _check_other_fields(vision, _VISION_FIELDS, {}, name, "image")
    _check_other_fields(text, _TEXT_FIELDS | {"pool_type"}, {}, name, "text")
    if model_cfg.get("init_logit_bias") is not None:
        raise ValueError(f"{name} has a logit bias, which transformers' CLIP does not have.")
    if text.pool_type not in ("argmax", "eos") or (text.pool_type == "eos" and text.eos_id in (None, _LEGACY_END)):
        raise ValueError(
            f"{name} pools text by {text.pool_type!r} (eos_id={text.eos_id}). transformers' CLIP pools at the highest "
            f"id, or at the first end of text if its id is not {_LEGACY_END}."
        )
    embed_dim, quick_gelu = model_cfg["embed_dim"], bool(model_cfg.get("quick_gelu"))
    end = text.eos_id if text.pool_type == "eos" and text.eos_id is not None else text.vocab_size - 1
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": embed_dim,
        "logit_scale_init_value": _LOGIT_SCALE,
        "text_config": {
            "model_type": "clip_text_model",
            "projection_dim": embed_dim,
            **_text_config(text, quick_gelu),
            "eos_token_id": end,
            "bos_token_id": end - 1,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "projection_dim": embed_dim,
            **_tower_config(vision, vision.width // vision.head_width, quick_gelu),
            **_image_sizes(vision, name),
        },
    }


def _siglip_config(
    model_cfg: Mapping[str, Any], text: CLIPTextCfg, vision: CLIPVisionCfg, name: str, image_gelu: str
) -> Config:
    tower = {"timm_model_name": vision.timm_model_name, "timm_pool": "map", "timm_proj": "none"}
    _check_other_fields(vision, _TIMM_FIELDS, tower, name, "image")
    pooled = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    _check_other_fields(text, _TEXT_FIELDS, pooled, name, "text")
    if model_cfg.get("init_logit_bias") is None:
        raise ValueError(f"{name} has no logit bias, which transformers' SigLIP needs.")
    is_naflex = naflex.is_naflex_siglip(model_cfg["vision_cfg"])
    kind = naflex.MODEL_TYPE if is_naflex else "siglip"
    if is_naflex:
        sizes = naflex.vision_cfg_to_transformers(model_cfg["vision_cfg"], name)
    else:
        sizes = _siglip_vision_config(vision, name)
    return {
        "architectures": ["Siglip2Model" if is_naflex else "SiglipModel"],
        "model_type": kind,
        "text_config": {
            "model_type": f"{kind}_text_model",
            "projection_size": model_cfg["embed_dim"],
            **_text_config(text, quick_gelu=bool(model_cfg.get("quick_gelu"))),
        },
        "vision_config": {"model_type": f"{kind}_vision_model", "hidden_act": _GELUS[image_gelu], **sizes},
    }


def _siglip_vision_config(vision: CLIPVisionCfg, name: str) -> Config:
    kwargs = vision.timm_model_kwargs or {}
    if is_naflex_cfg(vision.timm_model_name, kwargs):
        raise ValueError(
            f"{name} has the tower {vision.timm_model_name} converted to NaFlex, which resizes its positions in "
            "another way than transformers' Siglip2. Only timm's naflexvit_*_siglip have a counterpart there."
        )
    is_own_size = tuple(to_2tuple(kwargs.get("img_size", 0))) == tuple(to_2tuple(vision.image_size))
    naflex.check_timm_kwargs(kwargs, _NEUTRAL_KWARGS | ({"img_size"} if is_own_size else set()), name)
    width, layers, heads, mlp_width, patch_size = _tower_sizes()[_timm_stem(vision.timm_model_name)]
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp_width,
        "layer_norm_eps": 1e-6,
        **_image_sizes(dataclasses.replace(vision, patch_size=patch_size), name),
    }


_GELUS = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}


def _tower_config(cfg: CLIPTextCfg | CLIPVisionCfg, heads: int, quick_gelu: bool) -> Config:
    approximate = (cfg.act_kwargs or {}).get("approximate", "none")
    return {
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": heads,
        "intermediate_size": int(cfg.width * cfg.mlp_ratio),
        "hidden_act": "quick_gelu" if quick_gelu else _GELUS[approximate],
        "layer_norm_eps": (cfg.norm_kwargs or {}).get("eps", 1e-5),
    }


def _text_config(cfg: CLIPTextCfg, quick_gelu: bool) -> Config:
    sizes = {"vocab_size": cfg.vocab_size, "max_position_embeddings": cfg.context_length}
    return {**_tower_config(cfg, cfg.heads, quick_gelu), **sizes}


def _image_sizes(vision: CLIPVisionCfg, name: str) -> Config:
    sizes = {}
    for key in ("image_size", "patch_size"):
        height, width = to_2tuple(getattr(vision, key))
        if height != width:
            raise ValueError(f"{name} has {key}={height, width}. transformers' towers support only squares.")
        sizes[key] = height
    return sizes


def _check_other_fields(
    cfg: CLIPTextCfg | CLIPVisionCfg, free: set[str], fixed: Mapping[str, Any], name: str, tower: str
) -> None:
    """Raise ValueError if a field outside `free` differs from its value in `fixed`, or else from its default."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        wanted = fixed.get(field.name, field.default)
        if field.name not in free and value != wanted:
            raise ValueError(
                f"{name}: the {tower} tower has {field.name}={value!r}. transformers supports only "
                f"{field.name}={wanted!r}."
            )


def preprocess_cfg_to_transformers(
    preprocess_cfg: Mapping[str, Any], siglip: bool, vision_cfg: Mapping[str, Any] | None = None
) -> Config:
    """Convert the preprocessing of a model (fields of PreprocessCfg) to transformers' `preprocessor_config.json`.

    Args:
        preprocess_cfg: preprocessing of the model.
        siglip: whether the model is a SigLIP.
        vision_cfg: configuration of the image tower. The processor of a NaFlex tower needs it.

    Raises:
        ValueError: images are padded, which transformers' processors do not support.
    """
    if siglip and vision_cfg and naflex.is_naflex_siglip(vision_cfg):
        return naflex.processor_to_transformers(vision_cfg, "the model") | _pixels_to_transformers(preprocess_cfg)
    height, width = to_2tuple(preprocess_cfg["size"])
    mode = preprocess_cfg["resize_mode"]
    if mode not in ("shortest", "squash"):
        raise ValueError(f"transformers has no counterpart of resize_mode={mode!r}, only of 'shortest' and 'squash'.")
    squash = mode == "squash"
    config = {
        "image_processor_type": "SiglipImageProcessor" if siglip and squash else "CLIPImageProcessor",
        "processor_class": "SiglipProcessor" if siglip else "CLIPProcessor",
        "size": {"height": height, "width": width} if squash else {"shortest_edge": min(height, width)},
        "do_center_crop": not squash,
        **_pixels_to_transformers(preprocess_cfg),
    }
    return config if squash else {**config, "crop_size": {"height": height, "width": width}}


def _pixels_to_transformers(preprocess_cfg: Mapping[str, Any]) -> Config:
    """Return the fields of `preprocessor_config.json` that all image processors have."""
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 2 if preprocess_cfg["interpolation"] == "bilinear" else 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess_cfg["mean"]),
        "image_std": list(preprocess_cfg["std"]),
    }
