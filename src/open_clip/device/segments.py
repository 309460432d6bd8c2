"""Where each sequence is in a tensor that holds several sequences one after another."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Segments:
    """The lengths of packed sequences, and index tensors made from them.

    A packed tensor [tokens, ...] holds sequences of different lengths one after another, without padding (NaViT, arXiv
    2307.06304). The lengths are known to the host, so kernels that need them there do not wait for the device. The
    index tensors are made on the host; `to` copies them to a device in one transfer. Create it with `of`.

    Attributes:
        lengths: number of tokens of each sequence.
        ends: where each sequence ends.
        total: number of all tokens, T.
        max_length: number of tokens of the longest sequence.
        host_offsets: int64 [B + 1], always on the CPU: `offsets`.
        sequence: int64 [T], the number of the sequence to which each token belongs.
        position: int64 [T], the place of each token within its sequence.
        by_length: int64 [B], the numbers of the sequences, from the shortest to the longest.
        offsets: int32 [B + 1], where each sequence starts, and T.
    """

    def __init__(self, lengths: tuple[int, ...], host_offsets: Tensor, indices: Tensor, offsets: Tensor) -> None:
        self.lengths = lengths
        self.ends = tuple(itertools.accumulate(lengths))
        self.total = sum(lengths)
        self.max_length = max(lengths)
        self.host_offsets = host_offsets
        self.sequence, self.position, self.by_length = indices.split((self.total, self.total, len(lengths)))
        self.offsets = offsets
        self.layouts: dict[Any, Any] = {}  # what packed.in_buckets needs, by the lengths of the queries and the groups
        self._indices = indices
        self._single: Segments | None = None

    @classmethod
    def of(cls, lengths: Sequence[int] | Tensor) -> Segments:
        """Create the segments of sequences with these lengths, on the CPU.

        Args:
            lengths: numbers of tokens, each at least 1. A tensor must be on the CPU, so that no device is waited for.

        Raises:
            TypeError: a length is not an integer.
            ValueError: there is no sequence, a sequence has no token, or the tensor is on a device.
        """
        if isinstance(lengths, Tensor) and lengths.device.type != "cpu":
            raise ValueError(
                f"The lengths of packed sequences are on {lengths.device}. Compute them on the CPU, because reading "
                "them from a device waits for it."
            )
        found = tuple(map(operator.index, lengths.tolist() if isinstance(lengths, Tensor) else lengths))
        if not found:
            raise ValueError("Packed sequences need at least one length, and got none.")
        if min(found) < 1:
            raise ValueError(
                f"Packed sequence {found.index(min(found))} has {min(found)} tokens. Each needs at least 1: leave "
                "empty sequences out."
            )
        offsets = torch.tensor([0, *itertools.accumulate(found)])
        counts = torch.tensor(found)
        sequence = torch.arange(len(found)).repeat_interleave(counts)
        position = torch.arange(len(sequence)) - offsets[:-1].repeat_interleave(counts)
        indices = torch.cat([sequence, position, counts.argsort(stable=True)])
        return cls(found, offsets, indices, offsets.to(torch.int32))

    @classmethod
    def of_tensors(cls, host_offsets: Tensor, indices: Tensor, offsets: Tensor) -> Segments:
        """Create segments from their `tensors()`."""
        return cls(tuple(host_offsets.diff().tolist()), host_offsets, indices, offsets)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return everything as tensors, for operators in a graph. The first is on the CPU."""
        return self.host_offsets, self._indices, self.offsets

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"Segments({len(self)} sequences, {self.total} tokens, on {self.device})"

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """Return the segments with their index tensors on `device`. `host_offsets` stays on the CPU."""
        if self.device == torch.device(device):
            return self
        offsets = self.offsets.to(device, non_blocking=non_blocking)
        return Segments(self.lengths, self.host_offsets, self._indices.to(device, non_blocking=non_blocking), offsets)

    def pin_memory(self) -> Segments:
        """Return the segments with index tensors in pinned memory, from which copies to a device do not block."""
        return Segments(self.lengths, self.host_offsets, self._indices.pin_memory(), self.offsets.pin_memory())

    def single(self) -> Segments:
        """Return the segments of one token per sequence, on the same device: the queries of attention pooling."""
        if self._single is None:
            count = len(self)
            with torch.inference_mode(False):
                number = torch.arange(count, device=self.device)
                indices = torch.cat([number, torch.zeros_like(number), number])
                offsets = torch.arange(count + 1, dtype=torch.int32, device=self.device)
            self._single = Segments((1,) * count, torch.arange(count + 1), indices, offsets)
        return self._single
