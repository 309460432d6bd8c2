"""Functions and values of open_clip 3.3 that this package does not need, for programs that import them.

`aliases` makes them available where open_clip 3.3 has them (`open_clip.transformer._expand_token`). Each behaves as it
does there.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import numbers
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import config, pretrained, recipe
from .constants import (
    HF_CONFIG_NAME,
    HF_SAFE_WEIGHTS_NAME,
    HF_WEIGHTS_NAME,
    IMAGENET_MEAN,
    IMAGENET_STD,
    INCEPTION_MEAN,
    INCEPTION_STD,
    OPENAI_DATASET_MEAN,
    OPENAI_DATASET_STD,
)
from .precision import set_precision
from .pretrained.registry import read_registry

logger = logging.getLogger(__name__)

has_distributed = torch.distributed.is_available()
hvd = None  # horovod is not supported
_nltk_init = False  # nltk is initialized at each use
_has_transformers = True  # for coca_model, where it means that `generate` works; here that needs no transformers
_has_hf_hub = pretrained.has_hf_hub()
_has_safetensors = importlib.util.find_spec("safetensors") is not None

# Factory

_MODEL_CONFIGS = config._models()
_MODEL_CONFIG_PATHS = config.MODEL_CONFIG_PATHS


def _get_hf_config(model_id: str, cache_dir: str | None = None) -> dict[str, Any]:
    """Download and read a hub repository's `open_clip_config.json`."""
    path = pretrained.download_pretrained_from_hf(model_id, HF_CONFIG_NAME, cache_dir=cache_dir)
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _find_checkpoint_in_dir(dir_path: Path) -> str | None:
    """Return the path of the weights in a folder: a file with a usual name, else the first file of weights, or None."""
    for name in recipe.FOLDER_WEIGHTS:
        if (dir_path / name).is_file():
            return str(dir_path / name)
    others = sorted(path for suffix in (".safetensors", ".bin", ".pth") for path in dir_path.glob(f"*{suffix}"))
    if len(others) > 1:
        logger.warning("%s has several checkpoints. Using %s.", dir_path, others[0].name)
    return str(others[0]) if others else None


def _set_model_device_and_precision(
    model: nn.Module, device: torch.device, precision: str, is_timm_model: bool = False
) -> None:
    """Move a model to a device and cast its weights in place. `is_timm_model` has no effect."""
    set_precision(model, precision)
    model.to(device)


# Models and towers


