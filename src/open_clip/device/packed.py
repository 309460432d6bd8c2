"""Block-diagonal attention over packed sequences, from operators that every device has.

`by_sequence` computes each sequence alone, without padding and copies. `in_buckets` sorts the sequences by length and
pads them in groups: faster for many short sequences, and where launches are expensive. Devices with a kernel for packed
sequences use that one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .segments import Segments

_COPY_COST = 6  # per number, of padding queries, keys and values and of removing the padding, forward and backward


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


class _Buckets(NamedTuple):
    """Sequences in groups that are padded to one length.

    Attributes:
        sizes, kv_sizes: (sequences, tokens) of each group, for queries and for keys.
        slots, kv_slots: int64 [T], the place of each packed token in the padded groups, one after another.
        masks: bool [sequences, 1, query tokens, key tokens] of each group, True at valid keys.
    """

    sizes: list[tuple[int, int]]
    kv_sizes: list[tuple[int, int]]
    slots: Tensor
    kv_slots: Tensor
    masks: list[Tensor]


def in_buckets(inputs: PackedInputs, launch_cost: int, attend: Attend = torch_attention) -> Tensor:
    """Compute packed attention with `attend` for groups of sequences, each padded to its longest.

    Args:
        inputs: as in `ops.packed_attention`.
        launch_cost: cost of one more group, see `Device.packed_launch_cost`.
        attend: computes attention of a group.
    """
    buckets = _buckets_of(inputs, launch_cost)
    queries = _pad(inputs.query, buckets.sizes, buckets.slots)
    keys, values = (_pad(x, buckets.kv_sizes, buckets.kv_slots) for x in (inputs.key, inputs.value))
    # Padding is at the end: causal attention hides it from all valid queries.
    masks = [None] * len(queries) if inputs.is_causal else buckets.masks
    outputs = [
        attend(query, key, value, mask, inputs.is_causal, inputs.scale).transpose(1, 2).flatten(0, 1)
        for query, key, value, mask in zip(queries, keys, values, masks, strict=True)
    ]
    return _SelectOnce.apply(torch.cat(outputs), buckets.slots)


def _pad(x: Tensor, sizes: list[tuple[int, int]], slots: Tensor) -> list[Tensor]:
    """Return the groups as views [sequences, heads, tokens, head_dim] of one padded tensor."""
    total = sum(count * tokens for count, tokens in sizes)
    return _split(x.new_zeros(total, *x.shape[1:]).index_copy(0, slots, x), sizes)


class _SelectOnce(torch.autograd.Function):
    """x.index_select(0, index) for an index without repetition, whose backward pass is a copy instead of a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.total = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient.new_zeros(ctx.total, *gradient.shape[1:]).index_copy_(0, ctx.saved_tensors[0], gradient), None


class Plan(NamedTuple):
    """Groups of sequences for `in_buckets`, and the costs of both forms in the unit of `Device.packed_launch_cost`.

    Attributes:
        groups: (number of sequences, query tokens, key tokens), from the longest sequences to the shortest.
        alone: cost of `by_sequence`.
        in_buckets: cost of `in_buckets`.
    """

    groups: list[tuple[int, int, int]]
    alone: int
    in_buckets: int


def make_plan(inputs: PackedInputs, launch_cost: int) -> Plan:
    """Group the sequences so that padding costs less than the launches that it saves."""
    channels = inputs.query.shape[1] * inputs.query.shape[2]
    return _make_plan(inputs.segments.lengths, inputs.kv_segments.lengths, channels, launch_cost)


@functools.lru_cache(maxsize=64)  # for the layers of a tower
def _make_plan(lengths: tuple[int, ...], kv_lengths: tuple[int, ...], channels: int, launch_cost: int) -> Plan:
    pairs = list(zip(lengths, kv_lengths, strict=True))
    runs = sum(1 for _ in itertools.groupby(pairs))
    groups = _cut(pairs, launch_cost // channels)
    padded = sum(count * queries * keys for count, queries, keys in groups)
    copied = _COPY_COST * (sum(lengths) + sum(kv_lengths))
    alone = runs * launch_cost + channels * sum(queries * keys for queries, keys in pairs)
    return Plan(groups, alone, len(groups) * launch_cost + channels * (padded + copied))


def _cut(pairs: list[tuple[int, int]], max_padding: int) -> list[tuple[int, int, int]]:
    """Return Plan.groups for sequences of (query tokens, key tokens), with at most `max_padding` scores per group."""
    groups: list[tuple[int, int, int]] = []
    count, num_queries, num_keys, computed = 0, 0, 0, 0
    for keys, queries in sorted(((keys, queries) for queries, keys in pairs), reverse=True):
        padding = (count + 1) * max(num_queries, queries) * num_keys - computed - queries * keys
        if count and padding > max_padding:
            groups.append((count, num_queries, num_keys))
            count, num_queries, computed = 0, 0, 0
        num_keys = num_keys if count else keys  # the first of a group has the most keys
        count, num_queries, computed = count + 1, max(num_queries, queries), computed + queries * keys
    return [*groups, (count, num_queries, num_keys)]


def _buckets_of(inputs: PackedInputs, launch_cost: int) -> _Buckets:
    """Return the groups, which all layers of a tower use. They are made on the device, without waiting for it."""
    plan = make_plan(inputs, launch_cost)
    layouts = inputs.kv_segments.layouts
    key = inputs.segments.lengths, tuple(plan.groups)
    if key not in layouts:
        with torch.inference_mode(False):
            layouts[key] = _make_buckets(inputs.segments, inputs.kv_segments, plan.groups)
    return layouts[key]


def _make_buckets(segments: Segments, kv_segments: Segments, groups: list[tuple[int, int, int]]) -> _Buckets:
    sizes, kv_sizes = [(count, tokens) for count, tokens, _ in groups], [(count, tokens) for count, _, tokens in groups]
    from_longest = kv_segments.by_length.flip(0)
    rank = from_longest.argsort()
    kv_lengths = kv_segments.offsets.diff().index_select(0, from_longest).split([count for count, *_ in groups])
    masks = [
        (torch.arange(keys, device=segments.device) < lengths[:, None])[:, None, None].expand(-1, 1, queries, -1)
        for (_, queries, keys), lengths in zip(groups, kv_lengths, strict=True)
    ]
    return _Buckets(sizes, kv_sizes, _slots(segments, rank, sizes), _slots(kv_segments, rank, kv_sizes), masks)


def _slots(segments: Segments, rank: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    """Return the place of each token in padded groups, for the rank of each sequence in the order of the groups."""
    starts, total = [], 0
    for count, tokens in sizes:
        starts.append(torch.arange(count, device=rank.device) * tokens + total)
        total += count * tokens
    return torch.cat(starts).index_select(0, rank).index_select(0, segments.sequence) + segments.position
