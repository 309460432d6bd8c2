"""Write the data of docs/fine_tuning.md: handwritten digits, and the same digits tilted by 45 degrees.

A model is pretrained on the first and fine-tuned on the second. The output folder contains `model` (its
configuration), and `digits` and `tilted`, each with `train.csv` and `test` (one folder of held-out images per digit).
`classnames.txt` and `templates.txt` are for zero-shot evaluation.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path

from digits import MODEL_CONFIG, Sample, load_samples, write_classes, write_csv


def tilt(sample: Sample) -> Sample:
    from PIL import Image

    file = io.BytesIO()
    image = Image.open(io.BytesIO(sample.png))
    image.rotate(45, Image.Resampling.BILINEAR, fillcolor=255).save(file, format="PNG")
    return sample._replace(png=file.getvalue())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tuning"), help="folder for all files")
    parser.add_argument("--samples", type=int, default=None, help="write at most so many of each set (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sets = [samples[: args.samples] for samples in load_samples(args.seed)]
    for name, change in (("digits", lambda sample: sample), ("tilted", tilt)):
        folder = args.output.resolve() / name
        shutil.rmtree(folder, ignore_errors=True)
        train, held_out = ([change(sample) for sample in samples] for samples in sets)
        write_csv(train, folder, "train")
        write_classes(held_out, folder)
    for name in ("classnames.txt", "templates.txt"):
        shutil.copy(args.output / "digits" / name, args.output)
    (args.output / "model").mkdir(exist_ok=True)
    (args.output / "model" / "open_clip_config.json").write_text(json.dumps(MODEL_CONFIG, indent=2), encoding="utf-8")
    print(f"Wrote {len(sets[0])} digits for training and {len(sets[1])} held-out digits, twice, to {args.output}.")


if __name__ == "__main__":
    main()
