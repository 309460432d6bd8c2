"""Recipes: all that is needed to build a model (configuration, preprocessing, source of weights)."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import HF_HUB_PREFIX, LOCAL_DIR_PREFIX, closest, get_model_config, list_models, parse_model_name, read_json
from .constants import (
    HF_CONFIG_NAME,
    HF_SAFE_WEIGHTS_NAME,
    HF_WEIGHTS_NAME,
    TRANSFORMERS_CONFIG_NAME,
    TRANSFORMERS_PREPROCESSOR_NAME,
    TRANSFORMERS_WEIGHTS_NAMES,
)
from .convert import model_cfg_from_transformers, preprocess_cfg_from_transformers
from .formats.sharded_folder import METADATA
from .formats.torchscript import is_torchscript
from .pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg, nearest_tags
from .utils import to_2tuple

logger = logging.getLogger(__name__)

TAG_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")  # of an entry in the registry of weights
FOLDER_WEIGHTS = (  # in order of preference
    HF_SAFE_WEIGHTS_NAME,
    HF_WEIGHTS_NAME,
    "open_clip_pytorch_model.pth",
    *TRANSFORMERS_WEIGHTS_NAMES,
)
# A CLIP of transformers with a vocabulary of this size uses the one that ships with this package.
CLIP_VOCABULARY = 49408
_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_REQUIRED_KEYS = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}

# Names that an untrusted configuration may contain: those of the hub and of timm, never local paths.
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_HUB_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_TIMM_NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)
_FILE_OPTIONS = ("pretrained", "checkpoint", "cache", "_")  # first letters of arguments of timm and transformers
_TOKENIZER_KWARGS = {"clean", "strip_sep_token", "language", "reduction_mask", "additional_special_tokens"}
_TOKENIZER_KWARGS |= {"add_bos", "add_eos", "padding_side"}


@dataclasses.dataclass
class Recipe:
    """Everything needed to build a model.

    Attributes:
        name: name of the model in messages.
        model_cfg: configuration of the model.
        preprocess_cfg: preprocessing of images.
        fetch_weights: returns the path of the weights, downloading them if needed. None: no weights.
        weights_name: name of the weights in messages.
        is_download: whether the weights are in a download cache, not in a file that the user named.
        quick_gelu: whether the weights were trained with QuickGELU. None: unknown.
    """

    name: str
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    fetch_weights: Callable[[], str] | None = None
    weights_name: str = ""
    is_download: bool = False
    quick_gelu: bool | None = None

    @property
    def has_pretrained_tower(self) -> bool:
        """Whether a tower starts from the weights of timm or Hugging Face, see `use_tower_defaults`."""
        vision_cfg, text_cfg = self.model_cfg["vision_cfg"], self.model_cfg["text_cfg"]
        is_timm = bool(vision_cfg.get("timm_model_name") and vision_cfg.get("timm_model_pretrained"))
        return is_timm or bool(text_cfg.get("hf_model_name") and text_cfg.get("hf_model_pretrained"))


def read_recipe(
    model_name: str | os.PathLike,
    pretrained: str | os.PathLike | None,
    cache_dir: str | os.PathLike | None,
) -> Recipe:
    """Read the recipe of a model from its name and `pretrained` (a tag, a path, or nothing)."""
    schema, identifier = parse_model_name(model_name)
    model_name, pretrained = os.fspath(model_name), _as_text(pretrained)
    if schema is None:
        recipe = _named_recipe(identifier)
        tag_cfg = get_pretrained_cfg(recipe.name, pretrained) if pretrained else {}
        if tag_cfg:
            _use_tag(recipe, str(pretrained), tag_cfg, cache_dir)
            return recipe
    elif schema == "local-dir":
        recipe = _folder_recipe(model_name, Path(identifier).expanduser())
    else:
        recipe = _hub_recipe(model_name, identifier, cache_dir)
    if pretrained:
        _use_file(recipe, pretrained)
    return recipe


def _as_text(pretrained: Any) -> str:
    """Return `pretrained` as a str; "" for None, False and other empty values, as in open_clip."""
    if not pretrained:
        return ""
    text = os.fspath(pretrained) if isinstance(pretrained, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise RuntimeError(
            f"pretrained={str(pretrained)[:60]} is a {type(pretrained).__name__}, not a tag ('openai') or the path of "
            "a file. open_clip.list_pretrained() lists the tags of each model."
        )
    return text


def _named_recipe(typed: str) -> Recipe:
    name = typed.replace("/", "-")
    model_cfg = get_model_config(name)
    if model_cfg is None:
        # RuntimeError as in open_clip, because programs catch it.
        raise RuntimeError(f"There is no model {typed!r}. {_hint_at_schema(typed) or _hint_at_names(name)}")
    return Recipe(name, model_cfg)


def _hint_at_names(name: str) -> str:
    near = closest(name, list_models(), n=5)
    meant = f"Did you mean {', '.join(near)}?" if near else "open_clip.list_models() lists them."
    return f"{meant} Add others with open_clip.add_model_config(PATH)."


def _hint_at_schema(typed: str) -> str:
    """Say what to type instead if `typed` is a folder, a file, a URL or a repository; else return ""."""
    path = Path(typed).expanduser()
    if path.is_dir():
        return f"It is a folder. Write {f'local-dir:{typed}'!r} if it contains {HF_CONFIG_NAME}."
    if path.is_file():
        return f"It is a file. Pass the name of the model, and pretrained={typed!r} for the weights."
    if "://" in typed or _HUB_REPOSITORY.fullmatch(typed.strip()):
        return _hint_at_repository(typed)
    return ""


def _hint_at_repository(typed: str) -> str:
    repository = "/".join(typed.strip().partition("://")[2].split("/")[1:3]) if "://" in typed else typed.strip()
    near = closest(typed.replace("/", "-"), list_models(), n=3)
    meant = f" Or did you mean {', '.join(near)}?" if near and "://" not in typed else ""
    if "/" not in repository:
        return "It is a URL. Download the file and pass its path as pretrained."
    return f"For a repository on the Hugging Face Hub, write {f'hf-hub:{repository}'!r}.{meant}"


def _use_tag(recipe: Recipe, tag: str, tag_cfg: dict[str, Any], cache_dir: str | os.PathLike | None) -> None:
    recipe.preprocess_cfg = {key: tag_cfg[key] for key in TAG_PREPROCESS_KEYS if key in tag_cfg}
    recipe.quick_gelu = bool(tag_cfg.get("quick_gelu", False))
    recipe.weights_name = f"the weights {tag!r}"
    recipe.is_download = True
    recipe.fetch_weights = functools.partial(download_pretrained, tag_cfg, cache_dir=cache_dir)


def _use_file(recipe: Recipe, pretrained: str) -> None:
    path = Path(pretrained).expanduser()
    if path.is_dir():
        raise RuntimeError(f"pretrained={pretrained!r} is a folder, not a file. {_hint_at_file(path)}")
    if pretrained.startswith((HF_HUB_PREFIX, LOCAL_DIR_PREFIX)):
        raise RuntimeError(
            f"pretrained={pretrained!r} is neither a tag nor a file. Pass it as the model name instead: "
            f"create_model({pretrained!r})."
        )
    if not path.is_file() and ("://" in pretrained or _HUB_REPOSITORY.fullmatch(pretrained.strip())):
        raise RuntimeError(
            f"pretrained={pretrained!r} is neither a tag of {recipe.name}'s weights nor a file in {os.getcwd()}. "
            f"{_hint_at_repository(pretrained)} Pass it as the model name, without pretrained."
        )
    if not path.is_file():
        tags = nearest_tags(recipe.name, pretrained)
        known = f"Nearest tags: {', '.join(tags)}." if tags else "No tags are known for this model."
        raise RuntimeError(
            f"pretrained={pretrained!r} is neither a tag of {recipe.name}'s weights nor a file. {known} "
            f"Paths are relative to {os.getcwd()}."
        )
    recipe.weights_name = str(path)
    recipe.is_download = False
    recipe.fetch_weights = lambda: str(path)
    # Known only for OpenAI's archives (all QuickGELU), for open_clip's file names of such weights, and for weights of
    # transformers with their configuration in the same folder.
    recipe.quick_gelu = True if "quickgelu" in path.name.lower() or is_torchscript(path) else None
    config = path.with_name(TRANSFORMERS_CONFIG_NAME)
    if path.name in TRANSFORMERS_WEIGHTS_NAMES and config.is_file():
        recipe.quick_gelu = model_cfg_from_transformers(_read_json(config), str(config)).get("quick_gelu", False)


def _hint_at_file(folder: Path) -> str:
    if (folder / HF_CONFIG_NAME).is_file() or (folder / TRANSFORMERS_CONFIG_NAME).is_file():
        return f"Pass the folder as the model name instead: create_model({f'local-dir:{folder}'!r})."
    if (folder / METADATA).is_file():
        return f"It is a sharded checkpoint. Make one file of it: python -m training.consolidate {folder} OUT.pt"
    found = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS_SUFFIXES)
    if found:
        return f"Pass the file in it: pretrained={str(found[0])!r}."
    return (
        f"Pass the file with the weights. A folder with {HF_CONFIG_NAME} is passed as the model name: "
        f"{f'local-dir:{folder}'!r}."
    )


def _folder_recipe(model_name: str, folder: Path) -> Recipe:
    if not folder.is_dir():
        stripped = model_name.partition(":")[2].strip()
        hint = f" Write {f'local-dir:{stripped}'!r}." if Path(stripped).expanduser().is_dir() else ""
        raise FileNotFoundError(f"{model_name!r}: the folder {str(folder)!r} does not exist.{hint}")
    config = folder / TRANSFORMERS_CONFIG_NAME
    if config.is_file() and not (folder / HF_CONFIG_NAME).is_file():
        preprocessor = folder / TRANSFORMERS_PREPROCESSOR_NAME
        recipe = _transformers_recipe(model_name, config, preprocessor if preprocessor.is_file() else None, str(folder))
    else:
        recipe = _recipe_from_config(model_name, folder / HF_CONFIG_NAME)
    weights = _find_weights(folder)
    if weights is not None:
        recipe.weights_name = str(weights)
        recipe.fetch_weights = lambda: str(weights)
    return recipe


def _find_weights(folder: Path) -> Path | None:
    """Find the checkpoint in a folder: a file with a usual name, else the only checkpoint.

    Raises:
        ValueError: several checkpoints have unusual names.
    """
    for name in FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS_SUFFIXES)
    if len(others) > 1:
        raise ValueError(
            f"{folder} has several checkpoints, none with a usual name: {', '.join(path.name for path in others)}. "
            f"Choose one, for example pretrained={str(others[0])!r}."
        )
    return others[0] if others else None


def _hub_recipe(model_name: str, identifier: str, cache_dir: str | os.PathLike | None) -> Recipe:
    _check_repository(model_name, identifier)
    model_id, at, revision = identifier.partition("@")
    if at and not revision:
        raise ValueError(f"{model_name!r} names nothing after '@'. Write a branch, a tag or a commit there.")
    fetch = functools.partial(download_pretrained_from_hf, model_id, revision=revision or None, cache_dir=cache_dir)
    try:
        recipe = _recipe_from_config(model_name, Path(fetch(HF_CONFIG_NAME)))
        recipe.fetch_weights = fetch
    except FileNotFoundError as error:
        config = _fetch_first(fetch, TRANSFORMERS_CONFIG_NAME)
        if config is None:
            raise error  # the one about open_clip's configuration
        preprocessor = _fetch_first(fetch, TRANSFORMERS_PREPROCESSOR_NAME)
        recipe = _transformers_recipe(model_name, config, preprocessor, model_id)
        recipe.fetch_weights = lambda: str(_fetch_first(fetch, *TRANSFORMERS_WEIGHTS_NAMES, required=True))
    check_untrusted(recipe.model_cfg, f"The configuration of {identifier}")
    recipe.weights_name = f"the weights of {identifier}"
    recipe.is_download = True
    return recipe


def _check_repository(model_name: str, identifier: str) -> None:
    """Raise ValueError if `identifier` is a URL, a folder, or has blanks around it, and say what to write instead."""
    stripped = identifier.strip()
    if "://" in stripped:
        hint = _hint_at_repository(stripped)
    elif stripped.startswith(("/", "~", ".")) or Path(stripped).expanduser().is_dir():
        hint = f"For a folder, write {f'local-dir:{stripped}'!r}."
    elif identifier != stripped:
        hint = f"Write {f'hf-hub:{stripped}'!r}, without blanks."
    else:
        return
    raise ValueError(f"{model_name!r} is not the name of a repository on the Hugging Face Hub. {hint}")


def _fetch_first(fetch: Callable[[str], str], *names: str, required: bool = False) -> Path | None:
    """Fetch the first of these files that a repository has. With `required`, raise the last error if it has none."""
    for number, name in enumerate(names, start=1):
        try:
            return Path(fetch(name))
        except FileNotFoundError:
            if required and number == len(names):
                raise
    return None


def _transformers_recipe(model_name: str, config: Path, preprocessor: Path | None, repository: str) -> Recipe:
    """Read the recipe of a transformers model. `repository` is a folder or the name of a repository on the hub."""
    model_cfg = model_cfg_from_transformers(_read_json(config), str(config))
    if model_cfg.get("custom_text") or model_cfg["text_cfg"]["vocab_size"] != CLIP_VOCABULARY:
        model_cfg["text_cfg"]["hf_tokenizer_name"] = repository
    preprocess_cfg = {}
    if preprocessor is not None:
        content = _read_json(preprocessor)
        preprocess_cfg = preprocess_cfg_from_transformers(content, str(preprocessor))
        if "image_seq_len" in model_cfg["vision_cfg"] and isinstance(content.get("max_num_patches"), int):
            model_cfg["vision_cfg"]["image_seq_len"] = content["max_num_patches"]
    return Recipe(model_name, model_cfg, preprocess_cfg)


def _read_json(path: Path) -> dict[str, Any]:
    cfg = read_json(path)
    return cfg if isinstance(cfg, dict) else {}


def _recipe_from_config(model_name: str, path: Path) -> Recipe:
    """Read the recipe in an `open_clip_config.json`: {"model_cfg": ...[, "preprocess_cfg": ...]}."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{model_name!r}: {path.parent} has no {path.name}, so the configuration of the model is unknown."
        )
    cfg = _read_json(path)
    model_cfg = cfg.get("model_cfg")
    if not isinstance(model_cfg, dict):
        raise ValueError(f"{path} has no 'model_cfg', the configuration of the model.")
    for key, kind in _REQUIRED_KEYS.items():
        if not isinstance(model_cfg.get(key), kind):
            found = repr(model_cfg[key]) if key in model_cfg else "none"
            raise ValueError(f"{path}: model_cfg needs {key!r} of type {kind.__name__}, got {found}.")
    preprocess_cfg = cfg.get("preprocess_cfg") or {}
    if not isinstance(preprocess_cfg, dict):
        raise ValueError(f"{path}: 'preprocess_cfg' must map names to values, got {str(preprocess_cfg)[:60]!r}.")
    return Recipe(model_name, model_cfg, preprocess_cfg)


