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
from .constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, OPENAI_SIZES
from .convert.openai_sizes import infer_text_cfg, infer_vision_cfg
from .model import CLIP
from .model_inputs import set_model_preprocess_cfg
from .precision import check_precision, get_cast_dtype, low_precision_tensors, set_precision
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
        model = _build_around_weights(weights, cast_dtype=cast_dtype)
    set_precision(model, precision)
    size = model.visual.image_size
    cfg = PreprocessCfg(size=size, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)
    set_model_preprocess_cfg(model, vars(cfg))
    return model.to(target)


def build_model_from_openai_state_dict(
    state_dict: dict[str, torch.Tensor],
    quick_gelu: bool = True,
    cast_dtype: torch.dtype | None = torch.float16,
) -> CLIP:
    """Build a CLIP in evaluation mode from the weights of an OpenAI archive.

    The configuration is inferred from the shapes. The weights are copied, so training does not change `state_dict`.

    Args:
        state_dict: the archive's weights, with the keys of CLIP.
        quick_gelu: use QuickGELU, as OpenAI's models do, instead of GELU.
        cast_dtype: half precision dtype to which the weights are cast, or None.
    """
    copies = {key: value.detach().clone() for key, value in state_dict.items() if isinstance(value, torch.Tensor)}
    return _build_around_weights(copies, quick_gelu, cast_dtype)


def _build_around_weights(
    state_dict: dict[str, torch.Tensor],
    quick_gelu: bool = True,
    cast_dtype: torch.dtype | None = torch.float16,
) -> CLIP:
    """Do as `build_model_from_openai_state_dict`, but without copying tensors that already have the right dtype."""
    state_dict = {k: v for k, v in state_dict.items() if k not in OPENAI_SIZES}
    # On the meta device, because the archive has all weights.
    with torch.device("meta"):
        model = CLIP(
            embed_dim=state_dict["text_projection"].shape[1],
            vision_cfg=infer_vision_cfg(state_dict),
            text_cfg=infer_text_cfg(state_dict),
            quick_gelu=quick_gelu,
            cast_dtype=cast_dtype,
        )
    model.load_state_dict(state_dict, assign=True)
    # One parameter at a time, so that the whole model is never in memory twice.
    low_precision = {id(tensor) for tensor in low_precision_tensors(model)} if cast_dtype else set()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(cast_dtype if id(parameter) in low_precision else torch.float32)
    for buffer in model.buffers():  # running statistics of batch norms, and integer num_batches_tracked
        buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data
    return model.eval()


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
