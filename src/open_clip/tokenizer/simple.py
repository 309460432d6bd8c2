"""Tokenizers, which turn captions into token ids: int64 [batch, context_length].

`SimpleTokenizer` gives the ids of OpenAI's CLIP tokenizer (github.com/openai/CLIP), with open_clip's text cleaning and
reduction masks. It caches the ids of each word as packed bytes, because captions share most of their words. A caption
of cached words then costs one dict lookup per word and one `bytes.join`.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .bpe import WORD_END, MergeTable, WordIds, bytes_to_unicode, default_bpe, load_merges
from .cleaning import get_clean_fn, get_words_fn
from .hf import ids_to_list
from .masks import check_context_length, get_reduction_mask_fn, to_tensor

DEFAULT_CONTEXT_LENGTH = 77
DEFAULT_SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")


class SimpleTokenizer:
    """CLIP's byte-pair tokenizer.

    Args:
        bpe_path: merges file, gzipped or plain. It is read on first use, once per process.
        additional_special_tokens: strings that are encoded as one token each. Their ids follow those of the two
            default special tokens.
        context_length: number of columns that `__call__` returns. None: every call must pass it.
        clean: `lower`, `whitespace` or `canonicalize`.
        reduction_mask: how to shorten a caption that is too long. "" keeps the first tokens, `simple` a random
            contiguous span, `random` a random subset in the original order, `shuffle` a random subset in random order.
            `syntax` prefers nouns, then adjectives, then verbs. The masks are from CLIPA (Li et al. 2023,
            arXiv:2305.07017).

    Raises:
        FileNotFoundError: `bpe_path` does not exist.
        ValueError: `clean` or `reduction_mask` is unknown.
    """

    def __init__(
        self,
        bpe_path: str = default_bpe(),
        additional_special_tokens: list[str] | None = None,
        context_length: int | None = DEFAULT_CONTEXT_LENGTH,
        clean: str = "lower",
        reduction_mask: str = "",
    ) -> None:
        self.bpe_path = str(bpe_path)
        with open(self.bpe_path, "rb"):
            pass  # raise for a wrong path here, not at the first caption
        self.special_tokens = tuple(dict.fromkeys([*DEFAULT_SPECIAL_TOKENS, *(additional_special_tokens or ())]))
        self.context_length = context_length
        self.clean_fn = get_clean_fn(clean)
        self.reduction_fn = get_reduction_mask_fn(reduction_mask) if reduction_mask else None

    def __getstate__(self) -> dict:
        # Do not pickle cached properties (the word cache among them): a worker process recomputes them.
        return {name: value for name, value in vars(self).items() if not hasattr(type(self), name)}

    @cached_property
    def _table(self) -> MergeTable:
        return load_merges(self.bpe_path)

    @cached_property
    def encoder(self) -> dict[str, int]:
        """Map from symbol (spelled as in the merges file) or special token to id."""
        return {symbol: i for i, symbol in enumerate([*self._table.symbols, *self.special_tokens])}

    @cached_property
    def decoder(self) -> dict[int, str]:
        """Map from id to symbol (spelled as in the merges file) or special token."""
        return {i: symbol for symbol, i in self.encoder.items()}

    @cached_property
    def bpe_ranks(self) -> dict[tuple[str, str], int]:
        """Map from a pair of symbols to its rank: its position in the merges file, from 0."""
        return {pair: rank for rank, pair in enumerate(self._table.merges)}

    @cached_property
    def byte_encoder(self) -> dict[int, str]:
        return bytes_to_unicode()

    @cached_property
    def byte_decoder(self) -> dict[str, int]:
        return {char: byte for byte, char in bytes_to_unicode().items()}

    @cached_property
    def vocab_size(self) -> int:
        return len(self._table.symbols) + len(self.special_tokens)

    @cached_property
    def all_special_ids(self) -> list[int]:
        return list(self._special_ids.values())

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.special_tokens, start=len(self._table.symbols))}

    pad_token_id = 0  # it is also the id of "!"

    @cached_property
    def sot_token_id(self) -> int:
        return self.all_special_ids[0]

    @cached_property
    def eot_token_id(self) -> int:
        return self.all_special_ids[1]

    @cached_property
    def _typecode(self) -> str:
        """Type code of packed ids for array and NumPy: the narrowest unsigned type that holds the vocabulary."""
        return "H" if self.vocab_size <= 1 << 16 else "I"

    @cached_property
    def _special_tokens_have_no_space(self) -> bool:
        """Whether text can be split at white space before special tokens are searched for."""
        return not any(re.search(r"\s", token) for token in self.special_tokens)

    @cached_property
    def _split_ascii(self) -> Callable[[str], list[str]]:
        """Function that splits ASCII text like `pat`, with the faster `re` module."""
        return re.compile(self._pattern("[a-z]+", "[0-9]", r"[^\sa-z0-9]+"), re.IGNORECASE | re.ASCII).findall

    @cached_property
    def pat(self) -> Any:
        """Pattern of special tokens, contractions, runs of letters, single digits, and runs of other characters."""
        import regex

        return regex.compile(self._pattern(r"[\p{L}]+", r"[\p{N}]", r"[^\s\p{L}\p{N}]+"), regex.IGNORECASE)

    @cached_property
    def cache(self) -> dict[str, str]:
        """Results of `bpe`, by token."""
        return {token: token for token in self.special_tokens}

    def _pattern(self, letters: str, digit: str, rest: str) -> str:
        specials = [re.escape(token) for token in self.special_tokens]
        return "|".join([*specials, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", letters, digit, rest])

    @cached_property
    def _letters_are_one_token(self) -> bool:
        """Whether a word of ASCII letters is one token: no additional special token can start inside it."""
        return len(self.special_tokens) == len(DEFAULT_SPECIAL_TOKENS)

    def _word_to_ids(self, word: str) -> list[int]:
        if self._letters_are_one_token and word.isalpha() and word.isascii():
            return self._table.encode(word)
        ids: list[int] = []
        for token in self._split_ascii(word) if word.isascii() else self.pat.findall(word):
            special = self._special_ids.get(token)
            if special is not None:
                ids.append(special)
            else:
                ids += self._table.encode(token)
        return ids

    def _pack(self, ids: list[int]) -> bytes:
        return array(self._typecode, ids).tobytes()

    @cached_property
    def _word_ids(self) -> WordIds:
        return WordIds(lambda word: self._pack(self._word_to_ids(word)))

    def _encode_packed(self, text: str) -> bytes:
        if self._special_tokens_have_no_space:
            return b"".join(map(self._word_ids.__getitem__, get_words_fn(self.clean_fn)(text)))
        return self._pack(self._word_to_ids(self.clean_fn(text)))

    def encode(self, text: str) -> list[int]:
        """Clean and encode a caption. The ids do not include start and end of text."""
        return np.frombuffer(self._encode_packed(text), self._typecode).tolist()

    def bpe(self, token: str) -> str:
        """Split a token, spelled in the characters of `bytes_to_unicode`, into symbols joined by spaces."""
        if token not in self.cache:
            text = bytes(self.byte_decoder[char] for char in token)
            self.cache[token] = " ".join(self._table.symbols[i] for i in self._table.merge(text))
        return self.cache[token]

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode ids (ints, 0-d tensors, or one tensor [length]) to text, with a space after each word.

        Bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = ids_to_list(tokens)
        try:
            return b"".join(map(self._id_to_bytes.__getitem__, ids)).decode("utf-8", errors="replace")
        except (KeyError, TypeError):
            unknown = next(i for i in ids if not isinstance(i, int) or i not in self._id_to_bytes)
            raise ValueError(
                f"{unknown!r} is not an id of this vocabulary. Ids are ints from 0 to {self.vocab_size - 1}."
            ) from None

    @cached_property
    def _id_to_bytes(self) -> dict[int, bytes]:
        table = {}
        for i, symbol in enumerate(self._table.symbols):
            text = bytes(self.byte_decoder[char] for char in symbol.removesuffix(WORD_END))
            table[i] = text + b" " if symbol.endswith(WORD_END) else text
        return table | {i: token.encode() for token, i in self._special_ids.items()}

    def __call__(
        self, texts: str | Iterable[str], context_length: int | None = None, pad: bool = True
    ) -> torch.LongTensor:
        """Tokenize captions: start of text, ids, end of text, padding with 0.

        A caption that is too long is truncated (or reduced, see `reduction_mask`); its last id is end of text.

        Args:
            texts: one caption or several.
            context_length: number of columns; the tokenizer's `context_length` by default.
            pad: must be True. Other tokenizers return lists without padding if it is False.

        Returns:
            int64 [batch, context_length].

        Raises:
            ValueError: neither the call nor the tokenizer has a context length, or it is negative, or `pad` is False.
            TypeError: a caption is not a str.
        """
        if not pad:
            raise ValueError(
                "SimpleTokenizer cannot leave out the padding (pad=False): it pads with 0, which is also the id of the "
                "character '!', so padding that is added later cannot be told from text. Use pad=True, or a tokenizer "
                "with a padding token (TikTokenTokenizer, HFTokenizer)."
            )
        context_length = check_context_length(context_length or self.context_length)
        texts = [texts] if isinstance(texts, str) else texts
        if self.reduction_fn is not None:
            return self.reduction_fn(
                texts,
                context_length=context_length,
                sot_token_id=self.sot_token_id,
                eot_token_id=self.eot_token_id,
                encode_fn=self.encode,
            )
        start, end = self._pack([self.sot_token_id]), self._pack([self.eot_token_id])
        row_bytes = context_length * len(end)
        # Keep one column for end of text; with a context length of 1, only end of text is left.
        max_bytes, encode = row_bytes - len(end), self._encode_packed
        rows = [((start + encode(text))[:max_bytes] + end).ljust(row_bytes, b"\0") for text in texts]
        return to_tensor(np.frombuffer(b"".join(rows), self._typecode), context_length)


_tokenizer = SimpleTokenizer()


def decode(output_ids: torch.Tensor) -> str:
    """Decode ids, int64 [length], with the default tokenizer."""
    return _tokenizer.decode(output_ids)


def tokenize(texts: str | Iterable[str], context_length: int = DEFAULT_CONTEXT_LENGTH) -> torch.LongTensor:
    """Tokenize with the default tokenizer, see `SimpleTokenizer.__call__`. Returns int64 [batch, context_length]."""
    return _tokenizer(texts, context_length=context_length)
