"""Configurations of the towers, and the registry of named architectures.

A configuration is JSON: {"embed_dim", "vision_cfg", "text_cfg"[, "quick_gelu", "custom_text", ...]}. The sections of
the towers become the dataclasses below, whose fields and defaults are those of open_clip. Unknown keys are errors.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import logging
import os
import re
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from . import aliases

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")

HF_HUB_PREFIX = "hf-hub:"
LOCAL_DIR_PREFIX = "local-dir:"


@dataclasses.dataclass
class CLIPVisionCfg:
    """The image tower: a ViT (`layers` is an int), a ModifiedResNet (four ints) or a timm model (`timm_model_name`)."""

    layers: tuple[int, int, int, int] | int = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int = 16
    image_size: tuple[int, int] | int = 224

    ls_init_value: float | None = None  # initial value of layer scale; None disables it
    patch_dropout: float = 0.0  # fraction of patches dropped in training, https://arxiv.org/abs/2212.00794
    attentional_pool: bool | str = False  # True, "parallel" or "cascade", https://arxiv.org/abs/2205.01917
    attn_pooler_queries: int = 256
    attn_pooler_heads: int = 8
    no_ln_pre: bool = False
    pos_embed_type: str = "learnable"  # or "sin_cos_2d"
    final_ln_after_pool: bool = False
    pool_type: str = "tok"  # "tok", "avg" or "none"
    output_tokens: bool = False
    act_kwargs: dict | None = None
    norm_kwargs: dict | None = None

    block_type: str | None = None  # "default" or "custom"; None: "custom" if an option below needs it
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False

    timm_model_name: str | None = None
    timm_model_pretrained: bool = False
    timm_pool: str = "avg"
    timm_proj: str = "linear"
    timm_proj_bias: bool = False
    timm_drop: float = 0.0
    timm_drop_path: float | None = None
    # After the fields of open_clip 3.3, because programs may pass those by position.
    timm_model_kwargs: dict | None = None  # more arguments of timm's model
    image_seq_len: int | None = None  # number of patches of an image in evaluation, for NaFlex towers


def is_naflex_cfg(timm_model_name: str | None, timm_model_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether these fields of a CLIPVisionCfg describe a tower for images of any size."""
    return "naflexvit" in (timm_model_name or "") or bool((timm_model_kwargs or {}).get("use_naflex"))


@dataclasses.dataclass
class CLIPTextCfg:
    """The text tower: a native transformer, a modern one (`text_arch`), or a Hugging Face model (`hf_model_name`)."""

    context_length: int = 77
    vocab_size: int = 49408
    hf_tokenizer_name: str | None = None
    tokenizer_mode: str | None = None
    tokenizer_kwargs: dict | None = None

    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    embed_cls: bool = False  # append a learned class token to the text, as in CoCa
    pad_id: int | None = 0  # of a modern tower: None, unless it is given
    eos_id: int | None = 2  # of a modern tower: None, unless it is given
    no_causal_mask: bool = False
    final_ln_after_pool: bool = False  # no effect: the final norm handles each token separately
    # "first", "last", "argmax", "eos" or "none"; of a modern tower "eos" (also "argmax"), "last", "mean" or "map"
    pool_type: str = "argmax"
    proj_bias: bool = False
    proj_type: str = "linear"  # or "none"
    output_tokens: bool = False
    act_kwargs: dict | None = None
    norm_kwargs: dict | None = None

    block_type: str | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False

    hf_model_name: str | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: str = "mlp"
    hf_pooler_type: str = "mean_pooler"

    _: dataclasses.KW_ONLY  # fields of open_clip's main branch
    text_arch: str = "clip"  # or "modern", which has the fields below
    bos_id: int | None = None
    attention_mode: str = "causal"  # or "bidirectional"
    pos_embed: str = "rope"
    rope_temperature: float = 10000.0
    mlp_type: str = "swiglu"  # or "mlp", "relu2"
    norm_type: str | None = None  # "rmsnorm" (None) or "layernorm"
    norm_eps: float = 1e-6
    attn_gated: bool = False
    pre_norm: bool = False  # a norm before the first block
    norm_placement: str = "pre"  # or "sandwich"
    zero_init_residual: bool = False
    reg_tokens: int = 0
    value_residual: bool = False
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    gate_bias: bool | None = None  # None: attention_bias
    variable_text: bool = False  # train on batches that are padded to their longest caption
    tokenizer_type: str = ""  # or "tiktoken"
    tiktoken_name: str = "cl100k_base"  # the encoding, if tokenizer_type is "tiktoken"
    hf_model_config: dict | None = None  # values that replace those of the Hugging Face model's configuration


@dataclasses.dataclass
class MultimodalCfg(CLIPTextCfg):
    """The captioning decoder of CoCa."""

    mlp_ratio: float = 4.0
    dim_head: int = 64
    heads: int = 8
    n_queries: int = 256
    attn_pooler_heads: int = 8


def closest(name: str, known: Iterable[str], n: int = 3, cutoff: float = 0.5) -> list[str]:
    """List at most `n` names in `known` that are similar to `name`, best first, ignoring case.

    `cutoff` is the lowest similarity, from 0 to 1.
    """
    by_lower = {k.lower(): k for k in known}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=cutoff)]


