"""The files of a run's checkpoints: their names, and which one is the newest that can be read."""

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

logger = logging.getLogger(__name__)


def natural_key(string_: str) -> list[Any]:
    """Return a sort key that puts epoch_10 after epoch_9."""
    parts = filter(None, re.split(r"(\d+)", string_.lower()))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


# epoch_N.pt is saved after N epochs, epoch_E_step_S.pt after E epochs and S steps in total. The names sort in the order
# of saving, also for open_clip, which resumes from the last name.
NUMBERED = re.compile(r"epoch_(\d+)(?:_step_(\d+))?\.pt")


def get_latest_checkpoint(path: str | Path, remote: bool = False) -> str | None:
    """Find the newest checkpoint (*.pt) that can be read in a folder; None if there is no checkpoint.

    The newest is that with the highest epoch and step in its name. The epoch of epoch_latest.pt is read from the file,
    because it may be older than the others.

    Args:
        remote: `path` is a URL. Files are listed but not read there, and epoch_latest.pt is never copied there.

    Raises:
        ValueError: there are checkpoints, but none of them can be read.
    """
    if remote:
        names = [name for name in _list_remote(str(path)) if NUMBERED.fullmatch(name)]
        return f"{str(path).rstrip('/')}/{max(names, key=natural_key)}" if names else None
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
    numbered = [file for file in folder.glob("epoch_*.pt") if NUMBERED.fullmatch(file.name)]
    numbered.sort(key=_position, reverse=True)
    latest = folder / "epoch_latest.pt"
    if latest.exists():
        place = sum(_position(file) > _position(latest) for file in numbered)
        return [*numbered[:place], latest, *numbered[place:]]
    return numbered or sorted(folder.glob("[!.]*.pt"), key=lambda file: natural_key(file.name), reverse=True)


def _position(file: Path) -> tuple[int, int]:
    """Return (completed epochs, step): from the name if the checkpoint is numbered, otherwise from the file."""
    match = NUMBERED.fullmatch(file.name)
    if match:
        return int(match[1]), int(match[2] or 0)
    try:
        epoch = check_layout(file).get("epoch", 0)
    except (ValueError, OSError):
        return -1, 0
    return int(epoch) if isinstance(epoch, (int, float)) else 0, 0


def _find_damage(file: Path) -> str | None:
    """Read the whole file and verify its checksums. Return what is wrong with it, or None."""
    try:
        check_layout(file)
        with zipfile.ZipFile(file) as archive:
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
        return [line.split()[-1] for line in done.stdout.splitlines() if line.strip()]
    import fsspec.core

    filesystem, root = fsspec.core.url_to_fs(url)
    try:
        return [name.rsplit("/", 1)[-1] for name in filesystem.ls(root, detail=False)]
    except FileNotFoundError:
        return []
