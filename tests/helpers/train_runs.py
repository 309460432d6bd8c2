"""Small runs of the training command: a model, data on disk, and readers of a run's results."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import processes

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220), "grey": (128, 128, 128)}
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_model(folder: Path, **changes: object) -> str:
    """Write the configuration of a tiny CLIP to a folder. Return its name for --model."""
    folder.mkdir(parents=True)
    config = {"model_cfg": MODEL | changes, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def png(number: int) -> bytes:
    """Return a noisy image in one of four colors."""
    color = list(COLORS.values())[number % 4]
    noise = np.random.RandomState(number).randint(-25, 25, (40, 40, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def caption(number: int) -> str:
    return f"{number}, something {list(COLORS)[number % 4]}"


def write_csv(folder: Path, count: int) -> Path:
    """Write `count` images, and a tab-separated file with their paths and captions. Return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["filepath\ttitle"]
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))
        rows.append(f"{folder / f'{number}.png'}\t{caption(number)}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "pairs.csv"


def write_shards(folder: Path, shards: int, per_shard: int, captions: bool = True) -> str:
    """Write shards and a sizes.json. Return the shards' brace expression."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard * per_shard, (shard + 1) * per_shard):
                members = {"png": png(number), **({"txt": caption(number).encode()} if captions else {"cls": b"1"})}
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / "sizes.json").write_text(json.dumps({f"{shard}.tar": per_shard for shard in range(shards)}))
    return f"{folder}/{{0..{shards - 1}}}.tar"


def write_classes(folder: Path, per_class: int) -> Path:
    """Write a folder of images for each color."""
    for index, name in enumerate(COLORS):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            (folder / name / f"{number}.png").write_bytes(png(1000 + index + 4 * number))
    return folder


def command(*options: object, ranks: int = 1) -> list[str]:
    """Return the command `python -m training.main ...`, under torchrun for several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "training.main", *map(str, options)]


def run(*options: object, ranks: int = 1, status: int = 0) -> str:
    """Run the training command in child processes, check its exit status, and return its output."""
    return processes.run(command(*options, ranks=ranks), status=status)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return the TensorBoard scalars of a run: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights without DDP's prefix."""
    saved = torch.load(folder / "checkpoints" / name, weights_only=True)["state_dict"]
    return {key.removeprefix("module."): value for key, value in saved.items()}


def results(folder: Path) -> list[dict]:
    lines = (folder / "checkpoints" / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
