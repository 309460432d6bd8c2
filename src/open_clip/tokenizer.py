"""Tokenizers: captions -> LongTensor [N, context_length].

`SimpleTokenizer` gives the ids of OpenAI's CLIP tokenizer (github.com/openai/CLIP) with open_clip's cleanings and
reduction masks. A caption's ids are the ids of its words one after another, and captions share most of their words: ids
are kept by word, packed as bytes, so that a caption of known words costs a dict lookup a word and one join, and a batch
is written by joining rows that are padded to equal length.
"""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from . import aliases
from .bpe import WORD_END, MergeTable, bytes_to_unicode, default_bpe, get_pairs, load_merges
from .hf_tokenizer import HFTokenizer, SigLipTokenizer, ids_to_list
from .text_cleaning import basic_clean, canonicalize_text, get_clean_fn, get_words_fn, whitespace_clean

__all__ = [
    "DEFAULT_CONTEXT_LENGTH",
    "HFTokenizer",
    "SigLipTokenizer",
    "SimpleTokenizer",
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

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

DEFAULT_CONTEXT_LENGTH = 77
DEFAULT_SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")

# Words kept by a tokenizer: about 25 MB when full. Longer ones are rarely met twice.
MAX_CACHED_WORDS = 1 << 17
MAX_CACHED_WORD_LENGTH = 64

EncodeFn = Callable[[str], list[int]]
MaskFn = Callable[..., torch.LongTensor]


class _WordIds(dict):
    """word -> its ids packed in bytes, worked out when a word is first met; emptied when it is full."""

    def __init__(self, encode_word: Callable[[str], bytes]) -> None:
        super().__init__()
        self._encode_word = encode_word

    def __missing__(self, word: str) -> bytes:
        packed = self._encode_word(word)
        if len(word) <= MAX_CACHED_WORD_LENGTH:
            if len(self) >= MAX_CACHED_WORDS:
                self.clear()
            self[word] = packed
        return packed


class SimpleTokenizer:
    """CLIP's byte-pair tokenizer.

    Args:
        bpe_path: merges file, gzipped or plain. It is read when first needed, and once a process.
        additional_special_tokens: strings that are one token each, with ids after those of the usual two.
        context_length: columns of what `__call__` returns; None where every call gives its own.
        clean: `lower`, `whitespace` or `canonicalize`.
        reduction_mask: how a caption that is too long is shortened: "" keeps its beginning, `simple` a random stretch,
            `random` a random subset in order, `shuffle` one in random order, `syntax` nouns before adjectives before
            verbs before the rest (these masks are from CLIPA, Li et al. 2023, arXiv:2305.07017).

    Raises:
        FileNotFoundError: there is no file at `bpe_path`.
        ValueError: there is no such `clean` or `reduction_mask`.
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
            pass  # a wrong path is said here, not at the first caption
        self.special_tokens = tuple(dict.fromkeys([*DEFAULT_SPECIAL_TOKENS, *(additional_special_tokens or ())]))
        self.context_length = context_length
        self.clean_fn = get_clean_fn(clean)
        self.reduction_fn = get_reduction_mask_fn(reduction_mask) if reduction_mask else None

    def __getstate__(self) -> dict:
        # What a worker process can work out again stays here: the cached properties, word ids among them.
        return {name: value for name, value in vars(self).items() if not hasattr(type(self), name)}

    @cached_property
    def _table(self) -> MergeTable:
        return load_merges(self.bpe_path)

    @cached_property
    def encoder(self) -> dict[str, int]:
        """Symbol, as in the merges file, or special token -> id."""
        return {symbol: i for i, symbol in enumerate([*self._table.symbols, *self.special_tokens])}

    @cached_property
    def decoder(self) -> dict[int, str]:
        """id -> symbol, as in the merges file, or special token."""
        return {i: symbol for symbol, i in self.encoder.items()}

    @cached_property
    def bpe_ranks(self) -> dict[tuple[str, str], int]:
        """Pair of symbols -> when it was learnt, counted from 0."""
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

    @cached_property
    def sot_token_id(self) -> int:
        return self.all_special_ids[0]

    @cached_property
    def eot_token_id(self) -> int:
        return self.all_special_ids[1]

    @cached_property
    def _typecode(self) -> str:
        """Of ids in packed bytes, for array and numpy: the narrowest unsigned type that holds the vocabulary."""
        return "H" if self.vocab_size <= 1 << 16 else "I"

    @cached_property
    def _specials_are_words(self) -> bool:
        """Whether text may be cut at white space before special tokens are looked for."""
        return not any(re.search(r"\s", token) for token in self.special_tokens)

    @cached_property
    def _find_ascii(self) -> Callable[[str], list[str]]:
        """Cuts ASCII text into tokens as `pat` does, with the standard library's quicker engine."""
        return re.compile(self._pattern("[a-z]+", "[0-9]", r"[^\sa-z0-9]+"), re.IGNORECASE | re.ASCII).findall

    @cached_property
    def pat(self) -> Any:
        """The pattern of special tokens, contractions, runs of letters, single digits and runs of the rest."""
        import regex

        return regex.compile(self._pattern(r"[\p{L}]+", r"[\p{N}]", r"[^\s\p{L}\p{N}]+"), regex.IGNORECASE)

    @cached_property
    def cache(self) -> dict[str, str]:
        """What `bpe` returned so far, by token."""
        return {token: token for token in self.special_tokens}

    def _pattern(self, letters: str, digit: str, rest: str) -> str:
        specials = [re.escape(token) for token in self.special_tokens]
        return "|".join([*specials, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", letters, digit, rest])

    @cached_property
    def _letters_are_a_token(self) -> bool:
        """Whether a word of ASCII letters is one token: no added special token can begin inside it."""
        return len(self.special_tokens) == len(DEFAULT_SPECIAL_TOKENS)

    def _word_to_ids(self, word: str) -> list[int]:
        if self._letters_are_a_token and word.isalpha() and word.isascii():
            return self._table.encode(word)
        ids: list[int] = []
        for token in self._find_ascii(word) if word.isascii() else self.pat.findall(word):
            special = self._special_ids.get(token)
            if special is not None:
                ids.append(special)
            else:
                ids += self._table.encode(token)
        return ids

    def _pack(self, ids: list[int]) -> bytes:
        return array(self._typecode, ids).tobytes()

    @cached_property
    def _word_ids(self) -> _WordIds:
        return _WordIds(lambda word: self._pack(self._word_to_ids(word)))

    def _encode_packed(self, text: str) -> bytes:
        if self._specials_are_words:
            return b"".join(map(self._word_ids.__getitem__, get_words_fn(self.clean_fn)(text)))
        return self._pack(self._word_to_ids(self.clean_fn(text)))

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, cleaned, without start and end of text."""
        return np.frombuffer(self._encode_packed(text), self._typecode).tolist()

    def bpe(self, token: str) -> str:
        """The symbols of a token, between spaces. The token is spelled in the characters of `bytes_to_unicode`."""
        if token not in self.cache:
            text = bytes(self.byte_decoder[char] for char in token)
            self.cache[token] = " ".join(self._table.symbols[i] for i in self._table.merge(text))
        return self.cache[token]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids (ints or 0-d tensors, or a tensor [L]), with a space after each word.

        Bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = ids_to_list(tokens)
        try:
            return b"".join(map(self._id_to_bytes.__getitem__, ids)).decode("utf-8", errors="replace")
        except (KeyError, TypeError):
            bad = next(i for i in ids if not isinstance(i, int) or i not in self._id_to_bytes)
            raise ValueError(f"{bad!r} is not an id of this vocabulary: ints from 0 to {self.vocab_size - 1}") from None

    @cached_property
    def _id_to_bytes(self) -> dict[int, bytes]:
        table = {}
        for i, symbol in enumerate(self._table.symbols):
            text = bytes(self.byte_decoder[char] for char in symbol.removesuffix(WORD_END))
            table[i] = text + b" " if symbol.endswith(WORD_END) else text
        return table | {i: token.encode() for token, i in self._special_ids.items()}

    def __call__(self, texts: str | Iterable[str], context_length: int | None = None) -> torch.LongTensor:
        """Ids between start and end of text, padded with 0, cut so that end of text is the last.

        Args:
            texts: one caption or several.
            context_length: columns of the answer; the tokenizer's own by default.

        Returns:
            LongTensor [N, context_length].

        Raises:
            ValueError: neither the call nor the tokenizer has a context length, or it is negative.
            TypeError: a caption is not a str.
        """
        context_length = _check_context_length(context_length or self.context_length)
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
        # (start + ids)[:-1 column] + end, zeros up to the row's end; in a row of one column only the end is left.
        room, encode = row_bytes - len(end), self._encode_packed
        rows = [((start + encode(text))[:room] + end).ljust(row_bytes, b"\0") for text in texts]
        return _to_tensor(np.frombuffer(b"".join(rows), self._typecode), context_length)


def _check_context_length(context_length: int | None) -> int:
    if not context_length or context_length < 0:
        raise ValueError(
            f"context_length={context_length!r}: give a positive number of tokens, to the tokenizer or to its call"
        )
    return context_length


def _to_tensor(ids: np.ndarray, context_length: int) -> torch.LongTensor:
    return torch.from_numpy(ids.astype(np.int64).reshape(-1, context_length))  # type: ignore[return-value]


def _fill_rows(rows: list[list[int]], context_length: int, sot_token_id: int, eot_token_id: int) -> torch.LongTensor:
    """LongTensor [N, context_length] of start, ids, end, zeros; rows that are too long lose ids from before the end."""
    filled = np.zeros((len(rows), context_length), np.int64)
    for line, ids in zip(filled, rows, strict=True):
        row = [*[sot_token_id, *ids][: context_length - 1], eot_token_id]
        line[: len(row)] = row
    return _to_tensor(filled, context_length)


def _encode_all(texts: str | Iterable[str], encode_fn: EncodeFn) -> list[list[int]]:
    return [encode_fn(text) for text in ([texts] if isinstance(texts, str) else texts)]


def simple_mask_tokenize(
    texts: str | Iterable[str], context_length: int, sot_token_id: int, eot_token_id: int, encode_fn: EncodeFn
) -> torch.LongTensor:
    """Captions that are too long keep a stretch of `context_length - 2` tokens, begun anywhere (Python's `random`)."""
    keep = max(_check_context_length(context_length) - 2, 0)
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
    """Captions that are too long keep `context_length - 2` tokens drawn without replacement (torch's CPU generator).

    They stay in order, or with `shuffle` come in the order drawn.
    """
    keep = max(_check_context_length(context_length) - 2, 0)
    rows = _encode_all(texts, encode_fn)
    for i, ids in enumerate(rows):
        if len(ids) > keep:
            drawn = torch.randperm(len(ids))[:keep].tolist()
            rows[i] = [ids[k] for k in (drawn if shuffle else sorted(drawn))]
    return _fill_rows(rows, context_length, sot_token_id, eot_token_id)


def syntax_mask_tokenize(
    texts: str | Iterable[str], context_length: int, sot_token_id: int, eot_token_id: int, encode_fn: EncodeFn
) -> torch.LongTensor:
    """Captions keep `context_length - 2` words, nouns rather than adjectives, verbs, and others; then as many tokens.

    Raises:
        RuntimeError: nltk or its data, which say what kind of word each is, are missing.
    """
    keep = max(_check_context_length(context_length) - 2, 0)
    rows = []
    for text in [texts] if isinstance(texts, str) else texts:
        tagged = _tag_words(text)
        by_kind = sorted(range(len(tagged)), key=lambda k: _KIND_RANK.get(tagged[k][1][:2], len(_KIND_RANK)))
        rows.append(encode_fn(" ".join(tagged[k][0] for k in sorted(by_kind[:keep]))))
    return _fill_rows(rows, context_length, sot_token_id, eot_token_id)


_KIND_RANK = {"NN": 0, "JJ": 1, "VB": 2}  # Penn Treebank tags by their first two letters


def _tag_words(text: str) -> list[tuple[str, str]]:
    """(word, Penn Treebank tag) of each word of a caption."""
    try:
        import nltk
    except ImportError as error:
        raise RuntimeError("reduction_mask='syntax' asks nltk for kinds of words: pip install nltk") from error
    try:
        return nltk.pos_tag(nltk.word_tokenize(text))
    except LookupError as error:
        raise RuntimeError(
            "reduction_mask='syntax' needs nltk's data, which are not there: "
            "python -m nltk.downloader punkt punkt_tab averaged_perceptron_tagger averaged_perceptron_tagger_eng"
        ) from error


_MASK_FNS: dict[str, MaskFn] = {
    "simple": simple_mask_tokenize,
    "random": random_mask_tokenize,
    "shuffle": partial(random_mask_tokenize, shuffle=True),
    "syntax": syntax_mask_tokenize,
}


def get_reduction_mask_fn(type: str) -> MaskFn:
    """The reduction mask of that name: `simple`, `random`, `shuffle` or `syntax`.

    Raises:
        ValueError: there is none of that name.
    """
    if type not in _MASK_FNS:
        raise ValueError(f"reduction_mask={type!r} is not known; choose from {', '.join(_MASK_FNS)}, or '' for none")
    return _MASK_FNS[type]


_tokenizer = SimpleTokenizer()


def decode(output_ids: torch.Tensor) -> str:
    """Text of ids [L] of the default tokenizer."""
    return _tokenizer.decode(output_ids)


def tokenize(texts: str | Iterable[str], context_length: int = DEFAULT_CONTEXT_LENGTH) -> torch.LongTensor:
    """LongTensor [N, context_length] of the default tokenizer; see `SimpleTokenizer.__call__`."""
    return _tokenizer(texts, context_length=context_length)
