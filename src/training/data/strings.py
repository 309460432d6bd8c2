"""Millions of strings without millions of Python objects."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch


class StringTable:
    """An immutable list of strings: one block of UTF-8 bytes and the offsets into it.

    A list of Python strings is copied page by page into every forked worker, as reading an object writes its reference
    count. These are two tensors: forked workers read the same pages, spawned ones get them through shared memory.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._offsets = torch.zeros(1, dtype=torch.int64)
        self._set(*self._encode(strings))

    @classmethod
    def concatenate(cls, tables: list[StringTable]) -> StringTable:
        """One table of all; the parts may be thrown away."""
        whole = cls()
        if tables:
            lengths = torch.cat([torch.diff(table._offsets) for table in tables])
            whole._bytes = torch.cat([table._bytes for table in tables])
            whole._offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(lengths, 0)])
        return whole

    @staticmethod
    def _encode(strings: Iterable[str]) -> tuple[bytes, np.ndarray]:
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        return b"".join(encoded), np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))

    def _set(self, data: bytes, lengths: np.ndarray) -> None:
        if data:
            self._bytes = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._offsets = torch.from_numpy(np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} strings")
        begin, end = self._offsets[index : index + 2].tolist()
        return self._bytes[begin:end].numpy().tobytes().decode("utf-8", "surrogatepass")
