"""Conversion of state dicts between our models and transformers' `CLIPModel` and `SiglipModel`, in both directions.

Both directions read one table. An entry maps tensors of transformers ("theirs") to our tensors: transformers separates
queries, keys and values, and transposes projections. Our names are those of CLIP, with the text tower at the top level.
SigLIP 2 with a fixed resolution is a `SiglipModel` too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

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
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    ours_shares: tuple[int, ...] = (1,)
    transposed: bool = False
    axes: tuple[int, int] | None = None

    def to_ours(self, tensors: list[torch.Tensor]) -> StateDict:
        return _split(self._joined(tensors, side=1), self.ours, self.ours_shares)

    def to_theirs(self, tensors: list[torch.Tensor]) -> StateDict:
        return _split(self._joined(tensors, side=0), self.theirs, (1,) * len(self.theirs))

    def _joined(self, tensors: list[torch.Tensor], side: int) -> torch.Tensor:
        value = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if self.axes:
            surplus = value.dim() - self.axes[side]
            value = value.reshape(value.shape[surplus:] if surplus > 0 else (1,) * -surplus + tuple(value.shape))
        return value.T.contiguous() if self.transposed else value


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


def siglip_entries(text_layers: int, vision_layers: int) -> Iterator[Entry]:
    """Yield the entries of `SiglipModel` and our native text tower with timm's image tower."""
    for name in ("logit_scale", "logit_bias"):
        yield Entry((name,), (name,), axes=(1, 0))
    yield from _text(text_layers)
    yield from _layer("text_model.head", "text_projection")
    embeddings, trunk = "vision_model.embeddings", "visual.trunk"
    yield from _layer(f"{embeddings}.patch_embedding", f"{trunk}.patch_embed.proj")
    yield Entry((f"{embeddings}.position_embedding.weight",), (f"{trunk}.pos_embed",), axes=(2, 3))
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


def _count_layers(state_dict: StateDict, pattern: str) -> int:
    numbers = [int(match[1]) for match in (re.match(pattern, key) for key in state_dict) if match]
    return max(numbers, default=-1) + 1


def from_transformers(state_dict: StateDict) -> StateDict:
    """Convert weights of `CLIPModel`, `SiglipModel` or one of their towers to our layout. Unknown names are kept."""
    entries = siglip_entries if is_siglip(state_dict) else clip_entries
    layers = [_count_layers(state_dict, rf"{tower}_model\.encoder\.layers\.(\d+)\.") for tower in ("text", "vision")]
    left = dict(state_dict)
    converted: StateDict = {}
    for entry in entries(*layers):
        if all(name in left for name in entry.theirs):
            converted |= entry.to_ours([left.pop(name) for name in entry.theirs])
    return converted | left


def to_transformers(state_dict: StateDict, siglip: bool) -> StateDict:
    """Convert our weights to those of `CLIPModel` or, with `siglip`, of `SiglipModel`.

    Raises:
        ValueError: a parameter of one side has no counterpart.
    """
    entries = siglip_entries if siglip else clip_entries
    tower = r"visual\.trunk\.blocks" if siglip else r"visual\.transformer\.resblocks"
    layers = [_count_layers(state_dict, rf"{blocks}\.(\d+)\.") for blocks in (r"transformer\.resblocks", tower)]
    left = dict(state_dict)
    converted: StateDict = {}
    for entry in entries(*layers):
        missing = [name for name in entry.ours if name not in left]
        if missing:
            raise ValueError(f"{_NAMES[siglip]} needs {', '.join(missing)}, which this model does not have.")
        converted |= entry.to_theirs([left.pop(name) for name in entry.ours])
    if left:
        raise ValueError(f"{_NAMES[siglip]} has no counterpart of {', '.join(list(left)[:4])} in this model.")
    return converted


_NAMES = ("transformers' CLIPModel", "transformers' SiglipModel")
