"""Byte-level byte-pair encoding over the merges file of OpenAI's CLIP (Radford et al. 2021, arXiv:2103.00020).

A token is spelled in bytes, its last byte marked as a word's end (`</w>`), and the adjacent pair that was learnt first
is joined until no pair is left that was learnt (Sennrich et al. 2016, arXiv:1508.07909). Ids in order: 256 bytes,
the 256 bytes that end a word, the merges in the order they were learnt, special tokens. A merge's id is therefore its
rank, and the merge loop works on ids alone: `after[left].get(right)` is the rank to compare and the symbol to write.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

WORD_END = "</w>"
# The ids of CLIP's text towers end at 49152 + 256: this many merges of the file (which holds more) are in use.
NUM_MERGES = 49152 - 256 - 2
NO_MERGE = 1 << 62


@lru_cache
def default_bpe() -> str:
    """Path of the merges file that ships with the package."""
    return str(Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz"))


@lru_cache
def bytes_to_unicode() -> dict[int, str]:
    """Printable stand-in of each of the 256 bytes, in the order of their ids: merges files are text, and bytes are not.

    Printable Latin-1 stands for itself; the rest takes the code points from 256 on (the alphabet of GPT-2's tokenizer).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(printable))
    return alphabet


def get_pairs(word: Iterable[str]) -> set[tuple[str, str]]:
    """The set of adjacent symbols of a word (a str, or a sequence of symbols)."""
    return set(pairwise(word))


@dataclass
class MergeTable:
    """What a merges file says. `symbols[i]` is the text of id i; `after[left][right]` the id that the pair becomes.

    `words` has the ids of whole words that are one symbol, where looking a word up is known to give what merging gives
    (it depends on the merges: the unit tests prove it for the shipped file, so it is filled for that file alone).
    """

    symbols: list[str]
    merges: list[tuple[str, str]]
    after: list[dict[int, int]] = field(repr=False)
    first_ids: bytes = field(repr=False)  # id of each byte, for bytes.translate
    words: dict[str, int] = field(repr=False)

    def encode(self, token: str) -> list[int]:
        """Ids of one token (a piece of text that ends a word); an empty token has none."""
        whole = self.words.get(token)
        return [whole] if whole is not None else self.merge(token.encode("utf-8"))

    def merge(self, token: bytes) -> list[int]:
        """Ids of one token by joining pairs, from bytes."""
        ids = list(token.translate(self.first_ids))
        if not ids:
            return []
        ids[-1] += 256
        after = self.after
        ranks = [after[left].get(right, NO_MERGE) for left, right in pairwise(ids)]
        # One join at a time, the leftmost first. A symbol's own merges come after the merge that made it (checked when
        # the file is read), so a join never brings up a better pair than the one being joined, and this is the same as
        # joining every occurrence of the best pair before looking again.
        while ranks:
            best = min(ranks)
            if best == NO_MERGE:
                break
            i = ranks.index(best)
            ids[i] = best
            del ids[i + 1], ranks[i]
            if i < len(ranks):
                ranks[i] = after[best].get(ids[i + 1], NO_MERGE)
            if i:
                ranks[i - 1] = after[ids[i - 1]].get(best, NO_MERGE)
        return ids


def load_merges(path: str) -> MergeTable:
    """Read a merges file, plain or gzipped: a header line, then two symbols a line. Cached by path, size and time.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not two known symbols, or makes a symbol twice.
    """
    stat = Path(path).stat()
    return _read_merges(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _read_merges(path: str, size: int, modified_ns: int) -> MergeTable:
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    lines = data.decode("utf-8").split("\n", NUM_MERGES + 1)[1 : NUM_MERGES + 1]
    if lines and not lines[-1]:  # the newline that ends a shorter file
        lines.pop()
    alphabet = bytes_to_unicode()
    symbols = [*alphabet.values(), *(char + WORD_END for char in alphabet.values())]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    no_merges: dict[int, int] = {}  # shared by all symbols that nothing follows
    after = [no_merges] * (len(symbols) + len(lines))
    merges = []
    for new_id, line in enumerate(lines, start=len(symbols)):
        left, _, right = line.rstrip("\r").partition(" ")
        symbol = left + right
        if left not in ids or right not in ids or symbol in ids:
            reason = "makes a symbol that an earlier line made" if symbol in ids else "is not two symbols known by then"
            raise ValueError(
                f"{path}, line {new_id - 510}: {line!r} {reason}; give a byte-pair merges file like {default_bpe()}"
            )
        merges.append((left, right))
        ids[symbol] = new_id
        symbols.append(symbol)
        left_id = ids[left]
        if after[left_id] is no_merges:
            after[left_id] = {}
        after[left_id][ids[right]] = new_id
    first_ids = bytearray(256)
    for i, byte in enumerate(alphabet):
        first_ids[byte] = i
    words = {}
    if path == default_bpe():
        words = {s.removesuffix(WORD_END): i for s, i in ids.items() if s.endswith(WORD_END) and s.isascii()}
    return MergeTable(symbols, merges, after, bytes(first_ids), words)