def as_config(cls: type[ConfigT], cfg: ConfigT | Mapping[str, Any]) -> ConfigT:
    """Convert `cfg` to the dataclass `cls`.

    Raises:
        ValueError: `cfg` has an unknown key (the message names the most similar field), or is not a mapping.
    """
    if isinstance(cfg, cls):
        return cfg
    if not isinstance(cfg, Mapping):
        raise ValueError(f"{cls.__name__} is built from a mapping, got {type(cfg).__name__}.")
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = [key for key in cfg if key not in fields]
    if unknown:
        hints = [f"{key!r} ({_hint(key, fields)})" for key in unknown]
        raise ValueError(f"{cls.__name__} has no {', '.join(hints)}. This is probably a typo.")
    if cls is CLIPTextCfg and cfg.get("text_arch") == "modern":
        # The native tower's defaults are ids of CLIP's vocabulary. Another vocabulary has other ids there.
        cfg = {"pad_id": None, "eos_id": None, **cfg}
    return cls(**cfg)


def expect_defaults(cfg: Any, names: Collection[str], reason: str) -> None:
    """Raise ValueError if a field of the dataclass `cfg` in `names` has not its default. `reason` ends the message."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in names and value != field.default:
            raise ValueError(f"{field.name}={value!r} {reason}")


def _hint(key: str, fields: list[str]) -> str:
    near = closest(key, fields, n=1)
    return f"did you mean {near[0]!r}?" if near else "no field is similar"


# Registry

# JSON files, and folders of them. `rescan_model_configs` reads paths that are appended here.
MODEL_CONFIG_PATHS = [Path(__file__).parent / "model_configs"]
_REQUIRED = ("embed_dim", "vision_cfg", "text_cfg")
_registry: dict[str, dict[str, Any]] = {}
_registry_lock = threading.RLock()


def _natural_key(name: str) -> list[Any]:
    """Return a sort key that puts ViT-B-16 after ViT-B-8."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _read_configs(path: Path) -> dict[str, dict[str, Any]]:
    """Read the configurations in a JSON file or a folder, by name. Other JSON files in a folder are ignored."""
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    found = {}
    for file in files:
        cfg = read_json(file)
        if isinstance(cfg, dict) and all(key in cfg for key in _REQUIRED):
            found[file.stem] = cfg
        elif path.is_file():
            raise ValueError(f"{file} is not a model configuration: it needs the keys {', '.join(_REQUIRED)}.")
    return found


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: the file is damaged or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, or damaged: {error}.") from error


def _models() -> dict[str, dict[str, Any]]:
    """Return the registry itself, configurations by name. Setting an item registers a model, deleting one removes it.

    The first call reads the bundled files.
    """
    with _registry_lock:
        if not _registry:
            rescan_model_configs()
    return _registry


def rescan_model_configs() -> None:
    """Read MODEL_CONFIG_PATHS again and sort the names. Models that were registered in other ways are kept."""
    _register(*MODEL_CONFIG_PATHS)


def _register(*paths: str | Path) -> None:
    with _registry_lock:
        found = dict(_registry)
        for path in paths:
            found.update(_read_configs(Path(path)))
        # Update the dict in place: programs keep a reference to it, `open_clip.factory._MODEL_CONFIGS`.
        _registry.clear()
        _registry.update({name: found[name] for name in sorted(found, key=_natural_key)})


def list_models() -> list[str]:
    """List the names of the known architectures, in natural order."""
    return list(_models())


def add_model_config(path: str | Path | Iterable[str | Path]) -> None:
    """Register the configurations in JSON files or folders of JSON files.

    Args:
        path: one path or several.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file is not a model configuration.
    """
    added = [Path(entry) for entry in ([path] if isinstance(path, (str, Path)) else path)]
    for entry in added:
        if not entry.exists():
            raise FileNotFoundError(f"There is no model configuration at {entry}. Pass a JSON file or a folder.")
    _models()
    _register(*added)
    MODEL_CONFIG_PATHS.extend(added)


def get_model_config(model_name: str) -> dict[str, Any] | None:
    """Return a copy of the configuration of `model_name`, or None if the name is unknown.

    Raises:
        NotImplementedError: it is an audio or a generative model of open_clip's main branch.
    """
    cfg = _models().get(model_name)
    if cfg is None:
        aliases.check_model_of_main(model_name)
    return copy.deepcopy(cfg)


def parse_model_name(model_name: str | os.PathLike) -> tuple[str | None, str]:
    """Split a model name into (None, name), ("hf-hub", repository) or ("local-dir", folder).

    Raises:
        ValueError: nothing follows the prefix.
    """
    model_name = os.fspath(model_name)
    for prefix in (HF_HUB_PREFIX, LOCAL_DIR_PREFIX):
        if model_name.startswith(prefix):
            identifier = model_name[len(prefix) :]
            if not identifier:
                example = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
                raise ValueError(f"{model_name!r} names nothing after {prefix!r}. An example is {example!r}.")
            return prefix[:-1], identifier
    return None, model_name
