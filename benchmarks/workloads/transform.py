"""Processor milliseconds for a JPEG to become a tensor (decoded and preprocessed), one thread, by the image's size."""

import io
import json
import statistics
import time

import torch
from inputs import jpeg
from PIL import Image

import open_clip

torch.set_num_threads(1)
REPEATS = 40
SIZES = ((640, 480), (480, 640), (256, 256), (1920, 1080))


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
