"""Texts of a batch in groups of similar length, so that a text tower computes little padding.

Real captions have 10 to 20 tokens, and tokenizers pad them to 77. Where padding changes no embedding, a batch can be
sorted by length, encoded in a few groups that are cut to their longest text, and put back in order.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_GROUPS = 4
# Group sizes are multiples of this part of the batch and lengths are taken from a list, so that compilers and devices
# that prepare kernels by shape meet few shapes.
_PARTS = 8
_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class GroupedText(NamedTuple):
    """Token ids of a batch in groups of different lengths.

    Attributes:
        parts: int64 [texts, tokens] each, from short to long; all texts of the batch, sorted by length.
        inverse: int64 [batch], the position in the sorted batch of each text.
    """

    parts: tuple[Tensor, ...]
    inverse: Tensor

    def to(self, *args: Any, **kwargs: Any) -> GroupedText:
        return GroupedText(tuple(part.to(*args, **kwargs) for part in self.parts), self.inverse.to(*args, **kwargs))

    def encode(self, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Features of all texts in the order of the batch; `encode` gives those of one group, [texts, dim]."""
        return torch.cat([encode(part) for part in self.parts]).index_select(0, self.inverse)


def group_by_length(
    text: Tensor, lengths: Tensor, group_cost: int, max_groups: int = MAX_GROUPS
) -> Tensor | GroupedText:
    """Sort token ids by length and cut them into groups.

    Args:
        text: int64 [batch, tokens], on the CPU.
        lengths: int64 [batch], how many of the first tokens of each text its embedding depends on.
        group_cost: tokens whose encoding takes as long as the launches of another group: it must save more.
        max_groups: number of groups at most.

    Returns:
        The groups whose encoding takes least; a tensor [batch, fewer tokens] where one group is best.
    """
    batch, num_tokens = text.shape
    ordered, order = lengths.sort(stable=True)
    size = -(-batch // _PARTS)
    ends = [*range(size, batch, size), batch]
    needed = [_round_up(int(ordered[end - 1]), num_tokens) for end in ends]
    cuts = _best_cuts(ends, needed, group_cost, max_groups)
    if len(cuts) == 1:
        return text[:, : needed[-1]]
    chosen = text[order]
    starts = [0, *(ends[cut] for cut in cuts[:-1])]
    parts = tuple(chosen[start : ends[cut], : needed[cut]] for start, cut in zip(starts, cuts, strict=True))
    return GroupedText(tuple(part.contiguous() for part in parts), order.argsort())


def _round_up(length: int, num_tokens: int) -> int:
    return next((fixed for fixed in _LENGTHS if length <= fixed < num_tokens), num_tokens)


def _best_cuts(ends: list[int], needed: list[int], group_cost: int, max_groups: int) -> tuple[int, ...]:
    """Indices into `ends` where groups end, so that tokens and groups together cost least."""
    last = len(ends) - 1

    def cost(cuts: tuple[int, ...]) -> int:
        starts = [0, *(ends[cut] for cut in cuts[:-1])]
        tokens = sum((ends[cut] - start) * needed[cut] for start, cut in zip(starts, cuts, strict=True))
        return tokens + len(cuts) * group_cost

    choices = itertools.chain.from_iterable(itertools.combinations(range(last), n) for n in range(max_groups))
    return min(((*inner, last) for inner in choices), key=cost)
