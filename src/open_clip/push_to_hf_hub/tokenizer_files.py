"""Saving of a tokenizer to files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from ..formats.whole_file import write_text
from ..tokenizer import DEFAULT_CONTEXT_LENGTH, SimpleTokenizer
from ..tokenizer.cleaning import get_clean_fn

logger = logging.getLogger(__name__)


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike) -> None:
    """Write the files of a tokenizer: with its `save_pretrained`, or for a SimpleTokenizer those of CLIPTokenizer.

    CLIPTokenizer corresponds to a SimpleTokenizer with `clean="lower"`. For other cleanings, no files are written:
    open_clip creates the tokenizer from the configuration.
    """
    save_pretrained = getattr(tokenizer, "save_pretrained", None)
    if save_pretrained is not None:
        save_pretrained(folder)
    elif isinstance(tokenizer, SimpleTokenizer) and tokenizer.clean_fn is get_clean_fn("lower"):
        for name, text in _clip_tokenizer_files(tokenizer).items():
            write_text(Path(folder) / name, text)
    else:
        logger.warning(
            "No files are written for the %s, which has no counterpart in transformers. open_clip does not need them.",
            type(tokenizer).__name__,
        )


def _clip_tokenizer_files(tokenizer: SimpleTokenizer) -> dict[str, str]:
    """Return the contents of the files of a CLIPTokenizer, by file name."""
    start, end, *others = tokenizer.special_tokens
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    if others:
        special["additional_special_tokens"] = others
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": tokenizer.context_length or DEFAULT_CONTEXT_LENGTH,
        **special,
    }
    merges = [" ".join(pair) for pair in tokenizer.bpe_ranks]
    return {
        "vocab.json": json.dumps(tokenizer.encoder, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "special_tokens_map.json": json.dumps(special, indent=2, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
    }
