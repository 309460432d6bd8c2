"""Initialization of the modern text tower."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

STD = 0.02
_REGISTER_STD = 1e-6
# SwiGLU multiplies two halves, which makes its output smaller than that of one layer with an activation.
_SWIGLU_GAIN = 1.22


def init_weights(tower: Any) -> None:
    """Initialize a ModernTextTransformer as GPT-2, with normal distributions.

    The standard deviation is 0.02, divided by sqrt(2 * layers) for the last layers of attention and MLP and multiplied
    by 1.22 for the first layer of SwiGLU; it is 0.02 for all layers with sandwich norms. Biases are 0, those of gates
    1. The embedding of padding is 0. The projection has the standard deviation of CLIP, width ** -0.5.

    `zero_init_residual` starts every residual branch at 0: by its last layer, or the norm after it (sandwich).
    """
    nn.init.normal_(tower.token_embedding.weight, std=STD)
    with torch.no_grad():
        tower.token_embedding.weight[tower.pad_id].zero_()
    if tower.reg_tokens is not None:
        nn.init.normal_(tower.reg_tokens, std=_REGISTER_STD)
    for block in tower.blocks:
        _init_block(block, len(tower.blocks), tower.norm_placement == "sandwich", tower.zero_init_residual)
    for module in tower.pool.modules():
        if isinstance(module, nn.Linear):
            _init_linear(module, STD)
    if tower.text_projection is not None:
        _init_linear(tower.text_projection, tower.width**-0.5)


def _init_block(block: Any, layers: int, is_sandwich: bool, zero_init_residual: bool) -> None:
    mlp = block.mlp
    is_swiglu = hasattr(mlp, "w12")
    first, last = (mlp.w12, mlp.w3) if is_swiglu else (mlp.c_fc, mlp.c_proj)
    out_std = STD if is_sandwich else STD / math.sqrt(2 * layers)
    _init_linear(block.attn.qkv, STD)
    _init_linear(block.attn.proj, out_std)
    _init_linear(first, STD * _SWIGLU_GAIN if is_swiglu and not is_sandwich else STD)
    _init_linear(last, out_std)
    if block.attn.gate is not None:
        _init_linear(block.attn.gate, STD, bias=1.0)
    if zero_init_residual:
        ends = (block.norm1_post, block.norm2_post) if is_sandwich else (block.attn.proj, last)
        for module in ends:
            nn.init.zeros_(module.weight)


def _init_linear(layer: nn.Linear, std: float, bias: float = 0.0) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)