def check_untrusted(model_cfg: dict[str, Any], source: str) -> None:
    """Raise ValueError if an untrusted configuration names local files or could run code.

    timm and transformers also accept paths and URLs as names of models, and arguments of a tokenizer can allow the code
    of a repository to run.
    """
    vision_cfg, text_cfg = model_cfg.get("vision_cfg") or {}, model_cfg.get("text_cfg") or {}
    decoder_cfg = model_cfg.get("multimodal_cfg") or {}
    for key, cfg, allowed in (
        ("timm_model_name", vision_cfg, _TIMM_NAME),
        *((key, cfg, _HUB_ID) for cfg in (text_cfg, decoder_cfg) for key in ("hf_model_name", "hf_tokenizer_name")),
    ):
        name = cfg.get(key)
        if name and not (isinstance(name, str) and allowed.fullmatch(name) and ".." not in name):
            raise ValueError(
                f"{source} has {key}={name!r}, which is not the plain name of a model. A configuration from the hub "
                "may not name a folder or a URL. If you trust it, download it and load it with local-dir:."
            )
    refused = sorted(set(text_cfg.get("tokenizer_kwargs") or ()) - _TOKENIZER_KWARGS)
    if refused:
        raise ValueError(
            f"{source} has tokenizer_kwargs {', '.join(map(repr, refused))}. A configuration from the hub may set "
            f"only {', '.join(sorted(_TOKENIZER_KWARGS))}."
        )
    for key, values in (("timm_model_kwargs", vision_cfg), ("hf_model_config", text_cfg)):
        _check_untrusted_options(values.get(key), key, source)


