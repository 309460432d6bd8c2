"""Records a training checkpoint of open_clip_torch 3.3.0, for test_training_checkpoint.py.

    python tests/parity/record training_checkpoint

Its training command runs as a black box, with a model as small as its vocabulary lets it be, on synthetic data.
"""

from __future__ import annotations

import json
import lzma
import sys
import tempfile
from pathlib import Path

from recorded_model import MODEL

FIXTURE = Path(__file__).parents[1] / "fixtures" / "training_checkpoint_3.3.0.pt.xz"
ARGUMENTS = [
    "--model", "recorded", "--name", "recorded", "--dataset-type", "synthetic", "--train-data", "none",
    "--train-num-samples", "16", "--batch-size", "4", "--workers", "0", "--epochs", "2", "--warmup", "2",
    "--device", "cpu", "--precision", "fp32",
]  # fmt: skip


def main() -> None:
    from open_clip_train.main import main as train

    import open_clip

    assert open_clip.__version__ == "3.3.0", open_clip.__version__
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "recorded.json"
        config.write_text(json.dumps(MODEL))
        open_clip.add_model_config(config)
        train([*ARGUMENTS, "--logs", folder])
        checkpoint = Path(folder) / "recorded" / "checkpoints" / "epoch_2.pt"
        FIXTURE.write_bytes(lzma.compress(checkpoint.read_bytes(), preset=9))
    sys.stdout.write(f"{FIXTURE}: {FIXTURE.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
