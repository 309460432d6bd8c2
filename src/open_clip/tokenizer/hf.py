"""Tokenizers of Hugging Face's transformers with the interface of `SimpleTokenizer`.

The tokenizer's files come from a local folder, the hub's cache or the hub. transformers is imported when a tokenizer is
created.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..formats.whole_file import replacing
from ..hf_configs import import_transformers, unavailable
from ..pretrained import download_pretrained_from_url
from .cleaning import basic_clean, canonicalize_text, get_clean_fn

TOKENIZER_FILES = "tokenizer.json and tokenizer_config.json (or the model file they are made from: spiece.model, ...)"
MODES = ("", "clips")


class HFTokenizer:
    """A tokenizer of transformers that cleans captions first.

    Padding is on the side that the tokenizer's files name. `padding_side="right"` changes it.

    Args:
        tokenizer_name: a folder with the tokenizer's files, or a repository on the hub.
        context_length: number of columns that `__call__` returns. None: every call must pass it.
        clean: a cleaning of `get_clean_fn`, such as `canonicalize` (lower case without punctuation).
        strip_sep_token: replace the separator's id by 0.
        language: language code of the captions, for tokenizers that mark it (NLLB: "fra_Latn").
        cache_dir: folder for downloads; the hub's cache by default.
        tokenizer_mode: "" for the special tokens that the tokenizer adds itself; "clips" for start of text, text, end
            of text, padding, class token (CLIPS, arXiv:2411.16828).
        kwargs: passed to transformers' AutoTokenizer.from_pretrained.

    Raises:
        ImportError: transformers is not installed, or too old.
        RuntimeError: the files cannot be found or downloaded.
        ValueError: `clean`, `tokenizer_mode` or `language` is unknown, or the tokenizer lacks a token that they need.
    """

    variable_text = False  # True: the model's configuration asks for batches padded to their longest caption

    def __init__(
        self,
        tokenizer_name: str,
        context_length: int | None = 77,
        clean: str = "whitespace",
        strip_sep_token: bool = False,
        language: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        tokenizer_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.tokenizer_mode = tokenizer_mode or ""
        if self.tokenizer_mode not in MODES:
            raise ValueError(f"tokenizer_mode={tokenizer_mode!r} is unknown. Choose '' or 'clips'.")
        self.context_length = context_length
        self.clean_fn = get_clean_fn(clean)
        self.strip_sep_token = strip_sep_token
        self.tokenizer = _load_tokenizer(tokenizer_name, cache_dir=cache_dir, **kwargs)
        needed = ["pad", *(["sep"] if strip_sep_token else [])]
        needed += ["bos", "eos", "cls"] if self.tokenizer_mode == "clips" else []
        missing = [name for name in needed if getattr(self.tokenizer, f"{name}_token_id") is None]
        if missing:
            raise ValueError(
                f"The tokenizer {tokenizer_name!r} has no token for {', '.join(missing)}, which "
                f"strip_sep_token={strip_sep_token} and tokenizer_mode={self.tokenizer_mode!r} need. "
                f"Name one, for example {missing[0]}_token='<{missing[0]}>'."
            )
        if language is not None:
            self.set_language(language)

    def save_pretrained(self, dest: str | os.PathLike) -> None:
        """Write the tokenizer's files into the folder `dest`. HFTokenizer(dest) reads them."""
        _save_tokenizer(self.tokenizer, dest)

    def set_language(self, src_lang: str) -> None:
        """Set the language of the captions that follow. Warn if the tokenizer does not mark languages.

        Raises:
            ValueError: the tokenizer does not know the language.
        """
        if not hasattr(self.tokenizer, "src_lang"):
            warnings.warn(
                f"Cannot set language for the tokenizer: it does not mark languages, so {src_lang!r} has no effect.",
                stacklevel=2,
            )
            return
        before = self.tokenizer.src_lang
        try:
            self.tokenizer.src_lang = src_lang
            is_known = getattr(self.tokenizer, "cur_lang_code", None) != self.tokenizer.unk_token_id
        except KeyError:
            is_known = False
        if not is_known:
            self.tokenizer.src_lang = before
            raise ValueError(f"The tokenizer does not know the language {src_lang!r}. It remains {before!r}.")

    @property
    def pad_token_id(self) -> int:
        """The id of padding."""
        return self.tokenizer.pad_token_id

    @property
    def sot_token_id(self) -> int | None:
        """The id that starts a text: bos, else cls. None if the tokenizer has neither."""
        return _first_known(self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)

    bos_token_id = sot_token_id

    @property
    def eot_token_id(self) -> int | None:
        """The id that ends a text: eos, else sep. None if the tokenizer has neither."""
        return _first_known(self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)

    eos_token_id = eot_token_id

    @property
    def vocab_size(self) -> int:
        """The number of ids, including added tokens."""
        return len(self.tokenizer)

    def __call__(self, texts: str | Iterable[str], context_length: int | None = None, pad: bool = True) -> Any:
        """Tokenize captions; pad and truncate to `context_length`, with the special tokens of the mode.

        Args:
            texts: one caption or several.
            context_length: number of columns; the tokenizer's `context_length` by default.
            pad: False returns the ids of each caption without padding.

        Returns:
            int64 [batch, context_length], or with `pad=False` a list of lists of ids.

        Raises:
            ValueError: neither the call nor the tokenizer has a context length, or `pad` is False with the mode clips,
                whose last token is after the padding.
            TypeError: a caption is not a str.
        """
        context_length = context_length or self.context_length
        if not context_length:
            raise ValueError("No context_length. Pass a positive number of tokens to the tokenizer or to the call.")
        if not pad and self.tokenizer_mode == "clips":
            raise ValueError(
                "pad=False is not possible with tokenizer_mode='clips': its class token follows the padding."
            )
        texts = [self.clean_fn(text) for text in ([texts] if isinstance(texts, str) else texts)]
        if not pad:
            return self._unpadded_ids(texts, context_length)
        if not texts:
            return torch.zeros(0, context_length, dtype=torch.int64)
        if self.tokenizer_mode == "clips":
            return self._clips_tokenize(texts, context_length)
        ids = _padded_ids(self.tokenizer, texts, context_length)
        if self.strip_sep_token:
            ids[ids == self.tokenizer.sep_token_id] = 0
        return ids

    def _unpadded_ids(self, texts: list[str], context_length: int) -> list[list[int]]:
        rows = _unpadded_ids(self.tokenizer, texts, context_length)
        if not self.strip_sep_token:
            return rows
        separator = self.tokenizer.sep_token_id
        return [[0 if token == separator else token for token in row] for row in rows]

    def _clips_tokenize(self, texts: list[str], context_length: int) -> torch.LongTensor:
        special = self.tokenizer
        rows = []
        for ids in special(texts, add_special_tokens=False)["input_ids"]:
            row = [special.bos_token_id, *ids[: max(context_length - 3, 0)], special.eos_token_id][: context_length - 1]
            padding = [special.pad_token_id] * (context_length - 1 - len(row))
            rows.append([*row, *padding, special.cls_token_id])
        return torch.tensor(rows)  # type: ignore[return-value]

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode ids (ints, 0-d tensors, or one tensor [length]) to text without special tokens."""
        return self.tokenizer.decode(ids_to_list(tokens), skip_special_tokens=True)


class SigLipTokenizer:
    """A tokenizer made from a sentencepiece vocabulary of T5 or Gemma, as SigLIP uses it (arXiv:2303.15343).

    Captions are canonicalized, then an end token and padding are added. The SigLIP models name tokenizers that
    HFTokenizer reads; this class serves scripts that have the vocabulary file alone.

    Args:
        tokenizer_name: a key of VOCAB_FILES, which is downloaded, or the path of a sentencepiece model file. A file of
            Gemma needs "gemma" in its name.
        context_length: number of columns that `__call__` returns.

    Raises:
        ImportError: transformers is not installed, or too old.
        RuntimeError: the file cannot be found or downloaded.
    """

    VOCAB_FILES = {  # noqa: RUF012  a constant, with the name that open_clip gave it
        "c4-en": "https://storage.googleapis.com/t5-data/vocabs/cc_en.32000/sentencepiece.model",
        "mc4": "https://storage.googleapis.com/t5-data/vocabs/mc4.250000.100extra/sentencepiece.model",
        "gemma": "https://storage.googleapis.com/big_vision/gemma_tokenizer.model",
    }

    def __init__(self, tokenizer_name: str, context_length: int | None = 64) -> None:
        self.context_length = context_length
        path = Path(_vocabulary_file(tokenizer_name, self.VOCAB_FILES))
        transformers = import_transformers("SigLipTokenizer")
        is_gemma = "gemma" in Path(tokenizer_name).name.lower()
        tokenizer_class, file_name, options = (
            (transformers.GemmaTokenizer, "tokenizer.model", {"add_bos_token": False, "add_eos_token": True})
            if is_gemma
            else (transformers.T5Tokenizer, "spiece.model", {"extra_ids": 0})
        )
        with tempfile.TemporaryDirectory() as folder:  # transformers expects the usual file name
            shutil.copy(path, Path(folder, file_name))
            self.tokenizer = tokenizer_class.from_pretrained(folder, padding_side="right", **options)
        self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(0 if is_gemma else 1)

    def save_pretrained(self, dest: str | os.PathLike) -> None:
        """Write the tokenizer's files into the folder `dest`. HFTokenizer(dest) reads them."""
        _save_tokenizer(self.tokenizer, dest)

    @property
    def pad_token_id(self) -> int:
        """The id of padding."""
        return self.tokenizer.pad_token_id

    def __call__(self, texts: str | Iterable[str], context_length: int | None = None, pad: bool = True) -> Any:
        """Tokenize captions to int64 [batch, context_length]. Arguments and errors are those of HFTokenizer."""
        context_length = context_length or self.context_length
        if not context_length:
            raise ValueError("No context_length. Pass a positive number of tokens to the tokenizer or to the call.")
        texts = [canonicalize_text(basic_clean(text)) for text in ([texts] if isinstance(texts, str) else texts)]
        if not pad:
            return _unpadded_ids(self.tokenizer, texts, context_length)
        if not texts:
            return torch.zeros(0, context_length, dtype=torch.int64)
        return _padded_ids(self.tokenizer, texts, context_length)


