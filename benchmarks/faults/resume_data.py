"""The data of a run that is resumed within an epoch, with 0, 2 and 4 workers, from CSV and shards.

The sequence of sample keys and images after resuming equals that of the uninterrupted run. The time to the first batch
at 90% of a long epoch is at most twice that of a cold start, both with new workers.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from numbered_images import load, main, pairs, picture, write_tar


def no_pixels(image: Any) -> torch.Tensor:
    return torch.zeros(3)


def sources(folder: Path, samples: int, shards: int) -> dict[str, dict[str, Any]]:
    images = folder / "images"
    images.mkdir()
    for number in range(min(samples, 1000)):
        (images / f"{number}.jpg").write_bytes(picture(number))
    rows = "".join(f"{images}/{number % 1000}.jpg\tpicture {number}\n" for number in range(samples))
    (folder / "pairs.csv").write_text("filepath\ttitle\n" + rows)
    for shard in range(shards):
        write_tar(folder / f"{shard:02d}.tar", pairs(range(shard * samples // shards, (shard + 1) * samples // shards)))
    tars = {"train_data": f"{folder}/{{00..{shards - 1:02d}}}.tar", "train_num_samples": samples}
    return {
        "csv": {"train_data": str(folder / "pairs.csv")},
        "shards": tars,
        "resampled": {**tars, "dataset_resampled": True},
    }


def take(data: Any, count: int | None = None) -> list[tuple[list[str], list[int]]]:
    """Read the remaining batches, end the workers, and return (keys, tokens)."""
    data.set_epoch(1)
    found = [(batch["key"], batch["text"].flatten().tolist()) for batch in itertools.islice(data.dataloader, count)]
    data.dataloader.close()
    return found


def different_batches(options: dict[str, Any]) -> int:
    whole = take(load(**options))
    wrong = 0
    for position in (1, len(whole) // 3, len(whole) - 2):
        interrupted = load(**options)
        take(interrupted, position)
        resumed = load(**options)
        resumed.load_state_dict([interrupted.state_dict()])
        rest = take(resumed)
        wrong += abs(len(rest) - len(whole[position:]))
        wrong += sum(ours != theirs for ours, theirs in zip(rest, whole[position:], strict=False))
    return wrong


def slowdown(options: dict[str, Any], repeats: int) -> float:
    """Return the time to the first batch when resuming at 90% of the epoch, relative to a cold start (medians)."""
    interrupted = load(transform=no_pixels, **options)
    take(interrupted, interrupted.dataloader.num_batches * 9 // 10)
    state = interrupted.state_dict()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _, resumes in itertools.product(range(repeats), seconds):
        start = time.perf_counter()
        data = load(transform=no_pixels, **options)
        if resumes:
            data.load_state_dict([state])
        data.set_epoch(1)
        next(iter(data.dataloader))
        seconds[resumes].append(time.perf_counter() - start)
        data.dataloader.close()
    return statistics.median(seconds[True]) / statistics.median(seconds[False])


def measure(folder: Path, samples: int, long: int, repeats: int) -> tuple[dict[str, Any], bool]:
    (folder / "short").mkdir()
    (folder / "long").mkdir()
    short, long_epoch = sources(folder / "short", samples, 8), sources(folder / "long", long, 8)
    wrong, ratios = 0, {}
    for kind, workers in itertools.product(short, (0, 2, 4)):
        wrong += different_batches({**short[kind], "workers": workers, "batch_size": 32})
        if workers != 4:
            options = {**long_epoch[kind], "workers": workers, "batch_size": 32}
            ratios[f"{kind}, {workers} workers"] = round(slowdown(options, repeats), 2)
    met = not wrong and max(ratios.values()) <= 2
    return {"batches that differ": wrong, "first batch, resumed / cold": ratios}, met


if __name__ == "__main__":
    main(measure, samples=2000, long=20_000, repeats=7)