def _expand_token(token: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Expand a class token to [batch, 1, width], without copying."""
    return token.view(1, 1, -1).expand(batch_size, -1, -1)


def _token_to_tensor(token_id: int | Iterable[int] | torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """Convert an id or several ids to a tensor. A tensor is returned unchanged."""
    if isinstance(token_id, torch.Tensor):
        return token_id
    return torch.tensor([token_id] if isinstance(token_id, int) else list(token_id), device=device)


def _out_indices_as_tuple(x: int | Iterable[int]) -> tuple[int, ...]:
    """Convert an int n to the indices of the last n layers, (-n, ..., -1), and other indices to a tuple."""
    return tuple(range(-x, 0)) if isinstance(x, int) else tuple(x)


def _camel2snake(s: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", s).lower()


# Published weights

_PRETRAINED = read_registry()
_PRETRAINED_quickgelu = {name: tags for name, tags in _PRETRAINED.items() if name.endswith("-quickgelu")}
quick_gelu_tags: dict[str, Any] = {}
_RN50 = _PRETRAINED["RN50"]
_RN101 = _PRETRAINED["RN101"]
_RN50x4 = _PRETRAINED["RN50x4"]
_RN50x16 = _PRETRAINED["RN50x16"]
_RN50x64 = _PRETRAINED["RN50x64"]
_VITB32 = _PRETRAINED["ViT-B-32"]
_VITB32_256 = _PRETRAINED["ViT-B-32-256"]
_VITB16 = _PRETRAINED["ViT-B-16"]
_VITB16_PLUS_240 = _PRETRAINED["ViT-B-16-plus-240"]
_VITL14 = _PRETRAINED["ViT-L-14"]
_VITL14_336 = _PRETRAINED["ViT-L-14-336"]
_VITH14 = _PRETRAINED["ViT-H-14"]
_VITH14_378 = _PRETRAINED["ViT-H-14-378"]
_VITg14 = _PRETRAINED["ViT-g-14"]
_VITbigG14 = _PRETRAINED["ViT-bigG-14"]
_coca_VITB32 = _PRETRAINED["coca_ViT-B-32"]
_coca_VITL14 = _PRETRAINED["coca_ViT-L-14"]
_robertaViTB32 = _PRETRAINED["roberta-ViT-B-32"]
_xlmRobertaBaseViTB32 = _PRETRAINED["xlm-roberta-base-ViT-B-32"]
_xlmRobertaLargeFrozenViTH14 = _PRETRAINED["xlm-roberta-large-ViT-H-14"]
_convnext_base = _PRETRAINED["convnext_base"]
_convnext_base_w = _PRETRAINED["convnext_base_w"]
_convnext_base_w_320 = _PRETRAINED["convnext_base_w_320"]
_convnext_large_d = _PRETRAINED["convnext_large_d"]
_convnext_large_d_320 = _PRETRAINED["convnext_large_d_320"]
_convnext_xxlarge = _PRETRAINED["convnext_xxlarge"]


def _entry(url: str, hf_hub: str, preprocess: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("mean", "std", "interpolation", "resize_mode")
    return {"url": url, "hf_hub": hf_hub, **dict(zip(names, preprocess, strict=True)), **kwargs}


def _pcfg(url: str = "", hf_hub: str = "", **kwargs: Any) -> dict[str, Any]:
    """Create an entry of `_PRETRAINED` with OpenAI's preprocessing."""
    return _entry(url, hf_hub, (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, "bicubic", "shortest"), kwargs)


def _slpcfg(url: str = "", hf_hub: str = "", **kwargs: Any) -> dict[str, Any]:
    """Create an entry with SigLIP's preprocessing."""
    return _entry(url, hf_hub, (INCEPTION_MEAN, INCEPTION_STD, "bicubic", "squash"), kwargs)


def _apcfg(url: str = "", hf_hub: str = "", **kwargs: Any) -> dict[str, Any]:
    """Create an entry with CLIPA's preprocessing."""
    return _entry(url, hf_hub, (IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash"), kwargs)


def _mccfg(url: str = "", hf_hub: str = "", **kwargs: Any) -> dict[str, Any]:
    """Create an entry with MobileCLIP's preprocessing."""
    return _entry(url, hf_hub, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", "shortest"), kwargs)


def _mc2cfg(url: str = "", hf_hub: str = "", **kwargs: Any) -> dict[str, Any]:
    """Create an entry with MobileCLIP2's preprocessing."""
    return _entry(url, hf_hub, (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, "bilinear", "shortest"), kwargs)


def _pecfg(url: str = "", hf_hub: str = "", **kwargs: Any) -> dict[str, Any]:
    """Create an entry with the Perception Encoder's preprocessing."""
    return _entry(url, hf_hub, (INCEPTION_MEAN, INCEPTION_STD, "bilinear", "squash"), kwargs)


def _get_safe_alternatives(filename: str) -> Iterator[str]:
    """Yield file names that the same weights may have as safetensors."""
    if filename == HF_WEIGHTS_NAME:
        yield HF_SAFE_WEIGHTS_NAME
    elif filename.endswith((".bin", ".pth")):
        yield filename.rpartition(".")[0] + ".safetensors"


# Preprocessing


def _convert_to_rgb(image: Any) -> Any:
    return image.convert("RGB")


def _setup_size(size: Any, error_msg: str) -> Any:
    """Convert a number or a sequence of one number to a pair; return a sequence of two unchanged (as in torchvision).

    Raises:
        ValueError: the sequence has another length. The message is `error_msg`.
    """
    if isinstance(size, numbers.Number):
        return int(size), int(size)  # type: ignore[call-overload]
    if isinstance(size, Sequence) and len(size) == 1:
        return size[0], size[0]
    if len(size) != 2:
        raise ValueError(error_msg)
    return size
