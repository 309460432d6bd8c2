"""The encodings of OpenAI's tiktoken, from a local vocabulary file and without the package tiktoken.

A text is split into pieces by a regular expression, and the bytes of each piece are merged (see `bpe.merge_pairs`). As
in `SimpleTokenizer`, the ids of each word are cached as packed bytes.
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.whole_file import replacing
from .bpe import WordIds
from .cleaning import get_clean_fn
from .hf import ids_to_list
from .masks import check_context_length, to_tensor
from .tiktoken_file import RankTable, find_file, get_encoding, load_ranks


class TikTokenTokenizer:
    """A tokenizer with the ids of a tiktoken encoding, and three control ids above them.

    The control ids follow the ids of the encoding: end of text, padding, start of text (50257, 50258, 50259 for
    r50k_base). Text that looks like a special token of tiktoken, such as `<|endoftext|>`, is encoded as ordinary text.

    Args:
        encoding_name: `r50k_base` (GPT-2, GPT-3) or `cl100k_base` (GPT-4).
        context_length: maximum number of tokens per caption. None: every call must pass it.
        add_bos: start each caption with `sot_token_id`.
        add_eos: end each caption with `eot_token_id`, also one that is truncated.
        clean: a cleaning of `get_clean_fn`, such as `whitespace`. None leaves captions unchanged.
        path: the vocabulary file, or a folder that has it. By default it is searched for, see
            `tiktoken_file.find_file`. It is read on first use, once per process.
        cache_dir: a further folder to search.

    Raises:
        FileNotFoundError: the vocabulary file is not on this machine.
        ValueError: `encoding_name` or `clean` is unknown.
    """

    variable_text = False  # True: the model's configuration asks for batches padded to their longest caption

    def __init__(
        self,
        encoding_name: str = "cl100k_base",
        context_length: int | None = 77,
        add_bos: bool = True,
        add_eos: bool = True,
        clean: str | None = None,
        path: str | os.PathLike | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> None:
        self.encoding = get_encoding(encoding_name)
        self.path = str(find_file(self.encoding, path, cache_dir))
        self.context_length = context_length
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.clean_fn = get_clean_fn(clean) if clean else _unchanged
        self.eot_token_id = self.eos_token_id = self.encoding.size
        self.pad_token_id = self.encoding.size + 1
        self.sot_token_id = self.bos_token_id = self.encoding.size + 2
        self.vocab_size = self.encoding.size + 3
        self.all_special_ids = [self.eot_token_id, self.pad_token_id, self.sot_token_id]
        self._typecode = "H" if self.vocab_size <= 1 << 16 else "I"

    def __getstate__(self) -> dict:
        # Do not pickle cached properties (the word caches among them): a worker process recomputes them.
        return {name: value for name, value in vars(self).items() if not hasattr(type(self), name)}

    @cached_property
    def _table(self) -> RankTable:
        return load_ranks(self.path, self.encoding)

    @cached_property
    def _split(self) -> Callable[[str], list[str]]:
        import regex

        return regex.compile(self.encoding.pattern).findall

    @cached_property
    def _first_word_ids(self) -> WordIds:
        return WordIds(self._encode_pieces)

    @cached_property
    def _word_ids(self) -> WordIds:
        return WordIds(lambda word: self._encode_pieces(" " + word))

    def _pack(self, ids: list[int]) -> bytes:
        return array(self._typecode, ids).tobytes()

    def _encode_pieces(self, text: str) -> bytes:
        encode = self._table.encode
        return self._pack([token for piece in self._split(text) for token in encode(piece)])

    def _encode_packed(self, text: str) -> bytes:
        if not isinstance(text, str):
            raise TypeError(f"A caption must be a str, got {type(text).__name__}: {repr(text)[:80]}.")
        text = self.clean_fn(text)
        words = text.split()
        try:
            # If single spaces separate the words, a piece is part of one word and of the space before it: the patterns
            # have white space only at the start of a piece, except in pieces that are white space.
            if words and " ".join(words) == text:
                return self._first_word_ids[words[0]] + b"".join(map(self._word_ids.__getitem__, words[1:]))
            return self._encode_pieces(text)
        except UnicodeEncodeError:  # surrogates: join pairs, and replace others by U+FFFD
            return self._encode_pieces(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def encode(self, text: str) -> list[int]:
        """Clean and encode a caption. The ids do not include start and end of text."""
        return np.frombuffer(self._encode_packed(text), self._typecode).tolist()

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode ids (ints, 0-d tensors, or one tensor [length]) to text without control ids.

        Bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = [i for i in ids_to_list(tokens) if i not in self.all_special_ids]
        unknown = [i for i in ids if i not in self._id_to_bytes]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not an id of the encoding {self.encoding.name!r}.")
        return b"".join(map(self._id_to_bytes.__getitem__, ids)).decode("utf-8", errors="replace")

    @cached_property
    def _id_to_bytes(self) -> dict[int, bytes]:
        return {i: token for token, i in self._table.ids.items()}

    def save_pretrained(self, dest: str | os.PathLike) -> None:
        """Copy the vocabulary file into the folder `dest`. TikTokenTokenizer(..., path=dest) finds it there."""
        target = Path(dest, self.encoding.file_names[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            shutil.copyfile(self.path, temporary)

    def __call__(self, texts: str | Iterable[str], context_length: int | None = None, pad: bool = True) -> Any:
        """Tokenize captions: start of text, ids, end of text, and padding with `pad_token_id`.

        Args:
            texts: one caption or several.
            context_length: maximum number of tokens; the tokenizer's `context_length` by default. A longer caption is
                truncated.
            pad: False returns the ids of each caption without padding.

        Returns:
            int64 [batch, context_length], or with `pad=False` a list of lists of ids.

        Raises:
            ValueError: neither the call nor the tokenizer has a context length, or it is negative.
            TypeError: a caption is not a str.
        """
        length = check_context_length(context_length or self.context_length)
        start = self._pack([self.sot_token_id] if self.add_bos else [])
        end = self._pack([self.eot_token_id] if self.add_eos else [])
        padding = self._pack([self.pad_token_id]) * length
        row_bytes, encode = len(padding), self._encode_packed
        max_bytes = row_bytes - len(end)
        rows = [(start + encode(text))[:max_bytes] + end for text in ([texts] if isinstance(texts, str) else texts)]
        if not pad:
            return [np.frombuffer(row, self._typecode).tolist() for row in rows]
        packed = b"".join([row + padding[len(row) :] for row in rows])
        return to_tensor(np.frombuffer(packed, self._typecode), length)


def _unchanged(text: str) -> str:
    return text
