"""Processor milliseconds for a JPEG to become a tensor (decoded and preprocessed), one thread, by the image's size."""

import io
import json
import statistics
import time

import numpy as np
import torch
from PIL import Image

import open_clip

torch.set_num_threads(1)
REPEATS = 40
SIZES = ((640, 480), (480, 640), (256, 256), (1920, 1080))


def jpeg(width: int, height: int) -> bytes:
    """Blurred noise of several scales: about as many bytes as a photograph of this size has."""
    rng = np.random.default_rng(0)
    levels = np.zeros((height, width, 3))
    for scale, contrast in ((60, 1.0), (12, 0.5), (3, 0.2)):
        noise = rng.integers(0, 256, (height // scale, width // scale, 3), dtype=np.uint8)
        levels += contrast * (np.asarray(Image.fromarray(noise).resize((width, height)), dtype=float) - 128)
    file = io.BytesIO()
    Image.fromarray((levels + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


figures = {}
transforms = {
    "val": open_clip.image_transform(224, is_train=False),
    "train": open_clip.image_transform(224, is_train=True),
}
for name, transform in transforms.items():
    for width, height in SIZES:
        data = jpeg(width, height)
        seconds = []
        for _ in range(REPEATS):
            start = time.process_time()
            transform(Image.open(io.BytesIO(data)))
            seconds.append(time.process_time() - start)
        figures[f"{name}, {width}x{height} [ms]"] = 1e3 * statistics.median(seconds)
print(json.dumps(figures))
