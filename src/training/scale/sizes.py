"""The sizes of a model that memory and traffic depend on, from the model on the meta device."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from open_clip import factory
from training import compilation
from training.flops import training_flops
from training.scale import activations
from training.scale.activations import Activations


class Weight(NamedTuple):
    """The size of a parameter."""

    rows: int  # the first dimension, which FSDP divides; 1 for a scalar
    numel: int
    itemsize: int  # bytes per element
    trained: bool

    def padded(self, shards: int) -> int:
        """Return the elements that each of the ranks stores: FSDP divides the rows evenly and pads the last shards."""
        return -(-self.rows // shards) * (self.numel // self.rows)


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model.

    Attributes:
        units: parameters by the units that FSDP gathers at once: the root, then each block.
        buffers: bytes of all buffers.
        synchronized: bytes of the buffers that DDP broadcasts in each forward pass, those of BatchNorm.
        flops: of the forward and backward pass of a pair.
    """

    name: str
    embed_dim: int
    units: tuple[tuple[Weight, ...], ...]
    buffers: int
    synchronized: int
    flops: float
    activations: Activations

    @property
    def weights(self) -> list[Weight]:
        return [weight for unit in self.units for weight in unit]


def build(name: str, precision: str = "fp32", device: str = "meta", **options: Any) -> nn.Module:
    """Build a model in training mode, without pretrained weights or network, on the meta device also without memory.

    Args:
        options: further arguments of `open_clip.create_model`, such as init_logit_bias.
    """
    return factory.create_model(
        name,
        device=device,
        precision=precision,
        load_weights=False,
        pretrained_text=False,
        output_dict=True,
        **options,
    )


def measure(
    name: str, model: nn.Module, autocast: torch.dtype | None = None, checkpointing: bool = False
) -> ModelSizes:
    """Read the sizes of a model, and count its activations.

    Args:
        model: in training mode, with locked parts frozen.
        autocast: dtype of autocast, None without it.
        checkpointing: also count the activations with gradient checkpointing.

    Raises:
        NotImplementedError: a tower of the model cannot run without values.
    """
    counted = activations.count(model, autocast, checkpointing)
    return ModelSizes(
        name=name,
        embed_dim=counted.embed_dim,
        units=find_units(model),
        buffers=_buffer_bytes(model),
        synchronized=_buffer_bytes(model, ignored=getattr(model, "_ddp_params_and_buffers_to_ignore", ())),
        flops=training_flops(model),
        activations=counted,
    )


def _buffer_bytes(model: nn.Module, ignored: Collection[str] = ()) -> int:
    return sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name not in ignored)


def find_units(model: nn.Module) -> tuple[tuple[Weight, ...], ...]:
    """Return the parameters of the root and of each block. A shared parameter belongs to the first that has it."""
    blocks = compilation.find_blocks(model)
    seen: set[int] = set()
    units = [_take(block, seen) for block in blocks]
    return _take(model, seen), *units


def _take(module: nn.Module, seen: set[int]) -> tuple[Weight, ...]:
    new = [p for p in module.parameters() if id(p) not in seen]
    seen.update(map(id, new))
    return tuple(
        Weight(p.shape[0] if p.ndim else 1, math.prod(p.shape), p.element_size(), p.requires_grad) for p in new
    )
