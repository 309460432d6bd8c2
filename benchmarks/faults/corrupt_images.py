"""1% of each kind of unusable sample, in shards and CSV, in evaluation and training.

Nothing crashes, every other sample has its own caption, and the counters of the evaluation equal what was injected.
"""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numbered_images import load, main, mismatched, picture, write_tar
from PIL import Image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def kinds(number: int, in_shards: bool) -> dict[str, tuple[str, bytes | None, bytes | None]]:
    """Return name -> (the cause under which it must be counted, image, caption). None: the member is missing."""
    image, text = picture(number % 1000, 64), f"picture {number}".encode()
    noise = np.random.RandomState(number).bytes(900)
    middle = bytearray(png(Image.fromarray(np.random.RandomState(number).randint(0, 255, (32, 32, 3), np.uint8))))
    middle[500:1000] = noise[:500]
    found: dict[str, tuple[str, bytes | None, bytes | None]] = {
        "truncated image": ("corrupt_image", image[: len(image) // 2], text),
        "noise for an image": ("corrupt_image", noise, text),
        "noise in an image": ("corrupt_image", bytes(middle), text),
        "a web page for an image": ("corrupt_image", b"<html>404 Not Found</html>", text),
        "image of 0 bytes": ("empty_image", b"", text),
        "169 megapixels": ("huge_image", BOMB, text),
        "caption that is not UTF-8": ("corrupt_caption", image, b"\xff\xfe 7"),
        "empty caption": ("no_caption", image, b"  "),
        "caption of 2 MB": ("huge_caption", image, b"x" * 2**21),
        "no image": ("no_image" if in_shards else "missing_image", None, text),
    }
    if in_shards:
        found["no caption"] = ("no_caption", image, None)
        found["caption of 200 MB"] = ("huge_caption", image, GIANT)
    return found


BOMB = png(Image.new("1", (13_000, 13_000)))
GIANT = b"x" * (200 << 20)


def samples(count: int, in_shards: bool) -> tuple[list[tuple[int, bytes | None, bytes | None]], Counter[str]]:
    """Return `count` shuffled samples, 1% of each kind (one caption of 200 MB), and the expected counts."""
    found, injected = [], Counter[str]()
    bad = [name for name in kinds(0, in_shards) for _ in range(1 if "200 MB" in name else count // 100)]
    order = np.random.RandomState(0).permutation(count)
    for number, position in enumerate(order):
        if position < len(bad):
            cause, image, text = kinds(number, in_shards)[bad[position]]
            injected[cause] += 1
        else:
            image, text = picture(number % 1000), f"picture {number}".encode()
        found.append((number, image, text))
    return found, injected


def write_shards(folder: Path, rows: list, count: int) -> str:
    for shard in range(4):
        part = rows[shard * count // 4 : (shard + 1) * count // 4]
        members = [
            (f"{n:06d}.{kind}", data) for n, *both in part for kind, data in zip(("jpg", "txt"), both, strict=True)
        ]
        write_tar(folder / f"{shard}.tar", [(name, data) for name, data in members if data is not None])
    return f"{folder}/{{0..3}}.tar"


def write_csv(folder: Path, rows: list) -> str:
    lines = [b"filepath\ttitle"]
    for number, image, text in rows:
        if image is not None:
            (folder / f"{number}.jpg").write_bytes(image)
        lines.append(f"{folder}/{number}.jpg\t".encode() + text)
    (folder / "pairs.csv").write_bytes(b"\n".join(lines) + b"\n")
    return str(folder / "pairs.csv")


def measure(folder: Path, count: int) -> tuple[dict[str, Any], bool]:
    figures: dict[str, Any] = {}
    met = True
    for form in ("shards", "csv"):
        rows, injected = samples(count, form == "shards")
        source = write_shards(folder, rows, count) if form == "shards" else write_csv(folder, rows)
        val = load(val_data=source, workers=2, batch_size=50)
        batches = list(val.dataloader)
        wrong, used = sum(map(mismatched, batches)), sum(len(batch["key"]) for batch in batches)
        val.dataloader.close()
        train = load(train_data=source, train_num_samples=count, workers=2, batch_size=50)
        steps = sum(1 - bool(mismatched(batch)) for batch in train.dataloader)
        train.dataloader.close()
        counted = val.skipped.counts()
        met &= counted == injected and not wrong and used == count - injected.total() and steps == count // 50
        figures[form] = {"injected": injected, "counted": counted, "mismatched": wrong, "training steps": steps}
    return figures, met


if __name__ == "__main__":
    main(measure, count=2000)
