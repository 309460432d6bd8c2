"""`python -m training.consolidate FOLDER OUT.pt`: make one checkpoint file of a sharded checkpoint.

The file is what `--fsdp-checkpoint full` would have written, with the names of a distributed run ("module."), which
open_clip 3.3 needs to resume on several processes. With --only, the names are those of the model. One tensor is in
memory at a time.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from open_clip import progress
from open_clip.formats.sharded_folder import METADATA
from open_clip.utils import check_folder, run_command
from training.checkpoint import streamed_file
from training.checkpoint.file_format import DDP_PREFIX
from training.checkpoint.folder import find_damage
from training.checkpoint.folder_reader import read_folder
from training.checkpoint.stored_tensor import map_leaves

logger = logging.getLogger(__name__)

_SELECTIONS = {"weights": "state_dict", "average": "state_dict_ema"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.consolidate",
        description="Make one file of a sharded checkpoint (--fsdp-checkpoint sharded), for --resume, --pretrained and "
        "open_clip.create_model(..., pretrained=OUT.pt). Needs memory for the largest tensor only.",
    )
    add = parser.add_argument
    add("folder", help="folder of the checkpoint, such as LOGS/NAME/checkpoints/epoch_3")
    add("out", metavar="OUT.pt", help="file to write")
    add("--only", choices=list(_SELECTIONS), help="write only the state dict of the weights, or of the averaged "
        "weights (--ema-decay). Default: everything that a resumed run needs")  # fmt: skip
    add("--overwrite", action="store_true", help="replace OUT.pt if it exists")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        FileNotFoundError: the folder is not a sharded checkpoint.
        FileExistsError: the file exists.
        ValueError: the checkpoint is damaged, or has no averaged weights.
        OSError: writing failed.
    """
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[progress.LogHandler()])
    with progress.showing():
        consolidate(Path(args.folder), Path(args.out), args.only, args.overwrite)


def consolidate(folder: Path, out: Path, only: str | None = None, overwrite: bool = False) -> None:
    """Write one file. See `main` for the errors.

    Args:
        only: "weights" or "average"; None: everything.
        overwrite: whether to replace a file.
    """
    _check(folder, out, overwrite)
    with progress.watch(f"Checking {folder}"):
        damage = find_damage(folder)
    if damage is not None:
        raise ValueError(f"{folder} is damaged: {damage.rstrip('.')}. Use an earlier checkpoint.")
    content: dict[str, Any] = read_folder(folder)
    if only is None:
        content["state_dict"] = {DDP_PREFIX + name: value for name, value in content["state_dict"].items()}
    else:
        if _SELECTIONS[only] not in content:
            raise ValueError(f"{folder} has no averaged weights, because the run had no --ema-decay. Leave out --only.")
        content = content[_SELECTIONS[only]]
    total = _count_bytes(content)
    with progress.Task(f"Writing {out}", total, "B") as task:
        streamed_file.save(content, out, task.advance)
    logger.info("Wrote %s (%.1f MB).", out, out.stat().st_size / 1e6)


def _check(folder: Path, out: Path, overwrite: bool) -> None:
    if not (folder / METADATA).exists():
        raise FileNotFoundError(
            f"{folder} is not a sharded checkpoint: it has no {METADATA}. Pass a folder such as "
            "LOGS/NAME/checkpoints/epoch_3, which --fsdp-checkpoint sharded has written."
        )
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder. Give the name of a file.")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists. Choose another name, or replace it with --overwrite.")
    check_folder(out.parent, "The folder of OUT.pt")


def _count_bytes(content: Any) -> int:
    """Count the bytes of the tensors. A tensor with several names counts once."""
    tensors: dict[int, Tensor] = {}
    map_leaves(content, Tensor, lambda tensor: tensors.setdefault(id(tensor), tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


if __name__ == "__main__":
    run_command(main)
