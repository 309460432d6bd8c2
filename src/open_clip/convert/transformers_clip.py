"""Conversion of state dicts between our models and transformers' CLIP, SigLIP and SigLIP 2, in both directions.

Both directions read one table. An entry maps tensors of transformers ("theirs") to our tensors: transformers separates
queries, keys and values, and transposes projections. Our names are those of CLIP, with the text tower at the top level.
SigLIP 2 with a fixed resolution is a `SiglipModel`, and with native resolution (NaFlex) a `Siglip2Model`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import torch

StateDict = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Entry:
    """The same values in both layouts: their tensors, concatenated, equal our tensors, concatenated.

    Attributes:
        theirs: names in transformers.
        ours: names in our models.
        ours_shares: how the rows are divided among our tensors.
        transposed: whether our tensor is the transpose.
        axes: number of axes of their tensor and of ours, if leading axes of size 1 differ.
        grid: whether their rows [N, width] are a square grid, which is [1, rows, columns, width] in ours.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    ours_shares: tuple[int, ...] = (1,)
    transposed: bool = False
    axes: tuple[int, int] | None = None
    grid: bool = False

    def to_ours(self, tensors: list[torch.Tensor]) -> StateDict:
        return _split(self._joined(tensors, side=1), self.ours, self.ours_shares)

    def to_theirs(self, tensors: list[torch.Tensor]) -> StateDict:
        return _split(self._joined(tensors, side=0), self.theirs, (1,) * len(self.theirs))

    def _joined(self, tensors: list[torch.Tensor], side: int) -> torch.Tensor:
        value = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if self.axes:
            surplus = value.dim() - self.axes[side]
            value = value.reshape(value.shape[surplus:] if surplus > 0 else (1,) * -surplus + tuple(value.shape))
        if self.grid:
            value = _to_grid(value) if side == 1 else _to_rows(value)
        return value.T.contiguous() if self.transposed else value


def _to_grid(table: torch.Tensor) -> torch.Tensor:
    rows, width = table.shape
    side = math.isqrt(rows)
    if side * side != rows:
        raise ValueError(f"A table of {rows} position embeddings is not a square grid, which SigLIP 2 needs.")
    return table.reshape(1, side, side, width)


def _to_rows(grid: torch.Tensor) -> torch.Tensor:
    _, rows, columns, width = grid.shape
    if rows != columns:
        raise ValueError(f"The position embeddings are a grid of {rows} x {columns}. transformers needs a square.")
    return grid.reshape(rows * columns, width)


def _split(value: torch.Tensor, names: tuple[str, ...], shares: tuple[int, ...]) -> StateDict:
    """Split the rows of a tensor among names (views)."""
    if len(names) == 1:
        return {names[0]: value}
    rows = value.shape[0] // sum(shares)
    return dict(zip(names, value.split([rows * share for share in shares]), strict=True))


# Table of parameters

# Parts of a block: (name in transformers, in our native towers, in timm)
_PARTS = (
    ("layer_norm1", "ln_1", "norm1"),
    ("layer_norm2", "ln_2", "norm2"),
    ("self_attn.out_proj", "attn.out_proj", "attn.proj"),
    ("mlp.fc1", "mlp.c_fc", "mlp.fc1"),
    ("mlp.fc2", "mlp.c_proj", "mlp.fc2"),
)
_QKV = ("attn.in_proj_", "attn.qkv.")


def _layer(theirs: str, ours: str) -> Iterator[Entry]:
    """Yield the entries of a linear layer or a norm."""
    for name in ("weight", "bias"):
        yield Entry((f"{theirs}.{name}",), (f"{ours}.{name}",))


def _blocks(count: int, theirs: str, ours: str, timm: bool = False) -> Iterator[Entry]:
    for number in range(count):
        block, target = f"{theirs}.encoder.layers.{number}", f"{ours}.{number}"
        for name in ("weight", "bias"):
            qkv = tuple(f"{block}.self_attn.{part}_proj.{name}" for part in "qkv")
            yield Entry(qkv, (f"{target}.{_QKV[timm]}{name}",))
        for part, native_name, timm_name in _PARTS:
            yield from _layer(f"{block}.{part}", f"{target}.{timm_name if timm else native_name}")


def _text(layers: int) -> Iterator[Entry]:
    yield Entry(("text_model.embeddings.token_embedding.weight",), ("token_embedding.weight",))
    yield Entry(("text_model.embeddings.position_embedding.weight",), ("positional_embedding",))
    yield from _blocks(layers, "text_model", "transformer.resblocks")
    yield from _layer("text_model.final_layer_norm", "ln_final")


def clip_entries(text_layers: int, vision_layers: int) -> Iterator[Entry]:
    """Yield the entries of `CLIPModel` and our native towers."""
    yield Entry(("logit_scale",), ("logit_scale",), axes=(0, 0))
    yield from _text(text_layers)
    yield Entry(("text_projection.weight",), ("text_projection",), transposed=True)
    yield Entry(("vision_model.embeddings.class_embedding",), ("visual.class_embedding",))
    yield Entry(("vision_model.embeddings.patch_embedding.weight",), ("visual.conv1.weight",))
    yield Entry(("vision_model.embeddings.position_embedding.weight",), ("visual.positional_embedding",))
    yield from _layer("vision_model.pre_layrnorm", "visual.ln_pre")  # transformers spells it so
    yield from _blocks(vision_layers, "vision_model", "visual.transformer.resblocks")
    yield from _layer("vision_model.post_layernorm", "visual.ln_post")
    yield Entry(("visual_projection.weight",), ("visual.proj",), transposed=True)


