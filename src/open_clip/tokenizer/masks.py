"""Reduction masks: ways to shorten a caption that is too long, from CLIPA (https://arxiv.org/abs/2305.07017)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch

EncodeFn = Callable[[str], list[int]]
MaskFn = Callable[..., torch.LongTensor]


def check_context_length(context_length: int | None) -> int:
    """Return `context_length`. Raise ValueError if it is not a positive number."""
    if not context_length or context_length < 0:
        raise ValueError(
            f"context_length={context_length!r} is not a positive number of tokens. "
            "Pass context_length to the tokenizer or to the call."
        )
    return context_length


def to_tensor(ids: np.ndarray, context_length: int) -> torch.LongTensor:
    """Convert ids of any integer dtype to int64 [batch, context_length]."""
    return torch.from_numpy(ids.astype(np.int64).reshape(-1, context_length))  # type: ignore[return-value]


def simple_mask_tokenize(
    texts: str | Iterable[str], context_length: int, sot_token_id: int, eot_token_id: int, encode_fn: EncodeFn
) -> torch.LongTensor:
    """Tokenize; a caption that is too long keeps a random span of `context_length - 2` tokens.

    The start of the span is drawn from Python's `random`.
    """
    keep = max(check_context_length(context_length) - 2, 0)
    rows = _encode_all(texts, encode_fn)
    for i, ids in enumerate(rows):
        if len(ids) > keep:
            start = random.randint(0, len(ids) - keep)
            rows[i] = ids[start : start + keep]
    return _fill_rows(rows, context_length, sot_token_id, eot_token_id)


def random_mask_tokenize(
    texts: str | Iterable[str],
    context_length: int,
    sot_token_id: int,
    eot_token_id: int,
    encode_fn: EncodeFn,
    shuffle: bool = False,
) -> torch.LongTensor:
    """Tokenize; a caption that is too long keeps a random subset of `context_length - 2` tokens.

    The subset is drawn without replacement from torch's CPU generator. It keeps the caption's order; with `shuffle`, it
    keeps the order in which it was drawn.
    """
    keep = max(check_context_length(context_length) - 2, 0)
    rows = _encode_all(texts, encode_fn)
    for i, ids in enumerate(rows):
        if len(ids) > keep:
            drawn = torch.randperm(len(ids))[:keep].tolist()
            rows[i] = [ids[k] for k in (drawn if shuffle else sorted(drawn))]
    return _fill_rows(rows, context_length, sot_token_id, eot_token_id)


def syntax_mask_tokenize(
    texts: str | Iterable[str], context_length: int, sot_token_id: int, eot_token_id: int, encode_fn: EncodeFn
) -> torch.LongTensor:
    """Tokenize; keep `context_length - 2` words, preferring nouns, then adjectives, then verbs.

    The words keep the caption's order. Their tokens are truncated if they still do not fit.

    Raises:
        RuntimeError: nltk or its data, which tag the words, are missing.
    """
    keep = max(check_context_length(context_length) - 2, 0)
    rows = []
    for text in [texts] if isinstance(texts, str) else texts:
        tagged = _tag_words(text)
        by_rank = sorted(range(len(tagged)), key=lambda k: _TAG_RANK.get(tagged[k][1][:2], len(_TAG_RANK)))
        rows.append(encode_fn(" ".join(tagged[k][0] for k in sorted(by_rank[:keep]))))
    return _fill_rows(rows, context_length, sot_token_id, eot_token_id)


_TAG_RANK = {"NN": 0, "JJ": 1, "VB": 2}  # first two letters of the Penn Treebank tag


def _tag_words(text: str) -> list[tuple[str, str]]:
    """Return (word, Penn Treebank tag) for each word of a caption."""
    try:
        import nltk
    except ImportError as error:
        raise RuntimeError("reduction_mask='syntax' needs the package nltk. Install it: pip install nltk.") from error
    try:
        return nltk.pos_tag(nltk.word_tokenize(text))
    except LookupError as error:
        raise RuntimeError(
            "reduction_mask='syntax' needs nltk's data, which are not installed. Download them: "
            "python -m nltk.downloader punkt punkt_tab averaged_perceptron_tagger averaged_perceptron_tagger_eng"
        ) from error


_MASK_FNS: dict[str, MaskFn] = {
    "simple": simple_mask_tokenize,
    "random": random_mask_tokenize,
    "shuffle": partial(random_mask_tokenize, shuffle=True),
    "syntax": syntax_mask_tokenize,
}


def get_reduction_mask_fn(type: str) -> MaskFn:
    """Return the reduction mask named `type`: `simple`, `random`, `shuffle` or `syntax`.

    Raises:
        ValueError: the name is unknown.
    """
    if type not in _MASK_FNS:
        raise ValueError(f"reduction_mask={type!r} is unknown. Choose from {', '.join(_MASK_FNS)}, or '' for none.")
    return _MASK_FNS[type]


def _fill_rows(rows: list[list[int]], context_length: int, sot_token_id: int, eot_token_id: int) -> torch.LongTensor:
    """Write rows of start, ids, end and zeros into int64 [batch, context_length]; truncate long rows before the end."""
    filled = np.zeros((len(rows), context_length), np.int64)
    for filled_row, ids in zip(filled, rows, strict=True):
        row = [*[sot_token_id, *ids][: context_length - 1], eot_token_id]
        filled_row[: len(row)] = row
    return to_tensor(filled, context_length)


def _encode_all(texts: str | Iterable[str], encode_fn: EncodeFn) -> list[list[int]]:
    return [encode_fn(text) for text in ([texts] if isinstance(texts, str) else texts)]
