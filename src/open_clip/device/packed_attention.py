"""Block-diagonal attention over packed sequences, from operators that every device has.

`by_sequence` computes each sequence alone: no padding at all, and one launch per length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .segments import Segments


class PackedInputs(NamedTuple):
    """The arguments of `ops.packed_attention`, which explains them."""

    query: Tensor
    key: Tensor
    value: Tensor
    segments: Segments
    kv_segments: Segments
    is_causal: bool = False
    scale: float | None = None


Attend = Callable[[Tensor, Tensor, Tensor, bool, "float | None"], Tensor]


def torch_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)


def by_sequence(inputs: PackedInputs, attend: Attend = torch_attention) -> Tensor:
    """Compute packed attention with one call of `attend` for neighbours of equal length.

    Args:
        inputs: as in `ops.packed_attention`.
        attend: computes attention for [batch, heads, tokens, head_dim].
    """
    pairs = zip(inputs.segments.lengths, inputs.kv_segments.lengths, strict=True)
    runs = [(sizes, sum(1 for _ in equal)) for sizes, equal in itertools.groupby(pairs)]
    queries = _split(inputs.query, [(count, tokens) for (tokens, _), count in runs])
    keys, values = (_split(x, [(count, tokens) for (_, tokens), count in runs]) for x in (inputs.key, inputs.value))
    outputs = [
        attend(query, key, value, inputs.is_causal, inputs.scale).transpose(1, 2).flatten(0, 1)
        for query, key, value in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0].contiguous()


def _split(x: Tensor, runs: list[tuple[int, int]]) -> list[Tensor]:
    """Split [T, heads, head_dim] into views [sequences, heads, tokens, head_dim], one for each (sequences, tokens)."""
    # The backward pass of split is one concatenation, that of slices would fill a tensor of all tokens for each.
    parts = x.split([count * tokens for count, tokens in runs]) if len(runs) > 1 else (x,)
    return [part.unflatten(0, run).transpose(1, 2) for part, run in zip(parts, runs, strict=True)]
