"""Block-diagonal attention over packed sequences, from operators that every device has.

`by_sequence` computes each sequence alone, without padding: the fastest form on CPUs, where a launch costs little.
`in_buckets` sorts the sequences by length and pads them in a few groups, for devices on which a launch is expensive.
Devices with a kernel for packed sequences use that one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .segments import Segments

_BUCKETS = 4


class PackedInputs(NamedTuple):
    """The arguments of `ops.packed_attention`, which explains them."""

    query: Tensor
    key: Tensor
    value: Tensor
    segments: Segments
    kv_segments: Segments
    is_causal: bool = False
    scale: float | None = None


# Computes attention for query, key, value [batch, heads, tokens, head_dim], a bool mask, is_causal and scale.
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", bool, "float | None"], Tensor]


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)


def by_sequence(inputs: PackedInputs, attend: Attend = torch_attention) -> Tensor:
    """Compute packed attention with one call of `attend` per sequence, or for neighbours of equal length."""
    pairs = zip(inputs.segments.lengths, inputs.kv_segments.lengths, strict=True)
    runs = [(tokens, len(list(equal))) for tokens, equal in itertools.groupby(pairs)]
    queries = _split(inputs.query, [(count, tokens) for (tokens, _), count in runs])
    keys, values = (_split(x, [(count, tokens) for (_, tokens), count in runs]) for x in (inputs.key, inputs.value))
    outputs = [
        attend(query, key, value, None, inputs.is_causal, inputs.scale).transpose(1, 2).flatten(0, 1)
        for query, key, value in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _split(x: Tensor, runs: list[tuple[int, int]]) -> list[Tensor]:
    """Split [T, heads, head_dim] into views [sequences, heads, tokens, head_dim], one for each (sequences, tokens)."""
    # The backward pass of split is one concatenation. That of slices would fill a tensor of all tokens for each.
    parts = x.split([count * tokens for count, tokens in runs]) if len(runs) > 1 else (x,)
    return [part.unflatten(0, run).transpose(1, 2) for part, run in zip(parts, runs, strict=True)]


class _Bucket(NamedTuple):
    """Sequences that are padded to one length.

    Attributes:
        queries, keys: int64 [sequences, tokens], the number of each token in the packed tensor. Padding repeats others.
        mask: bool [sequences, 1, query tokens, key tokens], True at valid keys.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor


def in_buckets(inputs: PackedInputs, attend: Attend = torch_attention) -> Tensor:
    """Compute packed attention with `attend` for a few groups of sequences, each padded to its longest."""
    buckets, slots = _buckets_of(inputs.segments, inputs.kv_segments)
    outputs = []
    for bucket in buckets:
        query = _gather(inputs.query, bucket.queries)
        key, value = _gather(inputs.key, bucket.keys), _gather(inputs.value, bucket.keys)
        # Padding is at the end: causal attention hides it from all valid queries.
        mask = None if inputs.is_causal else bucket.mask
        output = attend(query, key, value, mask, inputs.is_causal, inputs.scale)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, slots)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens of a bucket as [sequences, heads, tokens, head_dim]."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _buckets_of(segments: Segments, kv_segments: Segments) -> tuple[list[_Bucket], Tensor]:
    """Return the buckets, and int64 [T], where the output of each token is in the concatenated outputs of the buckets.

    All layers of a tower use the same ones. They are computed on the device, without waiting for it.
    """
    if segments.lengths not in kv_segments.layouts:
        with torch.inference_mode(False):
            kv_segments.layouts[segments.lengths] = _make_buckets(segments, kv_segments)
    return kv_segments.layouts[segments.lengths]


def _make_buckets(segments: Segments, kv_segments: Segments) -> tuple[list[_Bucket], Tensor]:
    lengths = sorted(zip(kv_segments.lengths, segments.lengths, strict=True))
    size = -(-len(lengths) // _BUCKETS)
    device = segments.device
    kv_lengths = kv_segments.offsets.diff()
    buckets, starts, total = [], [], 0
    for start in range(0, len(lengths), size):
        part = lengths[start : start + size]
        number = kv_segments.by_length[start : start + size]
        num_keys, num_queries = part[-1][0], max(tokens for _, tokens in part)
        valid = torch.arange(num_keys, device=device) < kv_lengths[number][:, None]
        mask = valid[:, None, None, :].expand(-1, 1, num_queries, -1)
        buckets.append(_Bucket(_tokens(segments, number, num_queries), _tokens(kv_segments, number, num_keys), mask))
        starts.append(torch.arange(len(part), device=device) * num_queries + total)
        total += len(part) * num_queries
    start_of = torch.cat(starts).index_select(0, kv_segments.by_length.argsort())
    return buckets, start_of.index_select(0, segments.sequence) + segments.position


def _tokens(segments: Segments, number: Tensor, length: int) -> Tensor:
    """Return the packed positions of the first `length` tokens of the sequences `number`, [sequences, length]."""
    first = segments.offsets.index_select(0, number).long()
    return (first[:, None] + torch.arange(length, device=first.device)).clamp_(max=segments.total - 1)