def siglip_entries(text_layers: int, vision_layers: int, naflex: bool = False) -> Iterator[Entry]:
    """Yield the entries of `SiglipModel` (`naflex`: `Siglip2Model`) and our native text tower with timm's image tower.

    Both NaFlex towers embed patches by a linear layer whose inputs are in the order (row, column, channel).
    """
    for name in ("logit_scale", "logit_bias"):
        yield Entry((name,), (name,), axes=(1, 0))
    yield from _text(text_layers)
    yield from _layer("text_model.head", "text_projection")
    embeddings, trunk = "vision_model.embeddings", "visual.trunk"
    positions = (f"{embeddings}.position_embedding.weight",)
    if naflex:
        yield from _layer(f"{embeddings}.patch_embedding", f"{trunk}.embeds.proj")
        yield Entry(positions, (f"{trunk}.embeds.pos_embed",), grid=True)
    else:
        yield from _layer(f"{embeddings}.patch_embedding", f"{trunk}.patch_embed.proj")
        yield Entry(positions, (f"{trunk}.pos_embed",), axes=(2, 3))
    yield from _blocks(vision_layers, "vision_model", f"{trunk}.blocks", timm=True)
    yield from _layer("vision_model.post_layernorm", f"{trunk}.norm")
    head, pool = "vision_model.head", f"{trunk}.attn_pool"
    yield Entry((f"{head}.probe",), (f"{pool}.latent",))
    for name in ("weight", "bias"):
        yield Entry((f"{head}.attention.in_proj_{name}",), (f"{pool}.q.{name}", f"{pool}.kv.{name}"), (1, 2))
    for theirs, ours in (("attention.out_proj", "proj"), ("layernorm", "norm"), ("mlp.fc1",) * 2, ("mlp.fc2",) * 2):
        yield from _layer(f"{head}.{theirs}", f"{pool}.{ours}")


# State dicts


def is_transformers(state_dict: StateDict) -> bool:
    """Whether the names are those of transformers' CLIP or SigLIP, or of one of its towers."""
    return any(key.startswith(("vision_model.", "text_model.")) for key in state_dict)


def is_siglip(state_dict: StateDict) -> bool:
    """Whether a state dict of transformers is a SigLIP, not a CLIP."""
    return any(key.startswith(("vision_model.head.", "text_model.head.")) for key in state_dict)


def _entries(siglip: bool, naflex: bool) -> Callable[[int, int], Iterator[Entry]]:
    return functools.partial(siglip_entries, naflex=naflex) if siglip else clip_entries


def _count_layers(state_dict: StateDict, pattern: str) -> int:
    numbers = [int(match[1]) for match in (re.match(pattern, key) for key in state_dict) if match]
    return max(numbers, default=-1) + 1


def from_transformers(state_dict: StateDict) -> StateDict:
    """Convert weights of a model of transformers or one of its towers to our layout. Unknown names are kept.

    The models are `CLIPModel`, `SiglipModel` and `Siglip2Model`.
    """
    patches = state_dict.get("vision_model.embeddings.patch_embedding.weight")
    entries = _entries(is_siglip(state_dict), naflex=patches is not None and patches.dim() == 2)
    layers = [_count_layers(state_dict, rf"{tower}_model\.encoder\.layers\.(\d+)\.") for tower in ("text", "vision")]
    left = dict(state_dict)
    converted: StateDict = {}
    for entry in entries(*layers):
        if all(name in left for name in entry.theirs):
            converted |= entry.to_ours([left.pop(name) for name in entry.theirs])
    return converted | left


def to_transformers(state_dict: StateDict, siglip: bool) -> StateDict:
    """Convert our weights to those of `CLIPModel` or, with `siglip`, of `SiglipModel` or for NaFlex `Siglip2Model`.

    Raises:
        ValueError: a parameter of one side has no counterpart.
    """
    naflex = "visual.trunk.embeds.proj.weight" in state_dict
    entries = _entries(siglip, naflex)
    theirs = ("Siglip2Model" if naflex else "SiglipModel") if siglip else "CLIPModel"
    name = f"transformers' {theirs}"
    tower = r"visual\.trunk\.blocks" if siglip else r"visual\.transformer\.resblocks"
    layers = [_count_layers(state_dict, rf"{blocks}\.(\d+)\.") for blocks in (r"transformer\.resblocks", tower)]
    left = dict(state_dict)
    converted: StateDict = {}
    for entry in entries(*layers):
        missing = [key for key in entry.ours if key not in left]
        if missing:
            raise ValueError(f"{name} needs {', '.join(missing)}, which this model does not have.")
        converted |= entry.to_theirs([left.pop(key) for key in entry.ours])
    if left:
        raise ValueError(f"{name} has no counterpart of {', '.join(list(left)[:4])} in this model.")
    return converted
