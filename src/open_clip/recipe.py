"""What a model is made of, read before any of it exists: configuration, preprocessing, and where weights are."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import closest, get_model_config, list_models, parse_model_name
from .constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from .pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg, nearest_tags
from .torchscript import is_torchscript

logger = logging.getLogger(__name__)

TAG_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")  # of a row of the registry of weights
FOLDER_WEIGHTS = (  # in order of preference
    HF_SAFE_WEIGHTS_NAME,
    HF_WEIGHTS_NAME,
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
)


@dataclasses.dataclass
class Recipe:
    """What a model is made of, before any of it exists."""

    name: str  # as in messages
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    fetch_weights: Callable[[], str] | None = None  # gives a file's path, downloading it if need be; None: no weights
    weights_name: str = ""  # as in messages
    quick_gelu: bool | None = None  # the activation that the weights were trained with; None where that is not known


def read_recipe(model_name: str, pretrained: str | None, cache_dir: str | None) -> Recipe:
    """The recipe that a model's name and `pretrained` (a tag, a path, or nothing) stand for."""
    schema, identifier = parse_model_name(model_name)
    if schema is None:
        recipe = _named_recipe(identifier.replace("/", "-"))
        tag_cfg = get_pretrained_cfg(recipe.name, pretrained) if pretrained else {}
        if tag_cfg:
            _use_tag(recipe, str(pretrained), tag_cfg, cache_dir)
            return recipe
    elif schema == "local-dir":
        recipe = _folder_recipe(model_name, Path(identifier).expanduser())
    else:
        recipe = _hub_recipe(model_name, identifier, cache_dir)
    if pretrained:
        _use_file(recipe, str(pretrained))
    return recipe


def _named_recipe(name: str) -> Recipe:
    model_cfg = get_model_config(name)
    if model_cfg is None:
        near = closest(name, list_models(), n=5)
        meant = f"Did you mean {', '.join(near)}?" if near else "open_clip.list_models() lists them."
        # RuntimeError, as open_clip raises: programs catch it.
        raise RuntimeError(
            f"There is no model {name!r}. {meant} Others are added with open_clip.add_model_config(PATH)."
        )
    return Recipe(name, model_cfg)


def _use_tag(recipe: Recipe, tag: str, tag_cfg: dict[str, Any], cache_dir: str | None) -> None:
    recipe.preprocess_cfg = {key: tag_cfg[key] for key in TAG_PREPROCESS_KEYS if key in tag_cfg}
    recipe.quick_gelu = bool(tag_cfg.get("quick_gelu", False))
    recipe.weights_name = f"the weights {tag!r}"
    recipe.fetch_weights = functools.partial(download_pretrained, tag_cfg, cache_dir=cache_dir)


def _use_file(recipe: Recipe, pretrained: str) -> None:
    path = Path(pretrained).expanduser()
    if not path.is_file():
        tags = nearest_tags(recipe.name, pretrained)
        known = f"Nearest tags: {', '.join(tags)}" if tags else "There are no weights published for it under a tag"
        raise RuntimeError(
            f"pretrained={pretrained!r} is neither a tag of {recipe.name}'s weights nor a file. {known}; "
            f"a path is taken from {os.getcwd()}."
        )
    recipe.weights_name = str(path)
    recipe.fetch_weights = lambda: str(path)
    # The file does not tell, unless it is OpenAI's own (all with QuickGELU) or has open_clip's name for such weights.
    recipe.quick_gelu = True if "quickgelu" in path.name.lower() or is_torchscript(path) else None


def _folder_recipe(model_name: str, folder: Path) -> Recipe:
    if not folder.is_dir():
        raise FileNotFoundError(f"{model_name!r}: there is no folder {folder}.")
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
    others = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    if len(others) > 1:
        raise ValueError(
            f"{folder} has several checkpoints, none with a usual name: {', '.join(path.name for path in others)}. "
            f"Say which one is meant: pretrained={str(others[0])!r}."
        )
    return others[0] if others else None


def _hub_recipe(model_name: str, identifier: str, cache_dir: str | None) -> Recipe:
    model_id, _, revision = identifier.partition("@")
    fetch = functools.partial(download_pretrained_from_hf, model_id, revision=revision or None, cache_dir=cache_dir)
    recipe = _recipe_from_config(model_name, Path(fetch(HF_CONFIG_NAME)))
    recipe.weights_name = f"the weights of {identifier}"
    recipe.fetch_weights = fetch
    return recipe


def _recipe_from_config(model_name: str, path: Path) -> Recipe:
    """The recipe in an `open_clip_config.json`: {"model_cfg": ..., "preprocess_cfg": ...}."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{model_name!r}: there is no {path.name} in {path.parent}, so nothing says what model it is."
        )
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(cfg, dict) or not isinstance(cfg.get("model_cfg"), dict):
        raise ValueError(f"{path} has no 'model_cfg', the configuration of a model.")
    return Recipe(model_name, cfg["model_cfg"], dict(cfg.get("preprocess_cfg") or {}))


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
    """Whether towers from other libraries start from those libraries' weights, where the whole model gets none."""
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
