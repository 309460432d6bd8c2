"""The checkpoints of a run, files and folders: their names, and which one is the newest that can be read."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import zipfile
import zlib
from pathlib import Path
from typing import Any

from open_clip import progress
from open_clip.checkpoint.files import check_layout
from open_clip.checkpoint.mismatch import join_some
from training.checkpoint.folder import find_damage as find_folder_damage
from training.checkpoint.folder import is_sharded_checkpoint, read_manifest
from training.checkpoint.folder_reader import is_complete

logger = logging.getLogger(__name__)


def natural_key(string_: str) -> list[Any]:
    """Return a sort key that puts epoch_10 after epoch_9."""
    parts = filter(None, re.split(r"(\d+)", string_.lower()))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


# epoch_N.pt is saved after N epochs, epoch_E_step_S.pt after E epochs and S steps in total. The names sort in the order
# of saving, also for open_clip, which resumes from the last name. Folders of sharded checkpoints have no ".pt".
NUMBERED = re.compile(r"epoch_(\d+)(?:_step_(\d+))?(?:\.pt)?")
_LATEST = ("epoch_latest.pt", "epoch_latest")


def find_numbered(folder: Path) -> dict[Path, tuple[int, int]]:
    """Find the numbered checkpoints in a folder: their paths, and (completed epochs, step) or (epochs, 0)."""
    found = {path: NUMBERED.fullmatch(path.name) for path in folder.glob("epoch_*") if _is_checkpoint(path)}
    return {path: (int(match[1]), int(match[2] or 0)) for path, match in found.items() if match}


def _is_checkpoint(path: Path) -> bool:
    return path.suffix == ".pt" if not path.is_dir() else is_sharded_checkpoint(path)


def get_latest_checkpoint(path: str | Path, remote: bool = False) -> str | None:
    """Find the newest checkpoint (*.pt, or the folder of a sharded one) that can be read; None if there is none.

    The newest is that with the highest epoch and step in its name. The epoch of epoch_latest.pt is read from the file,
    because it may be older than the others.

    Args:
        remote: `path` is a URL. Files are listed but not read there, and epoch_latest.pt is never copied there.

    Raises:
        ValueError: there are checkpoints, but none of them can be read.
    """
    if remote:
        url = str(path).rstrip("/")
        names = [name for name in _list_remote(url) if NUMBERED.fullmatch(name)]
        for name in sorted(names, key=natural_key, reverse=True):
            if name.endswith(".pt") or is_complete(f"{url}/{name}"):
                return f"{url}/{name}"
            logger.warning("%s/%s was not copied completely and is skipped.", url, name)
        return None
    damaged = []
    for file in _newest_first(Path(path)):
        with progress.watch(f"Checking {file}"):
            reason = _find_damage(file)
        if reason is None:
            return str(file)
        logger.warning("%s is damaged and skipped: %s.", file, reason.rstrip("."))
        damaged.append(file.name)
    if damaged:
        raise ValueError(
            f"None of the checkpoints in {path} can be read: {join_some(damaged)}. See the log for the reasons. "
            "Restore one of them from a copy, or remove them to start from the beginning."
        )
    return None


def _newest_first(folder: Path) -> list[Path]:
    numbered = list(find_numbered(folder))
    numbered.sort(key=_position, reverse=True)
    for latest in (folder / name for name in _LATEST):
        if latest.exists() and latest.resolve() not in [path.resolve() for path in numbered]:
            place = sum(_position(path) > _position(latest) for path in numbered)
            numbered.insert(place, latest)
    return numbered or sorted(folder.glob("[!.]*.pt"), key=lambda file: natural_key(file.name), reverse=True)


def _position(path: Path) -> tuple[int, int]:
    """Return (completed epochs, step): from the name if the checkpoint is numbered, otherwise from its content."""
    match = NUMBERED.fullmatch(path.name)
    if match:
        return int(match[1]), int(match[2] or 0)
    try:
        epoch = (read_manifest(path) if path.is_dir() else check_layout(path)).get("epoch", 0)
    except (ValueError, OSError):
        return -1, 0
    return int(epoch) if isinstance(epoch, (int, float)) else 0, 0


def _find_damage(path: Path) -> str | None:
    """Read the whole checkpoint and verify its checksums. Return what is wrong with it, or None."""
    if path.is_dir():
        return find_folder_damage(path)
    try:
        check_layout(path)
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (ValueError, RuntimeError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None if broken is None else f"the checksum of its entry {broken} is wrong"


def _list_remote(url: str) -> list[str]:
    """List the file names at a URL; empty if the folder does not exist. s3:// is read with `aws` if it is installed."""
    if url.startswith("s3://") and shutil.which("aws"):
        ls = ["aws", "s3", "ls", url.rstrip("/") + "/"]
        done = subprocess.run(ls, capture_output=True, text=True, errors="replace")
        # No check of the status: `aws` also fails if the folder does not exist yet, as in a new run.
        return [line.split()[-1].rstrip("/") for line in done.stdout.splitlines() if line.strip()]
    import fsspec.core

    filesystem, root = fsspec.core.url_to_fs(url)
    try:
        return [name.rstrip("/").rsplit("/", 1)[-1] for name in filesystem.ls(root, detail=False)]
    except FileNotFoundError:
        return []
