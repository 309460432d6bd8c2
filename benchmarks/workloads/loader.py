"""The training data loader with one worker, from a CSV file of 640 x 480 JPEGs: seconds for 1,000 samples."""

import json
import logging
import os
import time
from pathlib import Path

from inputs import csv_of_photos
from open_clip_train.data import get_data

import open_clip
from open_clip_train import params

COUNT, BATCH, WARM_UP = 640, 32, 4

logging.disable(logging.CRITICAL)
csv = csv_of_photos(Path(os.environ["BENCHMARK_SCRATCH"]), COUNT)
args = params.parse_args(
    ["--train-data", str(csv), "--dataset-type", "csv", "--batch-size", str(BATCH), "--workers", "1"]
)
args.distributed, args.rank, args.world_size = False, 0, 1
transforms = (open_clip.image_transform(224, is_train=True), open_clip.image_transform(224, is_train=False))
options = args
if hasattr(params, "sections"):  # as this project's training command does: uint8 images, normalized on the device
    from open_clip_train.batches import to_pixels

    options, transforms = params.sections(args).data, tuple(map(to_pixels, transforms))
loader = get_data(options, transforms, epoch=0, tokenizer=open_clip.get_tokenizer("ViT-B-32"))["train"].dataloader
start = 0.0
for number, _ in enumerate(loader):
    if number == WARM_UP - 1:
        start = time.perf_counter()
seconds = time.perf_counter() - start
print(json.dumps({"one worker [s/1000 samples]": 1000 * seconds / (COUNT - WARM_UP * BATCH)}))
