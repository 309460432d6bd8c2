"""Sequences of different lengths, packed one after another in one tensor without padding.

A batch of images or texts of different sizes [batch, longest, ...] is mostly padding. Packed as [tokens, ...], as in
NaViT (arXiv 2307.06304), it holds only valid tokens: layers that treat each token alone (norms, MLPs, projections) need
no change, and `attention` is block-diagonal, so no token sees another sequence.

    packed, segments = pack(x, valid)          # [T, width]; the lengths stay on the host
    segments = segments.to(x.device)
    packed = packed + attention(query, key, value, segments).flatten(1)
    features = mean(packed, segments)          # [B, width]
"""

from __future__ import annotations

import torch
from torch import Tensor

from .device import ops
from .device.segments import Segments as Segments
from .utils import exact_dtype


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    kv_segments: Segments | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute attention within each sequence of packed tensors (block-diagonal attention).

    Args:
        query: [T, heads, head_dim].
        key, value: [tokens of `kv_segments`, heads, head_dim].
        segments: of the queries, with index tensors on their device.
        kv_segments: of keys and values, if they are not `segments`. Sequence i of the queries attends to sequence i.
            For attention pooling with one query per sequence, `segments` is `kv_segments.single()`.
        is_causal: each query attends to the keys of its sequence up to its position.
        scale: factor of the scores; 1 / sqrt(head_dim) if None.

    Returns:
        [T, heads, head_dim]. Under autocast in the dtype of autocast, otherwise in the dtype of `query`.

    Raises:
        ValueError: `is_causal` with different segments of queries and keys, or segments of other sequences.
    """
    _check_fits(query, segments)
    if kv_segments is not None:
        _check_fits(key, kv_segments)
        if len(kv_segments) != len(segments):
            raise ValueError(
                f"The queries are of {len(segments)} sequences and the keys of {len(kv_segments)}. Sequence i of the "
                "queries attends to sequence i of the keys."
            )
    if is_causal and kv_segments is not None and kv_segments is not segments:
        raise ValueError("is_causal needs queries and keys of the same sequences: leave kv_segments out.")
    return ops.packed_attention(query, key, value, segments, kv_segments, is_causal, scale)


def _check_fits(x: Tensor, segments: Segments) -> None:
    # A graph must not depend on the number of tokens.
    if not torch.compiler.is_compiling() and len(x) != segments.total:
        raise ValueError(
            f"A packed tensor has {len(x)} tokens, and its segments have {segments.total}. Use the segments that the "
            "tensor was packed with."
        )


def pack(x: Tensor, valid: Tensor) -> tuple[Tensor, Segments]:
    """Remove the padding of a batch.

    Args:
        x: [B, N, ...], on any device.
        valid: bool [B, N], on the CPU, True at valid tokens. They need not be the first ones of a sequence, but the
            positions of `Segments` are counted without the tokens in between.

    Returns:
        The valid tokens [T, ...] in their order, on the device of `x`, and their segments on the CPU.

    Raises:
        ValueError: `valid` is on a device, has another shape than the tokens, or a sequence has no valid token.
    """
    if valid.shape != x.shape[:2]:
        raise ValueError(
            f"valid has the shape {tuple(valid.shape)} for tokens of shape {tuple(x.shape)}. It must be "
            f"{tuple(x.shape[:2])}."
        )
    valid = valid.bool()
    segments = Segments.of(valid.sum(dim=1))
    index = valid.flatten().nonzero().squeeze(1).to(x.device, non_blocking=True)
    return x.flatten(0, 1).index_select(0, index), segments


def unpack(x: Tensor, segments: Segments, length: int | None = None, value: float = 0) -> Tensor:
    """Pad packed sequences to one length.

    Args:
        x: [T, ...], with `segments` on its device.
        length: N, the number of tokens to which each sequence is padded; that of the longest one if None.
        value: fills the padding.

    Returns:
        [B, N, ...], with each sequence at the start of its row.

    Raises:
        ValueError: a sequence is longer than `length`, or the segments are of another tensor.
    """
    _check_fits(x, segments)
    length = segments.max_length if length is None else length
    if length < segments.max_length:
        raise ValueError(f"A packed sequence has {segments.max_length} tokens, and length {length} is less.")
    padded = x.new_full((len(segments) * length, *x.shape[1:]), value)
    slot = segments.sequence * length + segments.position
    return padded.index_copy(0, slot, x).unflatten(0, (len(segments), length))


def mean(x: Tensor, segments: Segments) -> Tensor:
    """Return the mean of each sequence, [T, D] -> [B, D]. Sums are in float32 (float64 for float64)."""
    _check_fits(x, segments)
    dtype = exact_dtype(x.dtype)
    sums = x.new_zeros((len(segments), *x.shape[1:]), dtype=dtype).index_add(0, segments.sequence, x.to(dtype))
    return (sums / segments.offsets.diff()[:, None]).to(x.dtype)


def first(x: Tensor, segments: Segments) -> Tensor:
    """Return the first token of each sequence, [T, ...] -> [B, ...]."""
    return x.index_select(0, segments.offsets[:-1])


def last(x: Tensor, segments: Segments) -> Tensor:
    """Return the last token of each sequence, [T, ...] -> [B, ...]."""
    return x.index_select(0, segments.offsets[1:] - 1)
