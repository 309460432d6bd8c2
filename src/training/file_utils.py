"""Files of a run: checkpoints that a crash cannot tear, and copies of the run's folder elsewhere."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from open_clip import progress
from open_clip.checkpoint import read_checkpoint
from open_clip.whole_file import replacing
from training import children

logger = logging.getLogger(__name__)


def pt_save(pt_obj: Any, file_path: str | os.PathLike[str]) -> None:
    """Writes `torch.save(pt_obj)` so that `file_path` is at every moment the old file or the whole new one.

    A local file is written under a temporary name in the same folder, synced, renamed, and the folder synced; after a
    failure the temporary file is gone and the old one untouched. URLs (s3://...) are written by fsspec, whose stores
    show an object when it is complete.

    Raises:
        OSError, RuntimeError: whatever writing raised, such as a full disk.
    """
    if _is_url(file_path):
        with progress.watch(f"Saving {file_path}"), _fsspec().open(os.fspath(file_path), "wb") as file:
            torch.save(pt_obj, file)
        return
    with replacing(_local(file_path), is_synced=True) as temporary:
        # By name: torch then writes from C++, and other threads of this process go on.
        with progress.watch(f"Saving {file_path}", lambda: temporary.stat().st_size, unit="B"):
            torch.save(pt_obj, temporary)


def remove_leftovers(folder: Path) -> None:
    """Removes what saves left behind whose process was killed: `pt_save`'s temporary files."""
    for path in folder.glob(".*.pt.*.tmp"):
        path.unlink(missing_ok=True)
        logger.info("Removed %s, the beginning of a save that was cut off.", path)


def pt_load(file_path: str | os.PathLike[str], map_location: Any = None) -> Any:
    """Read what `pt_save` wrote, from a path or a URL: tensors and plain containers. No code is run; other objects are
    dropped.

    Args:
        map_location: a device for the tensors; None is "cpu".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not written by `torch.save`.
    """
    if _is_url(file_path):
        with _fsspec().open(os.fspath(file_path), "rb") as file:
            loaded = read_checkpoint(file, os.fspath(file_path))
    else:
        loaded = read_checkpoint(_local(file_path))
    return loaded if map_location is None else _move(loaded, map_location)


def _move(nested: Any, device: Any) -> Any:
    if isinstance(nested, torch.Tensor):
        return nested.to(device)
    if isinstance(nested, dict):
        return {key: _move(value, device) for key, value in nested.items()}
    return type(nested)(_move(value, device) for value in nested) if isinstance(nested, (list, tuple)) else nested


def check_exists(file_path: str | os.PathLike[str]) -> bool:
    """Whether the path or URL can be opened."""
    if _is_url(file_path):
        try:
            with _fsspec().open(os.fspath(file_path), "rb"):
                return True
        except FileNotFoundError:
            return False
    return _local(file_path).is_file()


def remote_sync_s3(local_dir: str, remote_dir: str) -> bool:
    """Copies what is new in `local_dir` to `remote_dir` (s3://...) by the `aws` command; whether it succeeded."""
    command = ["aws", "s3", "sync", local_dir, remote_dir, "--exclude", "*epoch_latest.pt", "--exclude", "*.tmp"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        logger.error(
            "Remote sync: there is no command `aws`. Install the AWS CLI, or use --remote-sync-protocol fsspec."
        )
        return False
    if done.returncode != 0:
        logger.error("Remote sync to %s failed: %s", remote_dir, done.stderr.strip() or f"status {done.returncode}")
        return False
    logger.info("Remote sync to %s done.", remote_dir)
    return True


def remote_sync_fsspec(local_dir: str, remote_dir: str) -> bool:
    """Copies what is new in `local_dir` to `remote_dir`, any URL that fsspec knows; whether it succeeded.

    A file is new when the other side has none of its name and size, or an older one; all are compared, none is
    removed. epoch_latest.pt and temporary files stay behind, as with `aws s3 sync`.
    """
    try:
        filesystem, root = _fsspec().core.url_to_fs(remote_dir)
        copied = sum(_copy_if_new(path, local_dir, filesystem, root) for path in sorted(Path(local_dir).rglob("*")))
    except Exception as error:  # each store has errors of its own, and none of them may end the training
        logger.error("Remote sync to %s failed: %s: %s", remote_dir, type(error).__name__, error)
        return False
    logger.info("Remote sync to %s done: %d files copied.", remote_dir, copied)
    return True


def _copy_if_new(path: Path, local_dir: str, filesystem: Any, root: str) -> bool:
    if not path.is_file() or path.name == "epoch_latest.pt" or path.name.endswith(".tmp"):
        return False
    target = f"{root.rstrip('/')}/{path.relative_to(local_dir).as_posix()}"
    here = path.stat()
    with contextlib.suppress(FileNotFoundError):
        there = filesystem.info(target)
        if there.get("size") == here.st_size and _seconds(there, filesystem, target) >= here.st_mtime:
            return False
    filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
    filesystem.put_file(str(path), target)
    return True


def _seconds(info: dict[str, Any], filesystem: Any, target: str) -> float:
    """When the remote file was written, seconds since 1970; infinite where the store does not say."""
    try:
        return filesystem.modified(target).timestamp()
    except NotImplementedError:
        return float("inf")


def remote_sync(local_dir: str, remote_dir: str, protocol: str) -> bool:
    """One copy of the folder by "s3" or "fsspec"; whether it succeeded."""
    with progress.watch(f"Copying {local_dir} to {remote_dir}"):
        if protocol == "s3":
            return remote_sync_s3(local_dir, remote_dir)
        if protocol == "fsspec":
            return remote_sync_fsspec(local_dir, remote_dir)
    logger.error("Remote sync: the protocol must be s3 or fsspec, got %r.", protocol)
    return False


def keep_running_remote_sync(sync_every: float, local_dir: str, remote_dir: str, protocol: str) -> None:
    """Copies every `sync_every` seconds, for ever; what fails is logged and tried again the next time."""
    while True:
        time.sleep(sync_every)
        remote_sync(local_dir, remote_dir, protocol)


def start_sync_process(
    sync_every: float, local_dir: str, remote_dir: str, protocol: str
) -> multiprocessing.process.BaseProcess:
    """The process, not yet started, that does `keep_running_remote_sync`; it ends with its parent.

    Spawned, not forked: a copy of a process that holds a device and its threads is not safe to run.
    """
    context = multiprocessing.get_context("spawn")
    return context.Process(target=_sync_process, args=(sync_every, local_dir, remote_dir, protocol), daemon=True)


def _sync_process(sync_every: float, local_dir: str, remote_dir: str, protocol: str) -> None:
    children.lead_group()  # with the command `aws`; a Ctrl-C on the terminal does not reach it
    # A spawned process has no log yet; its parent's file stays its parent's.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s | %(levelname)s | %(message)s")
    keep_running_remote_sync(sync_every, local_dir, remote_dir, protocol)


def _is_url(path: str | os.PathLike[str]) -> bool:
    """s3://bucket/x, gs://..., memory://...; file:// is a local path."""
    text = os.fspath(path)
    return "://" in text and not text.startswith("file://")


def _local(path: str | os.PathLike[str]) -> Path:
    return Path(os.fspath(path).removeprefix("file://"))


def _fsspec() -> Any:
    try:
        import fsspec
        import fsspec.core
    except ImportError as error:
        raise ModuleNotFoundError(f"URLs need the package fsspec ({error}): pip install fsspec") from error
    return fsspec
