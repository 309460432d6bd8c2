"""Damaged checkpoints, configurations, shards and CSV files are read, or an error names the file.

The damage is random with a seed: truncation, flipped bits, a range of zeros, swapped, duplicated or inserted blocks.
Each reader must return, or raise ValueError or RuntimeError with the file name in the message. The cases run in
processes with a time limit, so that crashes and hangs are counted.

    python benchmarks/faults/damaged_files.py               # 1,500 cases
    python benchmarks/faults/damaged_files.py --cases 200
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import random
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/helpers"), str(ROOT / "src")]

BATCH = 50  # cases per process
SECONDS = 120  # per process
CHECKPOINTS = ("torch.pt", "legacy.pt", "weights.safetensors", "weights.npz", "packed.npz", "script.pt")
CONFIGS = ("open_clip_config.json", "model.json")
DATA = ("shard.tar", "pairs.csv")


def weights() -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    found = {f"blocks.{n}.{kind}": torch.randn(9, 7, generator=generator) for n in range(6) for kind in "ab"}
    return {**found, "tied": found["blocks.0.a"], "half": torch.ones(5, dtype=torch.float16), "scalar": torch.tensor(2)}


def write(name: str) -> bytes:
    """Return the content of a valid file of this kind."""
    import numpy as np
    import torch

    buffer = io.BytesIO()
    if name in ("torch.pt", "legacy.pt"):
        extras = {"epoch": 3, "note": np.float64(0.3), "args": argparse.Namespace(lr=1.0)}
        content = {"state_dict": weights(), **extras}
        torch.save(content, buffer, _use_new_zipfile_serialization=name == "torch.pt")
    elif name == "weights.safetensors":
        import safetensors.torch

        return safetensors.torch.save({key: value.clone() for key, value in weights().items()})
    elif name.endswith(".npz"):
        save = np.savez if name == "weights.npz" else np.savez_compressed
        save(buffer, **{key: value.numpy() for key, value in weights().items()})
    elif name == "script.pt":
        module = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.BatchNorm1d(7))
        torch.jit.save(torch.jit.script(module), buffer)
    elif name in CONFIGS:
        import tiny_clip

        cfg = tiny_clip.config()
        return json.dumps({"model_cfg": cfg, "preprocess_cfg": {}} if name == CONFIGS[0] else cfg, indent=1).encode()
    elif name == "shard.tar":
        import numbered_images

        with tempfile.TemporaryDirectory() as folder:
            return numbered_images.write_tar(Path(folder) / "x.tar", numbered_images.pairs(range(12))).read_bytes()
    else:
        return b"filepath\ttitle\n" + b"".join(b"%d.jpg\tpicture %d\n" % (n, n) for n in range(12))
    return buffer.getvalue()


def damage(data: bytes, chance: random.Random) -> bytes:
    def random_position() -> int:
        # Half of the damage is near the ends, where headers and directories are.
        edge = min(len(data), 2000)
        start, end = chance.randrange(edge), len(data) - 1 - chance.randrange(edge)
        return chance.choice((chance.randrange(len(data)), chance.randrange(len(data)), start, end))

    kind, found, start = chance.randrange(6), bytearray(data), random_position()
    length = chance.choice((1, 4, 16, 200, 2000))
    if kind == 0:
        return data[:start]
    if kind == 1:
        for _ in range(chance.choice((1, 3, 20))):
            found[random_position()] ^= 1 << chance.randrange(8)
    elif kind == 2:
        found[start : start + length] = bytes(len(found[start : start + length]))
    elif kind == 3:
        other = random_position()
        one, two = bytes(found[start : start + length]), bytes(found[other : other + length])
        if len(one) == len(two):
            found[start : start + length], found[other : other + length] = two, one
    elif kind == 4:
        found[start:start] = found[start : start + length]
    else:
        found[start:start] = chance.randbytes(length)
    return bytes(found)


def readers(name: str) -> list[Callable[[Path], Any]]:
    import open_clip
    from open_clip.checkpoint.files import load_state_dict
    from open_clip.recipe import read_recipe
    from training.checkpoint.weights import load_checkpoint

    if name == CONFIGS[0]:
        return [lambda path: read_recipe(f"local-dir:{path.parent}", None, None)]
    if name == CONFIGS[1]:
        return [open_clip.add_model_config]
    if name in DATA:
        return [read_data]
    return [load_state_dict, load_checkpoint] if name in ("torch.pt", "legacy.pt") else [load_state_dict]


def read_data(path: Path) -> None:
    import numbered_images
    import torch

    import data_files
    from training.data import get_data

    for number in range(12):
        (path.parent / f"{number}.jpg").write_bytes(numbered_images.picture(number))
    if path.suffix == ".csv":
        rows = path.read_bytes().split(b"\n")
        path.write_bytes(b"\n".join([rows[0], *(bytes(path.parent) + b"/" + row for row in rows[1:])]))
    kind = "csv" if path.suffix == ".csv" else "webdataset"
    args = data_files.data_args(val_data=str(path), dataset_type=kind, workers=0, max_bad_fraction=1.0)
    transforms = (numbered_images.to_tensor,) * 2
    data = get_data(args, transforms, tokenizer=lambda captions: torch.zeros(len(captions), 1).long())
    list(data["val"].dataloader)


def outcome(name: str, seed: int, folder: Path) -> str:
    """Return what went wrong, or "" if the file was read or an error names it."""
    path = folder / name
    content = damage(write(name), random.Random(f"{name} {seed}"))
    for read in readers(name):
        path.write_bytes(content)
        try:
            read(path)
        except (ValueError, RuntimeError) as error:
            allowed = type(error) in (ValueError, RuntimeError) or type(error).__name__ == "FileError"
            if not allowed or (str(path) not in str(error) and str(folder) not in str(error)) or len(str(error)) > 600:
                return f"{name} {seed}: {type(error).__name__}: {str(error)[:200]}"
        except Exception as error:
            return f"{name} {seed}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def run_batch(cases: list[tuple[str, int]]) -> list[str]:
    """Damage and read files in this process. Return what went wrong in each case."""
    with tempfile.TemporaryDirectory() as folder:
        return [wrong for name, seed in cases if (wrong := outcome(name, seed, Path(folder)))]


def cases(count: int, names: tuple[str, ...]) -> list[tuple[str, int]]:
    return [(names[number % len(names)], number // len(names)) for number in range(count)]


def measure(count: int) -> tuple[dict[str, Any], bool]:
    planned = cases(count, CHECKPOINTS + CONFIGS + DATA)
    wrong: list[str] = []
    for first in range(0, len(planned), BATCH):
        batch = planned[first : first + BATCH]
        command = [sys.executable, __file__, "--batch", json.dumps(batch)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            wrong.append(f"cases {first} to {first + BATCH}: no end after {SECONDS} s")
            continue
        if done.returncode:
            wrong.append(f"cases {first} to {first + BATCH}: exit status {done.returncode}: {done.stderr[-300:]}")
        else:
            wrong += json.loads(done.stdout.splitlines()[-1])
    by_file = Counter(line.split()[0] for line in wrong)
    return {"cases": count, "wrong": len(wrong), "by file": by_file, "examples": wrong[:20]}, not wrong


if __name__ == "__main__":
    if sys.argv[1:2] == ["--batch"]:
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        print(json.dumps(run_batch([(name, seed) for name, seed in json.loads(sys.argv[2])])))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--cases", type=int, default=1500)
        figures, met = measure(parser.parse_args().cases)
        print(json.dumps({**figures, "met": met}))
        sys.exit(not met)
