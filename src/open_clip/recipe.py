"""What a model is made of, read before any of it exists: configuration, preprocessing, and where weights are."""

from __future__ import annotations

import dataclasses
import functools
import logging
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
from .pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg, nearest_tags
from .torchscript import is_torchscript

logger = logging.getLogger(__name__)

TAG_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")  # of a row of the registry of weights
FOLDER_WEIGHTS = (  # in order of preference
    HF_SAFE_WEIGHTS_NAME,
    HF_WEIGHTS_NAME,
    "open_clip_pytorch_model.pth",
    *TRANSFORMERS_WEIGHTS_NAMES,
)
CLIP_VOCABULARY = 49408  # entries; transformers' CLIP with as many has the vocabulary that ships with this package
_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_REQUIRED_KEYS = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}

# What a configuration that somebody else wrote may name: things on the hub and in timm, not on this machine.
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_HUB_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_TIMM_NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)
_TOKENIZER_KWARGS = {"clean", "strip_sep_token", "language", "reduction_mask", "additional_special_tokens"}


@dataclasses.dataclass
class Recipe:
    """What a model is made of, before any of it exists."""

    name: str  # as in messages
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    fetch_weights: Callable[[], str] | None = None  # gives a file's path, downloading it if need be; None: no weights
    weights_name: str = ""  # as in messages
    is_download: bool = False  # whether the file of the weights is in a cache, not one that the user named
    quick_gelu: bool | None = None  # the activation that the weights were trained with; None where that is not known


