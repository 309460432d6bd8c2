"""Naive generation of CoCa captions in plain Python: one text at a time, encoded again for each token.

The captions are compared with those of `CoCa.generate`. It shares no code with open_clip.generation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

Scores = Callable[[list[int]], list[float]]  # ids so far -> of each token that may follow


def log_probabilities(
    model: Any,
    image: torch.Tensor,
    end: int,
    least: int = 0,
    penalty: float = 1.0,
    window: int = 10,
    logits: bool = False,
) -> Scores:
    """Return the scores of the next token for an image [3, height, width], with minimal length and repetition penalty.

    With `logits`, the scores are logits instead of log-probabilities.
    """

    def scores(ids: list[int]) -> list[float]:
        with torch.no_grad():
            answer = model(image[None], torch.tensor([ids[-window:]]), output_labels=False)["logits"][0, -1].float()
        values = (answer if logits else answer.log_softmax(dim=-1)).tolist()
        for token in set(ids):
            values[token] = values[token] * penalty if values[token] < 0 else values[token] / penalty
        if len(ids) < least:
            values[end] = -math.inf
        return values

    return scores


def greedy(scores: Scores, start: list[int], end: int, length: int, pad: int = 0) -> list[int]:
    """Generate greedily until the end or padding. The last of `length` tokens is the end."""
    ids = list(start)
    while len(ids) < length and ids[-1] not in (end, pad):
        values = scores(ids)
        ids.append(end if len(ids) == length - 1 else values.index(max(values)))
    return ids


def beams(
    scores: Scores, start: list[int], end: int, length: int, width: int, groups: int = 1, diversity: float = 0.0
) -> list[int]:
    """Search with `width` beams per group and return the text with the highest score per token."""
    live: list[list[tuple[float, list[int]]]] = [[(0.0, list(start))] for _ in range(groups)]
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(groups)]
    done = [False] * groups
    for tokens in range(len(start) + 1, length + 1):
        chosen: Counter[int] = Counter()
        for group in range(groups):
            candidates = []
            for total, ids in live[group]:
                for token, value in enumerate(scores(ids)):
                    candidates.append((total + value - diversity * chosen[token], [*ids, token]))
            candidates.sort(key=lambda candidate: -candidate[0])
            candidates = candidates[: 2 * width]
            if not done[group]:
                ended[group] += [(s / tokens, ids) for s, ids in candidates[:width] if ids[-1] == end]
                ended[group] = sorted(ended[group], key=lambda candidate: -candidate[0])[:width]
                worst = ended[group][-1][0] if len(ended[group]) == width else -math.inf
                done[group] = worst >= candidates[0][0] / tokens
            live[group] = [candidate for candidate in candidates if candidate[1][-1] != end][:width]
            chosen.update(ids[-1] for _, ids in live[group])
        if all(done):
            break
    for group in range(groups):
        if not done[group]:
            ended[group] += [(total / len(ids), ids) for total, ids in live[group]]
    return max((candidate for group in ended for candidate in group), key=lambda candidate: candidate[0])[1]


def padded(rows: list[list[int]], pad: int) -> list[list[int]]:
    longest = max(map(len, rows))
    return [row + [pad] * (longest - len(row)) for row in rows]
