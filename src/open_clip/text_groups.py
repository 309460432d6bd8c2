"""Group the texts of a batch by length, or pack them, so that a text tower computes less padding.

Captions typically have 10 to 20 tokens, and tokenizers pad them to 77. If padding changes no embedding, a batch can be
sorted by length, split into a few groups that are cut to their longest text, encoded, and restored to its order. Packed
one after another, texts have no padding at all, but only some towers take them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import packing

MAX_GROUPS = 4
# Group sizes are multiples of batch / _PARTS and lengths are from a list, so that compilers and devices which prepare
# kernels per shape see few shapes.
_PARTS = 8
_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class GroupedText(NamedTuple):
    """Token ids of a batch in groups of different lengths.

    Attributes:
        parts: one int64 [texts, tokens] per group. Together they are all texts of the batch, sorted by length.
        inverse: int64 [batch], the position of each text in the sorted batch.
    """

    parts: tuple[Tensor, ...]
    inverse: Tensor

    def to(self, *args: Any, **kwargs: Any) -> GroupedText:
        return GroupedText(tuple(part.to(*args, **kwargs) for part in self.parts), self.inverse.to(*args, **kwargs))

    def encode(self, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Encode all texts, and return their features in the order of the batch, [batch, dim].

        `encode` maps the token ids of one group to features [texts, dim].
        """
        return torch.cat([encode(part) for part in self.parts]).index_select(0, self.inverse)


def group_by_length(
    text: Tensor, lengths: Tensor, group_cost: int, max_groups: int = MAX_GROUPS
) -> Tensor | GroupedText:
    """Sort token ids by length and split them into groups.

    Args:
        text: int64 [batch, tokens], on the CPU.
        lengths: int64 [batch], the number of first tokens on which each text's embedding depends.
        group_cost: cost of launching the kernels for one more group, as the number of tokens that take the same time.
        max_groups: maximum number of groups.

    Returns:
        The groups with the lowest total cost. If one group is best, a tensor [batch, fewer tokens] in the given order.
    """
    batch, num_tokens = text.shape
    ordered, order = lengths.sort(stable=True)
    size = -(-batch // _PARTS)
    ends = [*range(size, batch, size), batch]
    needed = [_round_up(int(ordered[end - 1]), num_tokens) for end in ends]
    cuts = _best_cuts(ends, needed, group_cost, max_groups)
    if len(cuts) == 1:
        return text[:, : needed[-1]]
    sorted_text = text[order]
    starts = [0, *(ends[cut] for cut in cuts[:-1])]
    parts = tuple(sorted_text[start : ends[cut], : needed[cut]] for start, cut in zip(starts, cuts, strict=True))
    return GroupedText(tuple(part.contiguous() for part in parts), order.argsort())


def _round_up(length: int, num_tokens: int) -> int:
    return next((fixed for fixed in _LENGTHS if length <= fixed < num_tokens), num_tokens)


def _best_cuts(ends: list[int], needed: list[int], group_cost: int, max_groups: int) -> tuple[int, ...]:
    """Return the indices into `ends` where groups end, for the lowest total cost of tokens and groups."""
    last = len(ends) - 1

    def cost(cuts: tuple[int, ...]) -> int:
        starts = [0, *(ends[cut] for cut in cuts[:-1])]
        tokens = sum((ends[cut] - start) * needed[cut] for start, cut in zip(starts, cuts, strict=True))
        return tokens + len(cuts) * group_cost

    inner_cuts = itertools.chain.from_iterable(itertools.combinations(range(last), n) for n in range(max_groups))
    return min(((*cuts, last) for cuts in inner_cuts), key=cost)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedText:
    """Token ids of a batch of texts, one after another without padding. `len()` is the number of texts.

    Attributes:
        ids: int64 [tokens].
        segments: where each text is.
    """

    ids: Tensor
    segments: packing.Segments

    def __post_init__(self) -> None:
        if self.ids.shape != (self.segments.total,):
            raise ValueError(
                f"Packed ids of shape {list(self.ids.shape)} do not fit segments of {self.segments.total} tokens. "
                "Make them with pack_text."
            )

    def __len__(self) -> int:
        return len(self.segments)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedText:
        return PackedText(self.ids.to(device, non_blocking=non_blocking), self.segments.to(device, non_blocking))

    def pin_memory(self) -> PackedText:
        return PackedText(self.ids.pin_memory(), self.segments.pin_memory())


def pack_text(text: Tensor, lengths: Tensor) -> PackedText:
    """Pack the first tokens of each text.

    Args:
        text: int64 [batch, tokens], on the CPU.
        lengths: int64 [batch], on the CPU, the number of first tokens on which each text's embedding depends; at least
            1. `text_lengths` of a model returns them.
    """
    is_needed = torch.arange(text.shape[1]) < lengths[:, None]
    return PackedText(*packing.pack(text, is_needed))
