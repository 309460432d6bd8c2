"""Small data sets for the tests of training.data, and transforms and tokenizers that workers can import."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from training.params import DataConfig
from training.ranks import World


def jpeg(number: int, size: int = 16) -> bytes:
    """A JPEG of noise whose mean grey is about `number` (0..255)."""
    noise = np.random.RandomState(number).randint(-8, 8, (size, size, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.clip(number + noise, 0, 255)).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def caption(number: int) -> str:
    return f"picture {number}"


def plain(image: Any) -> torch.Tensor:
    """PIL -> float [3, 8, 8]."""
    pixels = np.asarray(image.convert("RGB").resize((8, 8)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float()


def noisy(image: Any) -> torch.Tensor:
    """`plain` with a number of each generator that a random transform may use in its first three elements."""
    pixels = plain(image).contiguous()
    pixels.view(-1)[:3] = torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))])
    return pixels


def tokenize(captions: list[str]) -> torch.Tensor:
    """The captions' numbers and lengths: int64 [N, 2]."""
    return torch.tensor([[int(text.split()[-1]), len(text)] for text in captions])


def write_csv(folder: Path, count: int) -> Path:
    """`count` images and a tab-separated file with their paths and captions."""
    rows = []
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        rows.append(f"{folder / f'{number}.jpg'}\t{caption(number)}\n")
    path = folder / "pairs.csv"
    path.write_text("filepath\ttitle\n" + "".join(rows), encoding="utf-8")
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(numbers: Iterable[int]) -> Iterable[tuple[str, bytes]]:
    """Tar members of whole samples; keys repeat from shard to shard."""
    for position, number in enumerate(numbers):
        yield f"{position:04d}.jpg", jpeg(number)
        yield f"{position:04d}.txt", caption(number).encode()


def write_shards(folder: Path, shards: int, per_shard: int) -> str:
    """Shards with samples 0, 1, 2, ...; returns their brace expression."""
    for shard in range(shards):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        write_tar(folder / f"{shard:03d}.tar", pairs(numbers))
    return f"{folder}/{{000..{shards - 1:03d}}}.tar"


def data_args(**options: Any) -> DataConfig:
    return DataConfig(**({"workers": 0, "batch_size": 4} | options))


def fake_world(rank: int = 0, world_size: int = 1) -> World:
    return World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"), backend=None)


def numbers(batch: dict[str, Any]) -> list[int]:
    """The samples of a batch tokenised by `tokenize`."""
    return batch["text"][:, 0].tolist()


def epoch_numbers(data: Any, epoch: int = 0) -> list[list[int]]:
    """The samples of each batch of one epoch."""
    data.set_epoch(epoch)
    return [numbers(batch) for batch in data.dataloader]
