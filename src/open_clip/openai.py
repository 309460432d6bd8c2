"""OpenAI's CLIP models, loaded from the archives that OpenAI published.

Paper: https://arxiv.org/abs/2103.00020. Code: github.com/openai/CLIP.
"""

from __future__ import annotations

import logging
import os

import torch
from torch import nn

from . import aliases
from . import device as devices
from .checkpoint.files import read_state_dict
from .checkpoint.key_prefixes import drop_extras
from .checkpoint.meta import NoInitialization
from .constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from .model import build_model_around_openai_weights
from .model_inputs import set_model_preprocess_cfg
from .precision import check_precision, get_cast_dtype, set_precision
from .pretrained import (
    download_pretrained_from_url,
    get_pretrained_url,
    is_unchanging,
    list_pretrained_models_by_tag,
)
from .transform import PreprocessCfg

__all__ = ["list_openai_models", "load_openai_model"]

logger = logging.getLogger(__name__)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

# The sizes of the model are read from these parameters.
_SIZE_KEYS = ("visual.conv1.weight", "positional_embedding", "text_projection", "token_embedding.weight")


def list_openai_models() -> list[str]:
    """List the names of the models with OpenAI's weights."""
    return list_pretrained_models_by_tag("openai")


def load_openai_model(
    name: str | os.PathLike,
    precision: str | None = None,
    device: str | int | torch.device | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> nn.Module:
    """Load a CLIP model with OpenAI's weights, in evaluation mode, with QuickGELU (as it was trained).

    Args:
        name: one of `list_openai_models()` ("ViT-B/32" is "ViT-B-32"), or the path of an archive or of its state
            dict. The archive's program is never run: its weights are loaded into a model of this package.
        precision: see `create_model`. None: "fp32" on the CPU, "fp16" on accelerators.
        device: None for the best device present.
        cache_dir: folder for downloads, `~/.cache/clip` by default.

    Raises:
        RuntimeError: the name is unknown, or the download failed.
        ValueError: the file is not a checkpoint, or the precision is unknown.
    """
    target = devices.as_asked(device)
    if precision is None:
        precision = "fp32" if devices.get(target).default_precision == "fp32" else "fp16"
    check_precision(precision)
    path, is_mapped = _find_archive(os.fspath(name), cache_dir)
    logger.info("Loading OpenAI's weights from %s as %s.", path, precision)
    weights = _read_weights(path, is_mapped)
    cast_dtype = get_cast_dtype(precision)
    if cast_dtype is None:
        for key, value in weights.items():  # one at a time, so that only one weight is in memory in both dtypes
            weights[key] = value.float() if value.is_floating_point() else value
    with NoInitialization():
        model = build_model_around_openai_weights(weights, cast_dtype=cast_dtype)
    set_precision(model, precision)
    size = model.visual.image_size
    cfg = PreprocessCfg(size=size, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)
    set_model_preprocess_cfg(model, vars(cfg))
    return model.to(target)


def _read_weights(path: str, is_mapped: bool) -> dict[str, torch.Tensor]:
    weights = drop_extras(read_state_dict(path, is_mapped), ())
    missing = [key for key in _SIZE_KEYS if key not in weights]
    if missing:
        raise ValueError(
            f"{path} does not have the weights of an OpenAI CLIP. Missing: {', '.join(missing)}. "
            "For other models, use create_model(NAME, pretrained=PATH)."
        )
    return weights


def _find_archive(name: str, cache_dir: str | os.PathLike | None) -> tuple[str, bool]:
    """Return (path, whether it is a download that may be memory-mapped)."""
    url = get_pretrained_url(name.replace("/", "-"), "openai")
    if url:
        path = download_pretrained_from_url(url, cache_dir)
        return path, is_unchanging(path)
    if os.path.isfile(os.path.expanduser(name)):
        return os.path.expanduser(name), False
    known = ", ".join(list_openai_models())
    raise RuntimeError(f"{name!r} is neither an OpenAI model nor a file. The models are: {known}.")