def _check_untrusted_options(options: Any, key: str, source: str) -> None:
    """Raise ValueError if arguments of a library's model name files or URLs, or are not plain values."""
    if options is None:
        return
    if not isinstance(options, dict):
        raise ValueError(f"{source} has {key}={str(options)[:60]!r}, which is not a mapping of names to values.")
    for name, value in options.items():
        if str(name).startswith(_FILE_OPTIONS) or not _is_plain(value):
            raise ValueError(
                f"{source} has {key} with {str(name)[:40]!r}: {str(value)[:60]!r}. A configuration from the hub may "
                "not name files, URLs or weights. If you trust it, download it and load it with local-dir:."
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, str) or re.fullmatch(r"\w*", value, re.ASCII) is not None


def apply_overrides(
    model_cfg: dict[str, Any],
    force_quick_gelu: bool,
    force_custom_text: bool,
    force_patch_dropout: float | None,
    force_image_size: int | tuple[int, int] | None,
    force_context_length: int | None,
    model_kwargs: dict[str, Any],
) -> None:
    """Apply the options of `create_model` to a configuration, in place."""
    if force_quick_gelu:
        model_cfg["quick_gelu"] = True
    if force_custom_text:
        model_cfg["custom_text"] = True
    if force_patch_dropout is not None:
        model_cfg["vision_cfg"]["patch_dropout"] = force_patch_dropout
    if force_image_size is not None:
        _set_image_size(model_cfg["vision_cfg"], force_image_size)
    if force_context_length is not None:
        model_cfg["text_cfg"]["context_length"] = force_context_length
        if "multimodal_cfg" in model_cfg:
            model_cfg["multimodal_cfg"]["context_length"] = force_context_length
    model_cfg.update(model_kwargs)


