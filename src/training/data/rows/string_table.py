"""A compact list of strings that data loader workers can share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch


class StringTable:
    """An immutable list of strings: one block of UTF-8 bytes and the offsets into it.

    Reading an object writes its reference count, so every forked worker would copy a list of Python strings page by
    page. These two tensors are not copied: forked workers read the same pages, and spawned ones use shared memory.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._offsets = torch.zeros(1, dtype=torch.int64)
        self._set(*self._encode(strings))

    @classmethod
    def concatenate(cls, tables: list[StringTable]) -> StringTable:
        """Return one table with the strings of all."""
        table = cls()
        if tables:
            lengths = torch.cat([torch.diff(part._offsets) for part in tables])
            table._bytes = torch.cat([part._bytes for part in tables])
            table._offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(lengths, 0)])
        return table

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

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} strings")
        start, end = self._offsets.numpy()[index : index + 2]  # numpy is faster than torch for few elements
        return self._bytes.numpy()[start:end].tobytes().decode("utf-8", "surrogatepass")
