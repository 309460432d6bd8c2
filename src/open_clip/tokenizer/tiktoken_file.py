"""Vocabulary files of tiktoken: which encodings there are, where their files are found, and how they are read.

A file has one token per line: its bytes in base64, and its rank, which is also its id. Files are searched for on this
machine only, and verified by their sha256.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ..pretrained.download import DEFAULT_CACHE_DIR
from .bpe import merge_pairs

# The splitting patterns, for the package regex. GPT-2's (Radford et al. 2019), and the one of GPT-4.
_GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT_4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Encoding:
    """An encoding of tiktoken.

    Attributes:
        name: name in tiktoken.
        size: number of ids, including tiktoken's special tokens, which this project never uses.
        pattern: regular expression that splits a text into the pieces whose bytes are merged.
        sha256: checksum of the vocabulary file.
        file_names: names of the file: tiktoken's own, that of other packages, and that in tiktoken's cache (the sha1 of
            the address that tiktoken downloads it from).
    """

    name: str
    size: int
    pattern: str
    sha256: str
    file_names: tuple[str, ...]


ENCODINGS = {
    encoding.name: encoding
    for encoding in (
        Encoding(
            "r50k_base",
            50257,
            _GPT_2,
            "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
            ("r50k_base.tiktoken", "gpt2.tiktoken", "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"),
        ),
        Encoding(
            "cl100k_base",
            100277,
            _GPT_4,
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
            ("cl100k_base.tiktoken", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"),
        ),
    )
}


def get_encoding(name: str) -> Encoding:
    """Return the encoding named `name`.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in ENCODINGS:
        raise ValueError(f"The tiktoken encoding {name!r} is not supported. Choose from {', '.join(ENCODINGS)}.")
    return ENCODINGS[name]


def find_file(
    encoding: Encoding, path: str | os.PathLike | None = None, cache_dir: str | os.PathLike | None = None
) -> Path:
    """Return the path of the vocabulary file of an encoding.

    Args:
        path: the file, or a folder that has it. None: search `cache_dir`, the folders that tiktoken caches files in
            (TIKTOKEN_CACHE_DIR, DATA_GYM_CACHE_DIR, data-gym-cache in the folder of temporary files), and the cache of
            downloaded weights.

    Raises:
        FileNotFoundError: the file is not there.
    """
    if path is not None and os.path.isfile(path):
        return Path(path)
    folders = _search_folders(cache_dir) if path is None else [Path(path)]
    for folder in folders:
        for name in encoding.file_names:
            if (folder / name).is_file():
                return folder / name
    where = f"{os.fspath(path)!r}" if path is not None else ", ".join(map(str, folders))
    file_name = encoding.file_names[0]
    raise FileNotFoundError(
        f"The vocabulary file {file_name} of tiktoken's encoding {encoding.name!r} is not found (looked in {where}). "
        f"Put it (sha256 {encoding.sha256}) into one of these folders or into the folder TIKTOKEN_CACHE_DIR, or pass "
        f'its path, in a model configuration as "tokenizer_kwargs": {{"path": FILE}}. On a machine with a network, '
        f"python -c \"import tiktoken; tiktoken.get_encoding('{encoding.name}')\" writes it into tiktoken's cache "
        f"under the name {encoding.file_names[-1]}."
    )


def _search_folders(cache_dir: str | os.PathLike | None) -> list[Path]:
    temporary = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    variables = (os.environ.get("TIKTOKEN_CACHE_DIR"), os.environ.get("DATA_GYM_CACHE_DIR"))
    folders = [cache_dir, *variables, temporary, DEFAULT_CACHE_DIR]
    return list(dict.fromkeys(Path(folder).expanduser() for folder in folders if folder))


@dataclass
class RankTable:
    """The contents of a vocabulary file.

    Attributes:
        ids: id of each token, which is its rank.
        after: `after[left][right]` is the id of the token that is `left` followed by `right`.
        first_ids: id of each byte, as a table for bytes.translate.
    """

    ids: dict[bytes, int]
    after: list[dict[int, int]] = field(repr=False)
    first_ids: bytes = field(repr=False)

    def encode(self, piece: str) -> list[int]:
        """Encode one piece of text. Raises UnicodeEncodeError if it has a surrogate."""
        data = piece.encode("utf-8")
        whole = self.ids.get(data)
        return [whole] if whole is not None else merge_pairs(list(data.translate(self.first_ids)), self.after)


def load_ranks(path: str | os.PathLike, encoding: Encoding) -> RankTable:
    """Read and verify the vocabulary file of an encoding. The result is cached by path, size and modification time.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not the vocabulary of the encoding.
    """
    stat = os.stat(path)
    return _read_ranks(os.fspath(path), encoding, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _read_ranks(path: str, encoding: Encoding, size: int, modified_ns: int) -> RankTable:
    data = Path(path).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != encoding.sha256:
        raise ValueError(
            f"{path} is damaged, or not the vocabulary of the encoding {encoding.name!r}: its sha256 is {digest}, not "
            f"{encoding.sha256}. Replace it by {encoding.file_names[0]} of tiktoken."
        )
    return parse_ranks(data.splitlines(), path)


def parse_ranks(lines: Sequence[bytes], path: str = "vocabulary") -> RankTable:
    """Build the table of the lines of a vocabulary file.

    Raises:
        ValueError: a line is not a token and its rank, or the ids of the 256 bytes are not 0 to 255 in some order.
    """
    ids: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ids[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}, line {number}: {line[:80]!r} is not a token in base64 and its rank.") from error
    singles = [ids.get(bytes([byte]), -1) for byte in range(256)]
    if sorted(singles) != list(range(256)):
        raise ValueError(f"{path} does not give the ranks 0 to 255 to the 256 bytes, as vocabularies of tiktoken do.")
    no_pairs: dict[int, int] = {}  # shared by all tokens that start no pair
    after = [no_pairs] * (max(ids.values()) + 1)
    for token, new_id in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                if after[left] is no_pairs:
                    after[left] = {}
                after[left][right] = new_id
    return RankTable(ids, after, bytes(singles))
