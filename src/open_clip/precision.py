"""Names of precisions, the dtypes they stand for, and casting a model's weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .hf_model import HFTextEncoder
from .naflex import NaFlexTower
from .timm_model import TimmModel
from .transformer import VisionTransformer
from .transformer.attention import Attention, MultiheadAttention
from .transformer.decoder import MultimodalTransformer
from .transformer.text_encoder import TextEncoder

PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32")


def get_cast_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype to which weights are cast while norms stay float32, or None if `precision` casts no weights."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def get_input_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype that input images need, or None for float32."""
    return get_cast_dtype(precision.removeprefix("pure_"))


def check_precision(precision: str) -> None:
    """Raise ValueError if the precision is unknown."""
    if precision not in PRECISIONS:
        raise ValueError(f"Precision {precision!r} is unknown. Choose from {', '.join(PRECISIONS)}.")


def set_precision(model: nn.Module, precision: str) -> None:
    """Cast a model's weights in place. On the meta device this sets the dtypes that loading will cast to.

    "fp16" and "bf16" keep norms and embeddings in float32, "pure_fp16" and "pure_bf16" cast everything. With the other
    precisions the weights remain float32.
    """
    check_precision(precision)
    dtype = get_input_dtype(precision)
    if precision.startswith("pure_"):
        model.to(dtype)
    elif dtype is not None:
        convert_weights_to_lp(model, dtype)


def convert_weights_to_lp(model: nn.Module, dtype: torch.dtype = torch.float16) -> None:
    """Cast the weights of convolutions, linear layers and attention to half precision, in place.

    Norms, embeddings and layer scales keep their dtype. Towers of timm and transformers are cast as a whole.
    """
    for tensor in low_precision_tensors(model):
        tensor.data = tensor.data.to(dtype)


convert_weights_to_fp16 = convert_weights_to_lp


def low_precision_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the weights and biases of convolutions, linear layers, attention and the final projections.

    For towers of timm and transformers, yield all floating-point tensors: their layers need inputs in the weights'
    dtype.
    """
    for module in model.modules():
        if isinstance(module, (TimmModel, HFTextEncoder)):
            kept = {id(x) for x in module.rope_tensors()} if isinstance(module, NaFlexTower) else set()
            tensors = (*module.parameters(), *module.buffers())
            yield from (x for x in tensors if x.is_floating_point() and id(x) not in kept)
            continue
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            names = ["weight", "bias"]
        elif isinstance(module, (MultiheadAttention, Attention)):
            names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"]
        elif isinstance(module, (TextEncoder, MultimodalTransformer)):
            names = ["text_projection"]
        elif isinstance(module, VisionTransformer):
            names = ["proj"]
        else:
            continue
        for name in names:
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                yield parameter
