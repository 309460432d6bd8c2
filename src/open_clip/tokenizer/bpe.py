"""Byte-level byte-pair encoding over the merges file of OpenAI's CLIP (Radford et al. 2021, arXiv:2103.00020).

A token is split into bytes, and its last byte is marked as the end of a word (`</w>`). Then the adjacent pair with the
lowest rank is merged until no known pair is left (Sennrich et al. 2016, arXiv:1508.07909). The ids are, in this order:
256 bytes, 256 bytes that end a word, the merges by rank, the special tokens. The id of a merge is therefore its rank
plus 512, and the merge loop works on ids alone: `after[left].get(right)` is both the rank to compare and the new id.
"""

from __future__ import annotations

import gzip
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

WORD_END = "</w>"
# CLIP uses only the first merges of the file: its vocabulary is 512 byte symbols, these merges and 2 special tokens.
NUM_MERGES = 49152 - 256 - 2
NO_MERGE = 1 << 62

LONG_TOKEN = 128  # bytes; from here on, a heap finds the best pair

# Limits of the word cache: about 25 MB when full. Longer words rarely occur twice.
MAX_CACHED_WORDS = 1 << 17
MAX_CACHED_WORD_LENGTH = 64


@lru_cache
def default_bpe() -> str:
    """Return the path of the merges file that ships with the package."""
    return str(Path(__file__).parents[1] / "bpe_simple_vocab_16e6.txt.gz")


@lru_cache
def bytes_to_unicode() -> dict[int, str]:
    """Map each of the 256 bytes to a printable character, in the order of their ids. Merges files use this alphabet.

    Printable Latin-1 characters map to themselves, other bytes to code points from 256 on, as in GPT-2's tokenizer.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(printable))
    return alphabet


def get_pairs(word: Iterable[str]) -> set[tuple[str, str]]:
    """Return the set of pairs of adjacent symbols of a word (a str, or a sequence of symbols)."""
    return set(pairwise(word))


@dataclass
class MergeTable:
    """The contents of a merges file.

    Attributes:
        symbols: text of each id.
        merges: pairs of symbols, by rank.
        after: `after[left][right]` is the id that the pair (left, right) is merged into.
        first_ids: id of each byte, as a table for bytes.translate.
        words: ids of whole words that are one symbol. It is filled for the bundled file only: whether the lookup equals
            merging depends on the merges, and the unit tests prove it for that file.
    """

    symbols: list[str]
    merges: list[tuple[str, str]]
    after: list[dict[int, int]] = field(repr=False)
    first_ids: bytes = field(repr=False)
    words: dict[str, int] = field(repr=False)

    def encode(self, token: str) -> list[int]:
        """Encode one token (a piece of text that ends a word). An empty token has no ids."""
        whole = self.words.get(token)
        return [whole] if whole is not None else self.merge(token.encode("utf-8"))

    def merge(self, token: bytes) -> list[int]:
        """Encode one token, given as bytes, by merging pairs."""
        ids = list(token.translate(self.first_ids))
        if not ids:
            return []
        ids[-1] += 256
        return merge_pairs(ids, self.after)


def merge_pairs(ids: list[int], after: Sequence[Mapping[int, int]]) -> list[int]:
    """Merge the adjacent pair with the lowest rank, leftmost first, until no pair can be merged. Changes `ids`.

    The merges of a symbol of CLIP rank after the merge that made it (checked when the file is read), so a merge never
    creates a pair with a lower rank. There the result is the same as merging all occurrences of the best pair at once.

    Args:
        ids: ids of bytes.
        after: `after[left][right]` is the id that the pair is merged into. It is the rank of the merge, too.
    """
    if len(ids) > LONG_TOKEN:
        return _merge_long(ids, after)
    ranks = [after[left].get(right, NO_MERGE) for left, right in pairwise(ids)]
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


def _merge_long(ids: list[int], after: Sequence[Mapping[int, int]]) -> list[int]:
    """Merge in the same order as `merge_pairs`, in n log n steps instead of n squared."""
    merged = -1
    end = len(ids)
    previous, following = list(range(-1, end - 1)), list(range(1, end + 1))
    heap = [(after[left][right], i) for i, (left, right) in enumerate(pairwise(ids)) if right in after[left]]
    heapq.heapify(heap)

    def push(i: int, k: int) -> None:
        if i >= 0 and k < end and ids[k] in after[ids[i]]:
            heapq.heappush(heap, (after[ids[i]][ids[k]], i))

    while heap:
        best, i = heapq.heappop(heap)
        k = following[i]
        if ids[i] == merged or k == end or after[ids[i]].get(ids[k]) != best:
            continue  # another merge has changed the pair
        ids[i], ids[k] = best, merged
        following[i] = following[k]
        if following[i] < end:
            previous[following[i]] = i
        push(i, following[i])
        push(previous[i], i)
    return [token for token in ids if token != merged]


class WordIds(dict):
    """Cache from a word to its ids, packed as bytes. It is filled on lookup and cleared when full."""

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


def load_merges(path: str) -> MergeTable:
    """Read a merges file, plain or gzipped: a header line, then two symbols per line.

    The result is cached by path, size and modification time.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not two known symbols, or makes a symbol that exists already.
    """
    stat = Path(path).stat()
    return _read_merges(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _read_merges(path: str, size: int, modified_ns: int) -> MergeTable:
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    lines = data.decode("utf-8").split("\n", NUM_MERGES + 1)[1 : NUM_MERGES + 1]
    if lines and not lines[-1]:  # a file with fewer merges ends with a newline
        lines.pop()
    alphabet = bytes_to_unicode()
    symbols = [*alphabet.values(), *(char + WORD_END for char in alphabet.values())]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    no_merges: dict[int, int] = {}  # shared by all symbols that start no pair
    after = [no_merges] * (len(symbols) + len(lines))
    merges = []
    for new_id, line in enumerate(lines, start=len(symbols)):
        left, _, right = line.rstrip("\r").partition(" ")
        symbol = left + right
        if left not in ids or right not in ids or symbol in ids:
            reason = "makes a symbol that exists already" if symbol in ids else "is not two symbols of earlier lines"
            raise ValueError(
                f"{path}, line {new_id - 510}: {line!r} {reason}. Pass a byte-pair merges file like {default_bpe()}."
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
