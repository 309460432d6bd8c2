"""Check that a refactoring changes no number: train the same ten small runs with two versions of the source.

    python benchmarks/compare_losses.py --against COMMIT [RUN ...]

The other version is checked out into a temporary folder. The losses of all steps and the tensors of the last checkpoint
must be bit-identical. Prints one line per run; the exit status is 1 if a run differs. Takes 3 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/helpers"))

import torch  # noqa: E402

import processes  # noqa: E402
import train_runs  # noqa: E402

SAMPLES, BATCH, EPOCHS = 32, 4, 2
CROPS = ("--aug-cfg", "scale=(0.3,1.0)", "--force-patch-dropout", 0.5)  # so that the random state matters


class Inputs:
    """Create models and data that all runs share."""

    def __init__(self, folder: Path) -> None:
        self.csv = train_runs.write_csv(folder / "csv", SAMPLES)
        self.shards = train_runs.write_shards(folder / "shards", 4, SAMPLES // 4)
        self.clip = train_runs.write_model(folder / "clip")
        self.siglip = train_runs.write_model(folder / "siglip", init_logit_bias=-10, custom_text=True)
        text = {**train_runs.MODEL["text_cfg"], "embed_cls": True, "output_tokens": True}
        decoder = {"width": 16, "heads": 2, "layers": 1, "context_length": 16, "vocab_size": 49408}
        pooled = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        vision = {**train_runs.MODEL["vision_cfg"], **pooled}
        self.coca = train_runs.write_model(
            folder / "coca", text_cfg=text, vision_cfg=vision, multimodal_cfg=decoder, custom_text=True
        )
        self.teacher = folder / "teacher.pt"

    def runs(self) -> dict[str, list[tuple[int, tuple[object, ...]]]]:
        """Return name -> commands, each as (number of processes, options). The commands of a run share its folder."""
        rows = ("--model", self.clip, "--train-data", self.csv, *CROPS)
        return {
            "csv": [(1, rows)],
            "shards": [(1, ("--model", self.clip, "--train-data", self.shards, "--train-num-samples", SAMPLES))],
            "accumulation": [(1, (*rows, "--accum-freq", 2, "--grad-clip-norm", 1))],
            "siglip": [(1, ("--model", self.siglip, "--train-data", self.csv, "--siglip"))],
            "coca": [(1, ("--model", self.coca, "--train-data", self.csv))],
            "distillation": [(1, (*rows, "--distill-model", self.clip, "--distill-pretrained", self.teacher))],
            "ema": [(1, (*rows, "--ema-decay", 0.9))],
            "two ranks": [(2, (*rows, "--dist-backend", "gloo"))],
            "resume": [(1, (*rows, "--epochs", 1)), (1, (*rows, "--resume", "latest"))],
            "amp": [(1, (*rows, "--precision", "amp"))],
        }


def train(source: Path, folder: Path, ranks: int, options: tuple[object, ...]) -> None:
    """Run `training.main` of a source tree."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks] if ranks > 1 else []
    command = [
        sys.executable, *launcher, "-m", "training.main", "--device", "cpu", "--batch-size", BATCH // ranks,
        "--epochs", EPOCHS, "--warmup", 4, "--lr", 1e-3, "--workers", 1, "--log-every-n-steps", 1, "--report-to",
        "tensorboard", "--output-dir", folder.parent, "--name", folder.name, *options,
    ]  # fmt: skip
    processes.run(command, PYTHONPATH=str(source / "src"))


def checksums(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """List (name, CRC-32 or number) of all tensors and numbers in a checkpoint."""
    if isinstance(value, torch.Tensor):
        yield name, zlib.crc32(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from checksums(part, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from checksums(part, f"{name}/{index}")
    elif isinstance(value, float):
        yield name, value


def numbers(source: Path, folder: Path, commands: list[tuple[int, tuple[object, ...]]]) -> dict[str, object]:
    """Return every loss of a run and the tensors of its last checkpoint, by name."""
    for ranks, options in commands:
        train(source, folder, ranks, options)
    found: dict[str, object] = {}
    for tag, values in train_runs.scalars(folder).items():
        if "loss" in tag:
            found |= {f"{tag} {step}": value for step, value in values.items()}
    saved = torch.load(folder / "checkpoints" / f"epoch_{EPOCHS}.pt", weights_only=True)
    for part in ("state_dict", "state_dict_ema", "optimizer"):
        found |= dict(checksums(saved.get(part, {}), part))
    return found


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", required=True, help="the version to compare with")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="the runs to compare (default: all)")
    options = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as temporary, checked_out(options.against, Path(temporary, "other")) as other:
        inputs = Inputs(Path(temporary))
        train(ROOT, Path(temporary, "teacher"), 1, ("--model", inputs.clip, "--train-data", inputs.csv))
        Path(temporary, "teacher", "checkpoints", f"epoch_{EPOCHS}.pt").rename(inputs.teacher)
        for name, commands in inputs.runs().items():
            if options.runs and name not in options.runs:
                continue
            ours, theirs = (numbers(tree, Path(temporary, tree.name, name), commands) for tree in (ROOT, other))
            wrong = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
            different += bool(wrong)
            losses = sum("loss" in key for key in ours)
            verdict = f"{len(wrong)} differ, such as {wrong[0]}" if wrong else "identical"
            print(f"{name:13} {losses} losses, {len(ours) - losses} tensors and numbers: {verdict}", flush=True)
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
