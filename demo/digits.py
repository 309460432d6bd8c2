"""Train a small CLIP on handwritten digits and plot the results.

The demo writes the 1,797 scanned digits of scikit-learn as images with captions, both as a CSV file and as tar shards.
It trains a model on four fifths of them with `python -m training.main`. The model then classifies the other digits
zero-shot: each image is compared with sentences about each digit. Nothing is downloaded. The output folder contains the
data, the TensorBoard logs, the checkpoints and a picture of the results.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PHRASINGS = [
    "a photo of the handwritten digit {}",
    "the number {}, written by hand",
    "somebody wrote {} with a pen",
    "a scan of the digit {}",
    "this is {}",
    "{}",
]
PROMPTS = ["a photo of the handwritten digit {}", "a scan of the digit {}", "this is {}"]
IMAGE_SIZE = 32
SAMPLES_PER_SHARD = 512
RUN_NAME = "digits"
MODEL_CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}

logger = logging.getLogger("demo")


class Sample(NamedTuple):
    key: str
    digit: int
    png: bytes
    caption: str


def load_samples(seed: int) -> tuple[list[Sample], list[Sample]]:
    """Return (training samples, held-out samples), as PNG files with captions. `seed` fixes captions and split."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    draw = random.Random(seed)
    samples = []
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        ink = Image.fromarray((255 - pixels * 255 / 16).round().astype("uint8"))
        file = io.BytesIO()
        ink.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(file, format="PNG")
        caption = draw.choice(PHRASINGS).format(DIGITS[digit])
        samples.append(Sample(f"{number:04d}", int(digit), file.getvalue(), caption))
    return train_test_split(samples, test_size=0.2, random_state=seed, stratify=digits.target)


def write_csv(samples: list[Sample], folder: Path, name: str) -> None:
    """Write the images into a folder, and NAME.csv with the path and the caption of each."""
    images = folder / f"{name}_images"
    images.mkdir(parents=True)
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["filepath", "title"])
        for sample in samples:
            path = images / f"{sample.key}.png"
            path.write_bytes(sample.png)
            rows.writerow([path, sample.caption])


def write_shards(samples: list[Sample], folder: Path, name: str) -> None:
    """Write webdataset shards NAME-000000.tar, ... and sizes.json, which has the number of samples of each shard."""
    folder.mkdir(parents=True)
    sizes = {}
    for start in range(0, len(samples), SAMPLES_PER_SHARD):
        shard = samples[start : start + SAMPLES_PER_SHARD]
        path = folder / f"{name}-{len(sizes):06d}.tar"
        with tarfile.open(path, "w") as tar:
            for sample in shard:
                for extension, content in (("png", sample.png), ("txt", sample.caption.encode())):
                    member = tarfile.TarInfo(f"{sample.key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        sizes[path.name] = len(shard)
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=2), encoding="utf-8")


def write_classes(samples: list[Sample], folder: Path) -> None:
    """Write one folder of images per digit, and the class names and templates, for zero-shot evaluation."""
    for sample in samples:
        path = folder / "test" / str(sample.digit) / f"{sample.key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.png)
    (folder / "classnames.txt").write_text("\n".join(DIGITS) + "\n", encoding="utf-8")
    (folder / "templates.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")


def write_inputs(output: Path, seed: int) -> None:
    """Write the data and the model's configuration into `output`. Files of an earlier demo are deleted."""
    for name in ("data", "model", "logs"):
        shutil.rmtree(output / name, ignore_errors=True)
    train, held_out = load_samples(seed)
    data = output / "data"
    write_csv(train, data, "train")
    write_csv(held_out, data, "val")
    write_shards(train, data / "shards", "train")
    write_classes(held_out, data)
    (output / "model").mkdir(parents=True)
    (output / "model" / "open_clip_config.json").write_text(json.dumps(MODEL_CONFIG, indent=2), encoding="utf-8")
    logger.info("Wrote %d digits for training and %d held-out digits to %s.", len(train), len(held_out), data)


