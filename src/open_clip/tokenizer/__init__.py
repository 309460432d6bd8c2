"""Tokenizers, which turn captions into token ids: int64 [batch, context_length]."""

from __future__ import annotations

from .. import aliases
from .bpe import bytes_to_unicode, default_bpe, get_pairs
from .cleaning import basic_clean, canonicalize_text, get_clean_fn, whitespace_clean
from .hf import HFTokenizer, SigLipTokenizer
from .masks import get_reduction_mask_fn, random_mask_tokenize, simple_mask_tokenize, syntax_mask_tokenize
from .simple import DEFAULT_CONTEXT_LENGTH, SimpleTokenizer, decode, tokenize
from .tiktoken import TikTokenTokenizer

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

__all__ = [
    "DEFAULT_CONTEXT_LENGTH",
    "HFTokenizer",
    "SigLipTokenizer",
    "SimpleTokenizer",
    "TikTokenTokenizer",
    "basic_clean",
    "bytes_to_unicode",
    "canonicalize_text",
    "decode",
    "default_bpe",
    "get_clean_fn",
    "get_pairs",
    "get_reduction_mask_fn",
    "random_mask_tokenize",
    "simple_mask_tokenize",
    "syntax_mask_tokenize",
    "tokenize",
    "whitespace_clean",
]
