"""Shared code of the scripts about data: images whose color is the number in their caption, and shards of them."""

from __future__ import annotations

import argparse
import functools
import io
import json
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/helpers"), str(ROOT / "src")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from data_files import data_args  # noqa: E402
from training.data import DataInfo, get_data  # noqa: E402

_STEP = 25  # difference of a channel's values for two consecutive digits


@functools.cache
def picture(number: int, size: int = 16) -> bytes:
    """Make a JPEG of one color, whose red, green and blue encode the last three digits of `number`."""
    color = tuple(number // 10**digit % 10 * _STEP for digit in (2, 1, 0))
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), color).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def to_tensor(image: Any) -> torch.Tensor:
    """Return the mean color, float [3]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32).mean((0, 1)))


def tokenize(captions: list[str]) -> torch.Tensor:
    """Parse the numbers of the captions, int64 [B, 1]."""
    return torch.tensor([[int(caption.split()[-1])] for caption in captions])


def mismatched(batch: dict[str, Any]) -> int:
    """Count the images of a batch that have the caption of another one."""
    digits = (batch["image"] / _STEP).round().long()
    numbers = (digits * torch.tensor([100, 10, 1])).sum(1)
    return int((numbers != batch["text"][:, 0] % 1000).sum())


def pairs(numbers: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    for number in numbers:
        yield f"{number:06d}.jpg", picture(number % 1000)
        yield f"{number:06d}.txt", f"picture {number}".encode()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with open(path, "wb") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.write(info.tobuf(tarfile.GNU_FORMAT) + data + b"\0" * (-len(data) % 512))
        file.write(b"\0" * 1024)
    return path


def load(
    train_data: str | None = None, val_data: str | None = None, transform: Any = to_tensor, **options: Any
) -> DataInfo:
    args = data_args(**{"train_data": train_data, "val_data": val_data, "max_bad_fraction": 1.0, **options})
    data = get_data(args, (transform, transform), tokenizer=tokenize)
    return data["train" if train_data else "val"]


def main(measure: Callable[..., tuple[dict[str, Any], bool]], **defaults: int) -> None:
    """Run the command line of a script. `measure(folder, **numbers)` returns (figures, whether it is met)."""
    warnings.filterwarnings("ignore", message=".*worker processes in total.*")
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    with tempfile.TemporaryDirectory() as folder:
        figures, met = measure(Path(folder), **vars(parser.parse_args()))
    print(json.dumps({**figures, "met": met}))
    sys.exit(not met)
