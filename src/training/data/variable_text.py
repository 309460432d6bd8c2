"""Batches of captions that are padded to their longest caption instead of the context length of the model.

The model finds the padding by its id, so its embeddings do not depend on the number of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor


def collate_variable_text(
    targets: Sequence[Sequence[int] | Tensor],
    pad_id: int,
    pad_multiple: int | None = None,
    pad_cap: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right to the longest row, or to the next multiple of `pad_multiple` columns.

    Args:
        targets: ids of each caption, without padding.
        pad_id: id of the padding.
        pad_multiple: the number of columns is a multiple of it, unless that exceeds `pad_cap`. None: 1.
        pad_cap: maximum number of columns, the context length of the model.

    Returns:
        text: int64 [batch, columns]; text_valid: bool [batch, columns], False for padding.

    Raises:
        ValueError: a row is longer than `pad_cap`, or `pad_multiple` is not positive.
    """
    if pad_multiple is not None and pad_multiple < 1:
        raise ValueError(f"pad_multiple={pad_multiple} is not a positive number of tokens.")
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in targets]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    longest = int(lengths.max(initial=1))
    if pad_cap is not None and longest > pad_cap:
        raise ValueError(
            f"A caption has {longest} tokens, and the model reads at most {pad_cap}. Truncate captions to the context "
            "length when they are tokenized, or set context_length in the text_cfg of the model."
        )
    columns = -(-longest // (pad_multiple or 1)) * (pad_multiple or 1)
    columns = columns if pad_cap is None else min(columns, pad_cap)
    valid = np.arange(columns) < lengths[:, None]
    text = np.full(valid.shape, pad_id, np.int64)
    text[valid] = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    return torch.from_numpy(text), torch.from_numpy(valid)


class VariableText:
    """Tokenizes captions without padding, and pads them to the longest one.

    Args:
        tokenizer: a tokenizer that is called with `pad=False`.
        pad_multiple: see `collate_variable_text`.
    """

    def __init__(self, tokenizer: Any, pad_multiple: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.pad_multiple = pad_multiple

    def __call__(self, captions: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Return text, int64 [batch, tokens], and text_valid, bool [batch, tokens]."""
        rows = self.tokenizer(list(captions), pad=False)
        return collate_variable_text(
            rows, self.tokenizer.pad_token_id, self.pad_multiple, self.tokenizer.context_length
        )


def variable_text_of(tokenizer: Any, pad_multiple: int | None = None) -> VariableText | None:
    """Return the VariableText of a tokenizer whose model has `variable_text` in its configuration, else None."""
    return VariableText(tokenizer, pad_multiple) if getattr(tokenizer, "variable_text", False) else None