def _set_image_size(vision_cfg: dict[str, Any], image_size: int | tuple[int, int]) -> None:
    """Set the image size. The number of patches of a NaFlex tower grows with the number of pixels."""
    if vision_cfg.get("image_seq_len"):
        old, new = (math.prod(to_2tuple(size)) for size in (vision_cfg.get("image_size", 224), image_size))
        vision_cfg["image_seq_len"] = max(1, round(vision_cfg["image_seq_len"] * new / old))
    vision_cfg["image_size"] = image_size


def use_tower_defaults(model_cfg: dict[str, Any], pretrained_image: bool, pretrained_text: bool) -> None:
    """Set whether timm and Hugging Face towers start from the weights of those libraries."""
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if vision_cfg.get("timm_model_name"):
        vision_cfg["timm_model_pretrained"] = pretrained_image
    elif pretrained_image:
        logger.warning(
            "pretrained_image has no effect: the image tower is not from timm. "
            "To load a file, use pretrained_image_path."
        )
    if text_cfg.get("hf_model_name"):
        text_cfg["hf_model_pretrained"] = pretrained_text


def check_quick_gelu(recipe: Recipe) -> None:
    """Warn if the model is built with another activation than the weights: it would run, with wrong features."""
    built_with = bool(recipe.model_cfg.get("quick_gelu", False))
    if recipe.quick_gelu is None or recipe.quick_gelu == built_with:
        return
    if recipe.quick_gelu:
        names = [f"the model {name}" for name in (f"{recipe.name}-quickgelu",) if name in list_models()]
        fix = f"Use {' or '.join([*names, 'force_quick_gelu=True'])}."
    else:
        fix = "Use the model whose name does not end in -quickgelu, without force_quick_gelu."
    message = (
        f"QuickGELU mismatch: {recipe.weights_name} were trained with quick_gelu={recipe.quick_gelu}, and "
        f"{recipe.name} is built with quick_gelu={built_with}. Its features will be wrong. {fix}"
    )
    logger.warning(message)  # for the log of a run
    warnings.warn(message, stacklevel=3)  # as in open_clip: programs filter it or turn it into an error