def train(output: Path, args: argparse.Namespace) -> None:
    """Train with the usual command, in a subprocess."""
    data = output / "data"
    if args.data == "shards":
        last = len(list((data / "shards").glob("*.tar"))) - 1
        source = f"{data}/shards/train-{{000000..{last:06d}}}.tar"
    else:
        source = f"{data}/train.csv"
    command = [
        sys.executable, "-m", "training.main",
        "--model", f"local-dir:{output}/model",
        "--train-data", source,
        "--val-data", f"{data}/val.csv",
        "--zeroshot-data", f"{data}/test",
        "--zeroshot-classnames", f"{data}/classnames.txt",
        "--zeroshot-templates", f"{data}/templates.txt",
        "--zeroshot-frequency", "1",
        "--logs", f"{output}/logs",
        "--name", RUN_NAME,
        "--epochs", str(args.epochs),
        "--batch-size", "64",
        "--lr", "1e-3",
        "--wd", "0.1",
        "--warmup", "20",
        "--workers", "1",
        "--seed", str(args.seed),
        "--device", args.device,
        "--log-every-n-steps", "10",
        "--report-to", "tensorboard",
    ]  # fmt: skip
    logger.info("Training: %s", " ".join(command[1:]))
    subprocess.run(command, check=True)


def classify(output: Path, device_name: str) -> list[tuple[Path, int, int]]:
    """Return (image, digit, predicted digit) for each held-out image, with the last checkpoint."""
    import torch
    from PIL import Image

    import open_clip
    from open_clip import device

    torch_device = device.resolve(device_name)
    checkpoints = output / "logs" / RUN_NAME / "checkpoints"
    last = max(checkpoints.glob("epoch_*.pt"), key=lambda path: int(path.stem.removeprefix("epoch_")))
    model, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{output}/model", pretrained=str(last), device=torch_device
    )
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{output}/model")
    templates = [prompt.format for prompt in PROMPTS]
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, DIGITS, templates, device=torch_device)

    paths = sorted((output / "data" / "test").glob("*/*.png"), key=lambda path: path.name)
    with torch.inference_mode():
        images = torch.stack([preprocess(Image.open(path)) for path in paths]).to(torch_device)
        answers = (model.encode_image(images, normalize=True) @ classifier).argmax(dim=-1).tolist()
    return [(path, int(path.parent.name), answer) for path, answer in zip(paths, answers, strict=True)]


def read_scalars(output: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the logged values by TensorBoard tag: [(step, value), ...]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "logs" / RUN_NAME / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def plot_results(output: Path, answers: list[tuple[Path, int, int]]) -> Path:
    """Plot loss and accuracy, and held-out digits with the caption predicted for each. Wrong ones come first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    scalars = read_scalars(output)
    figure = plt.figure(figsize=(12, 10), layout="constrained")
    curves, gallery = figure.subfigures(2, 1, height_ratios=[1, 2])
    loss_axes, accuracy_axes = curves.subplots(1, 2)
    loss_axes.plot(*zip(*scalars["train/loss"], strict=True))
    loss_axes.set(title="contrastive loss in training", xlabel="step", ylabel="nats")
    epochs, accuracy = zip(*scalars["val/zeroshot-top1"], strict=True)
    accuracy_axes.plot(epochs, [100 * value for value in accuracy], marker=".", label="zero-shot, held-out digits")
    accuracy_axes.axhline(100 / len(DIGITS), linestyle="--", color="grey", label="chance")
    accuracy_axes.set(title="accuracy", xlabel="epoch", ylabel="%", ylim=(0, 100))
    accuracy_axes.legend(loc="lower right")

    shown = sorted(answers, key=lambda answer: answer[1] == answer[2])[:8] + answers[:32]
    for axes, (path, digit, answer) in zip(gallery.subplots(4, 10).flat, shown, strict=True):
        axes.imshow(Image.open(path), cmap="gray")
        axes.set_title(PROMPTS[-1].format(DIGITS[answer]), fontsize=9, color="black" if digit == answer else "red")
        axes.axis("off")
    gallery.suptitle("held-out digits and the predicted captions (wrong ones come first, in red)")
    picture = output / "digits.png"
    figure.savefig(picture, dpi=100)
    return picture


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for all results")
    parser.add_argument("--data", choices=["csv", "shards"], default="csv", help="format of the training data")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the digits (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="as in training.main (default: the best device present)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    args = parse_args(argv)
    output = args.output.resolve()
    write_inputs(output, args.seed)
    train(output, args)
    answers = classify(output, args.device)
    picture = plot_results(output, answers)
    right = sum(digit == answer for _, digit, answer in answers)
    accuracy, chance = 100 * right / len(answers), 100 / len(DIGITS)
    logger.info("")
    logger.info("Zero-shot accuracy on %d digits (held out): %.1f %% (chance: %.1f)", len(answers), accuracy, chance)
    logger.info("Picture:      %s", picture)
    logger.info("Checkpoints:  %s", output / "logs" / RUN_NAME / "checkpoints")
    logger.info("TensorBoard:  tensorboard --logdir %s", output / "logs")


if __name__ == "__main__":
    main()
