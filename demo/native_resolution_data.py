"""Write the data of docs/native_resolution.md: handwritten digits on sheets of paper of many sizes and shapes.

A sheet is 24 to 64 pixels wide or high on its shorter side and up to 1.5 times as long on the other. The digit fills
the shorter side, at a random place of the longer one. The output folder contains `model` (the configuration of a small
CLIP with a ViT), `train.csv`, tar shards in `shards`, and `test` (one folder of held-out sheets per digit).
`classnames.txt` and `templates.txt` are for zero-shot evaluation.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
from pathlib import Path

from digits import MODEL_CONFIG, Sample, load_samples, write_classes, write_csv, write_shards

# White paper becomes 0.
PREPROCESSING = {"mean": [1.0, 1.0, 1.0], "std": [0.3, 0.3, 0.3]}


def put_on_sheet(sample: Sample) -> Sample:
    """Return the sample with its digit on a sheet of random size and shape, which depend on its key only."""
    from PIL import Image

    draw = random.Random(sample.key)
    side, length = draw.randint(24, 64), draw.uniform(1, 1.5)
    size = (side, round(side * length)) if draw.random() < 0.5 else (round(side * length), side)
    digit = Image.open(io.BytesIO(sample.png)).resize((side, side), Image.Resampling.BICUBIC)
    sheet = Image.new("L", size, 255)
    sheet.paste(digit, (draw.randint(0, size[0] - side), draw.randint(0, size[1] - side)))
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    return sample._replace(png=file.getvalue())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("sheets"), help="folder for all files")
    parser.add_argument("--samples", type=int, default=None, help="write at most so many of each set (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    output = args.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    train, held_out = ([put_on_sheet(sample) for sample in part[: args.samples]] for part in load_samples(args.seed))
    write_csv(train, output, "train")
    write_csv(held_out, output, "val")
    write_shards(train, output / "shards", "train")
    write_classes(held_out, output)
    config = MODEL_CONFIG | {"preprocess_cfg": PREPROCESSING}
    (output / "model").mkdir()
    (output / "model" / "open_clip_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    print(f"Wrote {len(train)} sheets for training and {len(held_out)} held-out sheets to {args.output}.")


if __name__ == "__main__":
    main()
