"""Images and captions for the workloads, generated from seeds."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = (  # noqa: SIM905 (shorter so)
    "a the of with on in and two man woman dog cat street red small large sitting standing table window water tree "
    "green old young people playing holding near front white black bus train kitchen field snow beach plate food"
).split()


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    """Make an image of blurred noise, whose JPEG is about as large as that of a photograph."""
    rng = np.random.default_rng(seed)
    levels = np.zeros((height, width, 3))
    for scale, contrast in ((60, 1.0), (12, 0.5), (3, 0.2)):
        noise = rng.integers(0, 256, (height // scale, width // scale, 3), dtype=np.uint8)
        levels += contrast * (np.asarray(Image.fromarray(noise).resize((width, height)), dtype=float) - 128)
    file = io.BytesIO()
    Image.fromarray((levels + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def captions(count: int, seed: int = 0) -> list[str]:
    """Make captions of 7 to 20 words, most of them about 10, like those of COCO."""
    rng = np.random.default_rng(seed)
    lengths = (7 + rng.gamma(2.0, 2.0, count)).astype(int).clip(7, 20)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def csv_of_photos(folder: Path, count: int) -> Path:
    """Create `count` JPEGs of 640 x 480 and a tab-separated file of paths and captions, if they do not exist."""
    csv = folder / f"photos-{count}.csv"
    if not csv.exists():
        (folder / "photos").mkdir(exist_ok=True)
        rows = ["filepath\ttitle"]
        for number, caption in enumerate(captions(count)):
            path = folder / "photos" / f"{number}.jpg"
            path.write_bytes(jpeg(640, 480, number))
            rows.append(f"{path}\t{caption}")
        csv.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return csv