def read_recipe(
    model_name: str | os.PathLike,
    pretrained: str | os.PathLike | None,
    cache_dir: str | os.PathLike | None,
) -> Recipe:
    """The recipe that a model's name and `pretrained` (a tag, a path, or nothing) stand for."""
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
    """`pretrained` as a tag or a path; "" for None, False and other empty values, as in open_clip."""
    if not pretrained:
        return ""
    text = os.fspath(pretrained) if isinstance(pretrained, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise RuntimeError(
            f"pretrained={str(pretrained)[:60]} is a {type(pretrained).__name__}, and a tag ('openai') or the path of "
            "a file is expected. open_clip.list_pretrained() lists the tags of each model."
        )
    return text


def _named_recipe(typed: str) -> Recipe:
    name = typed.replace("/", "-")
    model_cfg = get_model_config(name)
    if model_cfg is None:
        # RuntimeError, as open_clip raises: programs catch it.
        raise RuntimeError(f"There is no model {typed!r}. {_hint_at_schema(typed) or _hint_at_names(name)}")
    return Recipe(name, model_cfg)


def _hint_at_names(name: str) -> str:
    near = closest(name, list_models(), n=5)
    meant = f"Did you mean {', '.join(near)}?" if near else "open_clip.list_models() lists them."
    return f"{meant} Others are added with open_clip.add_model_config(PATH)."


def _hint_at_schema(typed: str) -> str:
    """What to type instead, if `typed` is a folder, a file, an address or a repository's name; else ""."""
    path = Path(typed).expanduser()
    if path.is_dir():
        return f"It is a folder: write {f'local-dir:{typed}'!r} if {HF_CONFIG_NAME} is in it."
    if path.is_file():
        return f"It is a file: give the model's name, and pretrained={typed!r} for the weights."
    if "://" in typed or _HUB_REPOSITORY.fullmatch(typed.strip()):
        return _hint_at_repository(typed)
    return ""


def _hint_at_repository(typed: str) -> str:
    repository = "/".join(typed.strip().partition("://")[2].split("/")[1:3]) if "://" in typed else typed.strip()
    near = closest(typed.replace("/", "-"), list_models(), n=3)
    meant = f" Or did you mean {', '.join(near)}?" if near and "://" not in typed else ""
    if "/" not in repository:
        return "It is an address: download the file, and give its path as pretrained."
    return f"A repository on Hugging Face's hub is written {f'hf-hub:{repository}'!r}.{meant}"


def _use_tag(recipe: Recipe, tag: str, tag_cfg: dict[str, Any], cache_dir: str | os.PathLike | None) -> None:
    recipe.preprocess_cfg = {key: tag_cfg[key] for key in TAG_PREPROCESS_KEYS if key in tag_cfg}
    recipe.quick_gelu = bool(tag_cfg.get("quick_gelu", False))
    recipe.weights_name = f"the weights {tag!r}"
    recipe.is_download = True
    recipe.fetch_weights = functools.partial(download_pretrained, tag_cfg, cache_dir=cache_dir)


def _use_file(recipe: Recipe, pretrained: str) -> None:
    path = Path(pretrained).expanduser()
    if path.is_dir():
        raise RuntimeError(f"pretrained={pretrained!r} is a folder, and a file is expected. {_hint_at_file(path)}")
    if pretrained.startswith((HF_HUB_PREFIX, LOCAL_DIR_PREFIX)):
        raise RuntimeError(
            f"pretrained={pretrained!r} is neither a tag nor a file. Give it as the model's name instead: "
            f"create_model({pretrained!r})."
        )
    if not path.is_file() and ("://" in pretrained or _HUB_REPOSITORY.fullmatch(pretrained.strip())):
        raise RuntimeError(
            f"pretrained={pretrained!r} is neither a tag of {recipe.name}'s weights nor a file in {os.getcwd()}. "
            f"{_hint_at_repository(pretrained)} That is the model's name, without pretrained."
        )
    if not path.is_file():
        tags = nearest_tags(recipe.name, pretrained)
        known = f"Nearest tags: {', '.join(tags)}" if tags else "There are no weights published for it under a tag"
        raise RuntimeError(
            f"pretrained={pretrained!r} is neither a tag of {recipe.name}'s weights nor a file. {known}; "
            f"a path is taken from {os.getcwd()}."
        )
    recipe.weights_name = str(path)
    recipe.is_download = False
    recipe.fetch_weights = lambda: str(path)
    # The file does not tell, unless it is OpenAI's own (all with QuickGELU) or has open_clip's name for such weights.
    # The configuration of transformers beside its weights does tell.
    recipe.quick_gelu = True if "quickgelu" in path.name.lower() or is_torchscript(path) else None
    config = path.with_name(TRANSFORMERS_CONFIG_NAME)
    if path.name in TRANSFORMERS_WEIGHTS_NAMES and config.is_file():
        recipe.quick_gelu = model_cfg_from_transformers(_read_json(config), str(config)).get("quick_gelu", False)


def _hint_at_file(folder: Path) -> str:
    if (folder / HF_CONFIG_NAME).is_file() or (folder / TRANSFORMERS_CONFIG_NAME).is_file():
        return f"Give the folder as the model's name instead: create_model({f'local-dir:{folder}'!r})."
    found = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS_SUFFIXES)
    if found:
        return f"Name the file in it: pretrained={str(found[0])!r}."
    return (
        f"Name the file of the weights. A folder with {HF_CONFIG_NAME} would be the model's name, "
        f"{f'local-dir:{folder}'!r}."
    )


def _folder_recipe(model_name: str, folder: Path) -> Recipe:
    if not folder.is_dir():
        stripped = model_name.partition(":")[2].strip()
        hint = f" Write {f'local-dir:{stripped}'!r}." if Path(stripped).expanduser().is_dir() else ""
        raise FileNotFoundError(f"{model_name!r}: there is no folder {str(folder)!r}.{hint}")
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
    """The checkpoint in a folder: one of the usual names, else the only one there is.

    Raises:
        ValueError: there are several to choose from.
    """
    for name in FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS_SUFFIXES)
    if len(others) > 1:
        raise ValueError(
            f"{folder} has several checkpoints, none with a usual name: {', '.join(path.name for path in others)}. "
            f"Say which one is meant: pretrained={str(others[0])!r}."
        )
    return others[0] if others else None