def ids_to_list(tokens: Iterable[Any]) -> list[Any]:
    """Convert ids (a tensor, an array, or a sequence of ints and 0-d tensors) to a list of ints."""
    if isinstance(tokens, (torch.Tensor, np.ndarray)):
        return tokens.tolist()
    return [token.item() if isinstance(token, torch.Tensor) and token.ndim == 0 else token for token in tokens]


def _padded_ids(tokenizer: Any, texts: list[str], context_length: int) -> torch.LongTensor:
    encoded = tokenizer(texts, return_tensors="pt", max_length=context_length, padding="max_length", truncation=True)
    return encoded["input_ids"]


def _unpadded_ids(tokenizer: Any, texts: list[str], context_length: int) -> list[list[int]]:
    return tokenizer(texts, max_length=context_length, truncation=True)["input_ids"] if texts else []


def _first_known(*ids: int | None) -> int | None:
    return next((token for token in ids if token is not None), None)


def _load_tokenizer(name: str, **kwargs: Any) -> Any:
    transformers = import_transformers(f"The tokenizer {name!r}", minimal="4.0")
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, ImportError) as error:  # which one depends on the missing file
        raise unavailable(
            "The tokenizer", name, TOKENIZER_FILES, error, others="Or set hf_tokenizer_name in text_cfg."
        ) from error


def _save_tokenizer(tokenizer: Any, dest: str | os.PathLike) -> None:
    """Write the files of a transformers tokenizer. Each replaces an existing file atomically."""
    with tempfile.TemporaryDirectory() as folder:  # transformers would overwrite existing files in place
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            target = Path(dest, file.relative_to(folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                shutil.copyfile(file, temporary)


def _vocabulary_file(name: str, known: dict[str, str]) -> str:
    if name in known:
        try:
            return download_pretrained_from_url(known[name])
        except RuntimeError as error:
            raise RuntimeError(f"{error} (Or pass its path to SigLipTokenizer.)") from error
    if not os.path.isfile(name):
        raise RuntimeError(f"{name!r} is neither a sentencepiece model file nor one of {', '.join(known)}.")
    return name
