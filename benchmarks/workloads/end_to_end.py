"""The whole training command with a tiny model, one epoch over a CSV file of 640 x 480 JPEGs: seconds."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from inputs import csv_of_photos

COUNT = 640
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}

csv = csv_of_photos(Path(os.environ["BENCHMARK_SCRATCH"]), COUNT)
with tempfile.TemporaryDirectory() as folder:
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess}
    Path(folder, "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    command = [
        sys.executable, "-m", "open_clip_train.main", "--model", f"local-dir:{folder}", "--train-data", str(csv),
        "--dataset-type", "csv", "--batch-size", "32", "--epochs", "1", "--warmup", "10", "--workers", "1", "--device",
        "cpu", "--precision", "fp32", "--logs", folder, "--name", "run",
    ]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    print(json.dumps({"command [s]": time.perf_counter() - start}))