def _hub_recipe(model_name: str, identifier: str, cache_dir: str | os.PathLike | None) -> Recipe:
    _check_repository(model_name, identifier)
    model_id, at, revision = identifier.partition("@")
    if at and not revision:
        raise ValueError(f"{model_name!r} names nothing after '@': a branch, a tag or a commit is expected there.")
    fetch = functools.partial(download_pretrained_from_hf, model_id, revision=revision or None, cache_dir=cache_dir)
    try:
        recipe = _recipe_from_config(model_name, Path(fetch(HF_CONFIG_NAME)))
        recipe.fetch_weights = fetch
    except FileNotFoundError as error:
        config = _fetch_first(fetch, TRANSFORMERS_CONFIG_NAME)
        if config is None:
            raise error  # about open_clip's own configuration, with the reason
        preprocessor = _fetch_first(fetch, TRANSFORMERS_PREPROCESSOR_NAME)
        recipe = _transformers_recipe(model_name, config, preprocessor, model_id)
        recipe.fetch_weights = lambda: str(_fetch_first(fetch, *TRANSFORMERS_WEIGHTS_NAMES, required=True))
    check_untrusted(recipe.model_cfg, f"The configuration of {identifier}")
    recipe.weights_name = f"the weights of {identifier}"
    recipe.is_download = True
    return recipe


def _check_repository(model_name: str, identifier: str) -> None:
    """Raise ValueError, with what to type instead, for what looks like something else than a repository's name."""
    stripped = identifier.strip()
    if "://" in stripped:
        hint = _hint_at_repository(stripped)
    elif stripped.startswith(("/", "~", ".")) or Path(stripped).expanduser().is_dir():
        hint = f"A folder is written {f'local-dir:{stripped}'!r}."
    elif identifier != stripped:
        hint = f"Write {f'hf-hub:{stripped}'!r}, without blanks."
    else:
        return
    raise ValueError(f"{model_name!r} is not the name of a repository on Hugging Face's hub. {hint}")


def _fetch_first(fetch: Callable[[str], str], *names: str, required: bool = False) -> Path | None:
    """The first of these files that a repository has; with `required`, that it has none is the last one's error."""
    for number, name in enumerate(names, start=1):
        try:
            return Path(fetch(name))
        except FileNotFoundError:
            if required and number == len(names):
                raise
    return None


def _transformers_recipe(model_name: str, config: Path, preprocessor: Path | None, repository: str) -> Recipe:
    """The recipe of a repository of transformers, a folder or the name of one on the hub."""
    model_cfg = model_cfg_from_transformers(_read_json(config), str(config))
    if model_cfg.get("custom_text") or model_cfg["text_cfg"]["vocab_size"] != CLIP_VOCABULARY:
        model_cfg["text_cfg"]["hf_tokenizer_name"] = repository
    preprocess_cfg = {}
    if preprocessor is not None:
        preprocess_cfg = preprocess_cfg_from_transformers(_read_json(preprocessor), str(preprocessor))
    return Recipe(model_name, model_cfg, preprocess_cfg)


def _read_json(path: Path) -> dict[str, Any]:
    cfg = read_json(path)
    return cfg if isinstance(cfg, dict) else {}


