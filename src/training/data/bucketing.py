"""Length bucketing: batches whose captions have few different lengths, but not only one.

Samples are ordered pool by pool. A pool is a sequence of `pool` samples in random order, which is sorted by the length
of the captions. Nothing is added or dropped: the result is a permutation of the pool.

Mixed batches (`runs` = K > 1, the default). The sorted pool is split into K strata, from the shortest captions to the
longest, and each stratum is split into as many runs as there are batches. The captions of a run have nearly equal
length. Each batch gets one run of each stratum. Runs of the longer half of the strata, where lengths differ most, have
a third of the size of the others: with K = 4, a batch has runs of 3/8, 3/8, 1/8 and 1/8 of its samples, from the
shortest to the longest. Starting with the longest stratum, the shortest run goes to the batch that has the most tokens
so far. The batches are then shuffled. So

* a batch has K lengths, which `open_clip.text_groups` (at most 4 groups) or packing computes with little padding;
* its captions are short and long as in an unsorted batch, so the contrastive loss cannot tell its negatives by length;
* all batches of a pool have nearly the same number of tokens, so ranks that read different pools have equal work.

The samples of a batch are sorted by length. Where a bad sample is dropped, a batch lacks its shortest captions and gets
those of the next batch, which have similar lengths. Rank r of W takes every W-th sample, so the captions of two ranks
differ in total by less than the longest caption. Samples that do not fill a batch come last, unsorted.

One run per batch (`runs` = 1) is the rule of open_clip's main branch: the sorted pool is split into runs of `chunk`
samples, and the runs are shuffled. That is the least padding if every batch is padded to its longest caption, but all
negatives of a caption have its length, and ranks have unequal work.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from training.data.skips import CAPTION_LIMIT
from training.params import DataConfig

_LEAST_BATCHES = 8  # in a pool of mixed batches: runs of fewer are hardly narrower than an unsorted stratum


@dataclass(frozen=True)
class LengthBuckets:
    """How samples are ordered by length.

    Args:
        pool: number of samples that are sorted together.
        batch: number of samples of a batch.
        runs: of different lengths in a batch; 1 for the rule of open_clip's main branch.
        chunk: number of samples of a run if `runs` is 1.
    """

    pool: int
    batch: int
    runs: int
    chunk: int

    @classmethod
    def from_options(cls, cfg: DataConfig, batch: int) -> LengthBuckets | None:
        """Return the buckets of the options for batches of `batch` samples, or None without --length-bucketing."""
        if not cfg.length_bucketing:
            return None
        pool = cfg.bucket_pool
        if cfg.bucket_runs > 1:  # whole batches
            pool = max(-(-pool // batch), _LEAST_BATCHES) * batch
        return cls(pool, batch, cfg.bucket_runs, cfg.bucket_chunk)

    @classmethod
    def from_state(cls, state: Sequence[int] | None) -> LengthBuckets | None:
        """Return the buckets of a checkpoint, None if it was saved without."""
        return None if state is None else cls(*state)

    def to_state(self) -> list[int]:
        """Return the values for a checkpoint. Their order must not change."""
        return list(astuple(self))

    def order(self, lengths: Sequence[int], rng: random.Random) -> list[int]:
        """Return the positions 0, 1, ... of samples with these lengths, in the order in which they are read."""
        order: list[int] = []
        for start in range(0, len(lengths), self.pool):
            pool = range(start, min(start + self.pool, len(lengths)))
            order += self._separate_runs(pool, lengths, rng) if self.runs == 1 else self._mixed(pool, lengths, rng)
        return order

    def _separate_runs(self, pool: Sequence[int], lengths: Sequence[int], rng: random.Random) -> list[int]:
        ordered = sorted(pool, key=lengths.__getitem__)
        runs = [ordered[start : start + self.chunk] for start in range(0, len(ordered), self.chunk)]
        rng.shuffle(runs)
        return [position for run in runs for position in run]

    def _mixed(self, pool: Sequence[int], lengths: Sequence[int], rng: random.Random) -> list[int]:
        count = len(pool) // self.batch
        full, rest = pool[: count * self.batch], pool[count * self.batch :]
        ordered = sorted(full, key=lengths.__getitem__)
        batches: list[list[int]] = [[] for _ in range(count)]
        tokens = [0] * count
        ends = self._run_ends()
        for first, last in zip(reversed(ends[:-1]), reversed(ends[1:]), strict=True):
            most_first = sorted(range(count), key=tokens.__getitem__, reverse=True)
            for number, batch in enumerate(most_first):
                start = first * count + number * (last - first)
                run = ordered[start : start + last - first]
                batches[batch] = run + batches[batch]
                tokens[batch] += sum(lengths[position] for position in run)
        rng.shuffle(batches)
        return [position for batch in batches for position in batch] + list(rest)

    def _run_ends(self) -> list[int]:
        """Return the positions in a batch where its runs end, after a 0."""
        weights = [3] * (self.runs - self.runs // 2) + [1] * (self.runs // 2)
        return [self.batch * end // sum(weights) for end in itertools.accumulate(weights, initial=0)]


class CaptionLengths:
    """The lengths of captions in tokens, or in characters with a tokenizer that does not tell them.

    That is one without `encode`, which cannot leave out the padding (`pad=False`) either, or which would be slow, as
    those of transformers that are written in Python. Tokens are counted up to the context length.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.encode = getattr(tokenizer, "encode", None)
        self.longest = getattr(tokenizer, "context_length", None)
        self.leaves_out_padding = self.encode is None and _leaves_out_padding(tokenizer)

    def __call__(self, captions: Sequence[str]) -> list[int]:
        texts = [_valid_text(caption) for caption in captions]
        if self.leaves_out_padding:
            return [len(ids) for ids in self.tokenizer(texts, pad=False)] if texts else []
        if self.encode is None:
            return [len(text) for text in texts]
        lengths = [len(self.encode(text)) for text in texts]
        return lengths if self.longest is None else [min(length, self.longest) for length in lengths]


def _leaves_out_padding(tokenizer: Any) -> bool:
    if not callable(tokenizer) or not getattr(getattr(tokenizer, "tokenizer", None), "is_fast", True):
        return False
    try:
        return "pad" in inspect.signature(tokenizer).parameters and isinstance(tokenizer(["a"], pad=False), list)
    except ValueError:  # it needs the padding, or is a built-in function without a signature
        return False


def _valid_text(caption: str) -> str:
    """Return a text that any tokenizer takes. Samples with other captions are dropped or replaced later."""
    if len(caption) > CAPTION_LIMIT:
        return ""
    return caption if caption.isascii() else caption.encode("utf-8", "replace").decode()
