"""OpenAI's CLIP models, from the archives that OpenAI published: https://arxiv.org/abs/2103.00020,
github.com/openai/CLIP."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from . import aliases
from . import device as devices
from .checkpoint import check_precision, load_state_dict, no_initialisation, set_precision
from .constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from .model import build_model_from_openai_state_dict, get_cast_dtype, set_model_preprocess_cfg
from .pretrained import download_pretrained_from_url, get_pretrained_url, list_pretrained_models_by_tag
from .transform import PreprocessCfg

__all__ = ["list_openai_models", "load_openai_model"]

logger = logging.getLogger(__name__)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here


def list_openai_models() -> list[str]:
    """Names of the models with OpenAI's weights."""
    return list_pretrained_models_by_tag("openai")


def load_openai_model(
    name: str,
    precision: str | None = None,
    device: str | torch.device | None = None,
    cache_dir: str | None = None,
) -> nn.Module:
    """A CLIP with OpenAI's weights, in evaluation mode, with QuickGELU as they were trained.

    Args:
        name: one of `list_openai_models()` ("ViT-B/32" is "ViT-B-32"), or the path of an archive or of its state
            dict. The archive's program is never run: its weights go into this package's own model.
        precision: None for "fp32" on the CPU and "fp16" on accelerators; else as in `create_model`.
        device: None for the best one present.
        cache_dir: where the archive is downloaded to, `~/.cache/clip` by default.

    Raises:
        RuntimeError: the name is not known, or the download failed.
        ValueError: the file is not a checkpoint, or the precision is not known.
    """
    found = devices.resolve(device)  # raises where it is not there
    target = found if device in (None, "auto") else torch.device(device)  # "npu" stays the process's current one
    if precision is None:
        precision = "fp32" if devices.row(target).default_precision == "fp32" else "fp16"
    check_precision(precision)
    path = _find_archive(name, cache_dir)
    logger.info("Loading OpenAI's weights from %s as %s.", path, precision)
    with no_initialisation():
        model = build_model_from_openai_state_dict(load_state_dict(path), cast_dtype=get_cast_dtype(precision))
    set_precision(model, precision)
    size = model.visual.image_size
    cfg = PreprocessCfg(size=size, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)
    set_model_preprocess_cfg(model, vars(cfg))
    return model.to(target)


def _find_archive(name: str, cache_dir: str | None) -> str:
    url = get_pretrained_url(name.replace("/", "-"), "openai")
    if url:
        return download_pretrained_from_url(url, cache_dir)
    path = Path(name).expanduser()
    if path.is_file():
        return str(path)
    known = ", ".join(list_openai_models())
    raise RuntimeError(f"{name!r} is neither a model of OpenAI's nor a file. The models are: {known}.")