def _recipe_from_config(model_name: str, path: Path) -> Recipe:
    """The recipe in an `open_clip_config.json`: {"model_cfg": ...[, "preprocess_cfg": ...]}."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{model_name!r}: there is no {path.name} in {path.parent}, so nothing says what model it is."
        )
    cfg = _read_json(path)
    model_cfg = cfg.get("model_cfg")
    if not isinstance(model_cfg, dict):
        raise ValueError(f"{path} has no 'model_cfg', the configuration of a model.")
    for key, kind in _REQUIRED_KEYS.items():
        if not isinstance(model_cfg.get(key), kind):
            found = repr(model_cfg[key]) if key in model_cfg else "none"
            raise ValueError(f"{path}: model_cfg needs {key!r}, of type {kind.__name__}; it has {found}.")
    preprocess_cfg = cfg.get("preprocess_cfg") or {}
    if not isinstance(preprocess_cfg, dict):
        raise ValueError(f"{path}: 'preprocess_cfg' is {preprocess_cfg!r} and must map names to values.")
    return Recipe(model_name, model_cfg, preprocess_cfg)


def check_untrusted(model_cfg: dict[str, Any], source: str) -> None:
    """Raise ValueError if a configuration from elsewhere reaches for files of this machine, or for running code.

    timm's and transformers' names of models may also be paths and addresses, and arguments of a tokenizer may let the
    code of a repository run.
    """
    vision_cfg, text_cfg = model_cfg.get("vision_cfg") or {}, model_cfg.get("text_cfg") or {}
    decoder_cfg = model_cfg.get("multimodal_cfg") or {}
    for key, cfg, allowed in (
        ("timm_model_name", vision_cfg, _TIMM_NAME),
        *(
            (key, cfg, _HUB_ID)
            for cfg in (text_cfg, decoder_cfg)
            for key in ("hf_model_name", "hf_tokenizer_name")
        ),
    ):
        name = cfg.get(key)
        if name and not (isinstance(name, str) and allowed.fullmatch(name) and ".." not in name):
            raise ValueError(
                f"{source} has {key}={name!r}, which is not the plain name of a model. What comes from the hub may "
                "not point to a folder or an address. If you trust it, download it and load it with local-dir:."
            )
    refused = sorted(set(text_cfg.get("tokenizer_kwargs") or ()) - _TOKENIZER_KWARGS)
    if refused:
        raise ValueError(
            f"{source} has tokenizer_kwargs {', '.join(map(repr, refused))}. What comes from the hub may set "
            f"only {', '.join(sorted(_TOKENIZER_KWARGS))}."
        )


def override(
    model_cfg: dict[str, Any],
    force_quick_gelu: bool,
    force_custom_text: bool,
    force_patch_dropout: float | None,
    force_image_size: int | tuple[int, int] | None,
    force_context_length: int | None,
    model_kwargs: dict[str, Any],
) -> None:
    """Change a configuration in place by what `create_model` was asked for."""
    if force_quick_gelu:
        model_cfg["quick_gelu"] = True
    if force_custom_text:
        model_cfg["custom_text"] = True
    if force_patch_dropout is not None:
        model_cfg["vision_cfg"]["patch_dropout"] = force_patch_dropout
    if force_image_size is not None:
        model_cfg["vision_cfg"]["image_size"] = force_image_size
    if force_context_length is not None:
        model_cfg["text_cfg"]["context_length"] = force_context_length
        if "multimodal_cfg" in model_cfg:
            model_cfg["multimodal_cfg"]["context_length"] = force_context_length
    model_cfg.update(model_kwargs)


def use_tower_defaults(model_cfg: dict[str, Any], pretrained_image: bool, pretrained_text: bool) -> None:
    """Whether towers from other libraries start from those libraries' weights: only where nothing else fills them."""
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if vision_cfg.get("timm_model_name"):
        vision_cfg["timm_model_pretrained"] = pretrained_image
    elif pretrained_image:
        logger.warning(
            "pretrained_image has no effect: this image tower is not timm's. A file is pretrained_image_path=."
        )
    if text_cfg.get("hf_model_name"):
        text_cfg["hf_model_pretrained"] = pretrained_text


def check_quick_gelu(recipe: Recipe) -> None:
    """Say that weights and model disagree on the activation: everything would run, and every feature be wrong."""
    built_with = bool(recipe.model_cfg.get("quick_gelu", False))
    if recipe.quick_gelu is None or recipe.quick_gelu == built_with:
        return
    if recipe.quick_gelu:
        names = [f"the model {name}" for name in (f"{recipe.name}-quickgelu",) if name in list_models()]
        mend = f"Use {' or '.join([*names, 'force_quick_gelu=True'])}."
    else:
        mend = "Leave out force_quick_gelu, and use the model whose name has no -quickgelu."
    message = (
        f"QuickGELU mismatch: {recipe.weights_name} were trained with quick_gelu={recipe.quick_gelu}, and "
        f"{recipe.name} is built with quick_gelu={built_with}. Its features will be wrong. {mend}"
    )
    logger.warning(message)  # for the log of a run
    warnings.warn(message, stacklevel=3)  # as open_clip does: programs filter it, or make it an error
