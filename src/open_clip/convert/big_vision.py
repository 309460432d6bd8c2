"""Conversion of weights in big_vision's layout, which JAX projects use: SigLIP and CLIPA.

SigLIP: https://arxiv.org/abs/2303.15343, github.com/google-research/big_vision.
CLIPA: https://arxiv.org/abs/2305.07017, github.com/UCSC-VLAA/CLIPA.

Arrays are named `params/img/...`, `params/txt/...`, `params/t` and `params/b`. Kernels have the shape [in, out], those
of attention [in, heads, head dim], those of convolutions [height, width, in, out]. The blocks of a tower are numbered
(`encoderblock_3`), or stacked in one array (`encoderblock`, first axis) if they were trained in a scan.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from ..utils import to_2tuple

StateDict = dict[str, torch.Tensor]

_MARK = "img/embedding/kernel"  # only big_vision image towers have this parameter, and all of them do

# Parts of a block: name in big_vision -> (name in native towers, name in timm)
_PARTS = {
    "LayerNorm_0": ("ln_1", "norm1"),
    "LayerNorm_1": ("ln_2", "norm2"),
    "MlpBlock_0/Dense_0": ("mlp.c_fc", "mlp.fc1"),
    "MlpBlock_0/Dense_1": ("mlp.c_proj", "mlp.fc2"),
    "MultiHeadDotProductAttention_0/out": ("attn.out_proj", "attn.proj"),
}
_QKV = ("attn.in_proj_", "attn.qkv.")


def is_big_vision(state_dict: StateDict) -> bool:
    """Whether the names are those of big_vision."""
    return any(key.endswith(_MARK) for key in state_dict)


def from_big_vision(model: Any, arrays: StateDict) -> StateDict:
    """Convert weights in big_vision's layout to that of CustomTextCLIP. Each tensor is copied and keeps its dtype.

    Args:
        model: a model with a native (CLIPA) or timm (SigLIP, also NaFlex) image tower and a native text tower.
        arrays: weights by name.

    Returns:
        Converted weights, and the other weights under their names in the file.
    """
    root = next(key for key in arrays if key.endswith(_MARK)).removesuffix(_MARK)
    weights = _Weights({key.removeprefix(root): value for key, value in arrays.items() if key.startswith(root)})
    if hasattr(model.visual, "trunk"):
        weights.convert_timm_image_tower(naflex=hasattr(model.visual.trunk, "embeds"))
    else:
        weights.convert_native_image_tower(model.visual)
    head = getattr(getattr(model, "text", model), "text_projection", None)
    weights.convert_text_tower(linear_head=isinstance(head, nn.Linear))
    weights.move("t", "logit_scale")
    weights.move("b", "logit_bias")
    unused = {key: value for key, value in weights.arrays.items() if key.startswith(("img/", "txt/"))}
    return weights.state_dict | unused


class _Weights:
    """The arrays that are not converted yet, and the state dict they are converted to."""

    def __init__(self, arrays: StateDict) -> None:
        self.arrays = dict(_unstack_blocks(arrays))
        self.state_dict: StateDict = {}

    def put(self, name: str, value: torch.Tensor) -> None:
        """Store a contiguous copy."""
        self.state_dict[name] = torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value)

    def move(self, theirs: str, ours: str) -> None:
        """Convert an array without change, except a leading axis of size 1, which is dropped. Skip a missing array."""
        if theirs in self.arrays:
            value = self.arrays.pop(theirs)
            self.put(ours, value.reshape(value.shape[1:]) if value.dim() and value.shape[0] == 1 else value)

    def linear(self, theirs: str, ours: str) -> None:
        """Convert the weight [out, in] and bias of a linear layer, or those of a norm. Skip missing ones."""
        if f"{theirs}/kernel" in self.arrays:
            kernel = self.arrays.pop(f"{theirs}/kernel")
            self.put(f"{ours}.weight", kernel.reshape(-1, kernel.shape[-1]).T)
        for suffix, name in (("scale", "weight"), ("bias", "bias")):
            if f"{theirs}/{suffix}" in self.arrays:
                self.put(f"{ours}.{name}", self.arrays.pop(f"{theirs}/{suffix}"))

    def fused(self, theirs: str, parts: tuple[str, ...], ours: str) -> None:
        """Concatenate projections of attention into `ours` + "weight" and `ours` + "bias"."""
        for suffix, name in (("kernel", "weight"), ("bias", "bias")):
            keys = [f"{theirs}/{part}/{suffix}" for part in parts]
            if all(key in self.arrays for key in keys):
                values = [self.arrays.pop(key) for key in keys]  # [in, heads, head dim], or [heads, head dim]
                values = [value.flatten(1).T if suffix == "kernel" else value.flatten() for value in values]
                self.state_dict[f"{ours}{name}"] = torch.cat(values)

    def blocks(self, theirs: str, ours: str, naming: int) -> None:
        """Convert the blocks of a tower. `naming` 0 selects our native names, 1 those of timm."""
        pattern = re.compile(rf"{re.escape(theirs)}/encoderblock_(\d+)/")
        for number in sorted({int(match[1]) for match in map(pattern.match, self.arrays) if match}):
            block, target = f"{theirs}/encoderblock_{number}", f"{ours}.{number}"
            attention = f"{block}/MultiHeadDotProductAttention_0"
            self.fused(attention, ("query", "key", "value"), f"{target}.{_QKV[naming]}")
            for part, names in _PARTS.items():
                self.linear(f"{block}/{part}", f"{target}.{names[naming]}")

    def convert_timm_image_tower(self, naflex: bool) -> None:
        trunk = "visual.trunk"
        if naflex:
            self.naflex_embedding(f"{trunk}.embeds")
        else:
            if self.arrays[_MARK].dim() == 4:  # not the linear layer of a NaFlex tower
                self.patch_embedding(f"{trunk}.patch_embed.proj")
            for theirs, ours in (("img/cls", "cls_token"), ("img/pos_embedding", "pos_embed")):
                if theirs in self.arrays:
                    self.put(f"{trunk}.{ours}", self.arrays.pop(theirs))
        self.blocks("img/Transformer", f"{trunk}.blocks", naming=1)
        self.linear("img/Transformer/encoder_norm", f"{trunk}.norm")
        self.attention_pool("img/MAPHead_0", f"{trunk}.attn_pool")
        self.linear("img/head", "visual.head.proj")

    def patch_embedding(self, ours: str) -> None:
        self.put(f"{ours}.weight", self.arrays.pop(_MARK).permute(3, 2, 0, 1))
        self.move("img/embedding/bias", f"{ours}.bias")

    def naflex_embedding(self, ours: str) -> None:
        """Convert the patch embedding and the positions, [rows, columns, width] or [1, places of a square, width].

        The inputs of a linear layer and of a flattened convolution are in the order (row, column, channel), as in timm.
        """
        self.linear("img/embedding", f"{ours}.proj")
        table = self.arrays.get("img/pos_embedding")
        if table is not None and table.shape[0] == 1:
            side = math.isqrt(table.shape[1])
            table = table.reshape(side, side, -1) if side * side == table.shape[1] else None
        if table is not None:
            self.put(f"{ours}.pos_embed", table[None])
            del self.arrays["img/pos_embedding"]

    def attention_pool(self, theirs: str, ours: str) -> None:
        """Convert attention pooling with one learned query (the "probe") to timm's."""
        if f"{theirs}/probe" in self.arrays:
            self.put(f"{ours}.latent", self.arrays.pop(f"{theirs}/probe"))
        attention = f"{theirs}/MultiHeadDotProductAttention_0"
        self.fused(attention, ("query",), f"{ours}.q.")
        self.fused(attention, ("key", "value"), f"{ours}.kv.")
        self.linear(f"{attention}/out", f"{ours}.proj")
        self.linear(f"{theirs}/LayerNorm_0", f"{ours}.norm")
        self.linear(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}.mlp.fc1")
        self.linear(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}.mlp.fc2")

    def convert_native_image_tower(self, visual: Any) -> None:
        """Convert to a native ViT, whose convolution has no bias and whose class token has a position.

        The bias and a zero position for the class token are added to the position embedding.
        """
        kernel = self.arrays.pop(_MARK)
        self.put("visual.conv1.weight", kernel.permute(3, 2, 0, 1))
        table = self.arrays.pop("img/pos_embedding", None)
        width = kernel.shape[-1]
        table = _sincos_2d(to_2tuple(visual.grid_size), width) if table is None else table[0]
        if math.isqrt(table.shape[0]) ** 2 == table.shape[0]:
            table = torch.cat([table.new_zeros(1, width), table])
        if "img/embedding/bias" in self.arrays:
            table = torch.cat([table[:1], table[1:] + self.arrays.pop("img/embedding/bias")])
        self.put("visual.positional_embedding", table)
        if "img/cls" in self.arrays:
            self.put("visual.class_embedding", self.arrays.pop("img/cls").flatten())
        self.blocks("img/Transformer", "visual.transformer.resblocks", naming=0)
        self.linear("img/Transformer/encoder_norm", "visual.ln_post")
        self.linear("img/encoder_norm", "visual.ln_post")  # in CLIPA the norm follows the pooling
        if "img/head/kernel" in self.arrays:
            self.put("visual.proj", self.arrays.pop("img/head/kernel"))

    def convert_text_tower(self, linear_head: bool) -> None:
        self.move("txt/Embed_0/embedding", "text.token_embedding.weight")
        self.move("txt/pos_embedding", "text.positional_embedding")
        for encoder in ("txt/Encoder_0", "txt/Transformer"):  # SigLIP, CLIPA
            self.blocks(encoder, "text.transformer.resblocks", naming=0)
        self.linear("txt/Encoder_0/encoder_norm", "text.ln_final")
        self.linear("txt/encoder_norm", "text.ln_final")
        if linear_head:
            self.linear("txt/head", "text.text_projection")
        elif "txt/head/kernel" in self.arrays:
            self.put("text.text_projection", self.arrays.pop("txt/head/kernel"))


def _unstack_blocks(arrays: StateDict) -> dict[str, torch.Tensor]:
    """Split arrays of stacked blocks into one array per block (views)."""
    found: StateDict = {}
    for key, value in arrays.items():
        if "/encoderblock/" in key:
            for number, block in enumerate(value):
                found[key.replace("/encoderblock/", f"/encoderblock_{number}/")] = block
        else:
            found[key] = value
    return found


def _sincos_2d(grid_size: tuple[int, int], channels: int) -> torch.Tensor:
    """Compute the fixed position embedding of MoCo v3 (https://arxiv.org/abs/2104.02057), which files omit.

    Returns:
        float32 [rows * columns, channels]: sines and cosines of the column, then of the row.
    """
    rows, columns = torch.meshgrid(*map(torch.arange, grid_size), indexing="ij")
    quarter = channels // 4
    frequencies = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / (quarter - 1))
    angles = [grid.flatten()[:, None] * frequencies for grid in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()
