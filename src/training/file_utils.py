"""Files of a run: atomic saves of checkpoints, and copies of the run's folder to remote storage."""

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
from open_clip.checkpoint.files import read_checkpoint
from open_clip.formats.whole_file import replacing
from training import children

logger = logging.getLogger(__name__)


def pt_save(pt_obj: Any, file_path: str | os.PathLike[str]) -> None:
    """Save an object with `torch.save`, so that `file_path` is always either the old file or the complete new one.

    A local file is written to a temporary file in the same folder, which is synced and renamed. If that fails, the
    temporary file is removed and the old file is unchanged. URLs (s3://...) are written with fsspec; object stores show
    an object only when it is complete.

    Raises:
        OSError, RuntimeError: writing failed, for example because the disk is full.
    """
    if is_url(file_path):
        with progress.watch(f"Saving {file_path}"), _import_fsspec().open(os.fspath(file_path), "wb") as file:
            torch.save(pt_obj, file)
        return
    with replacing(local_path(file_path), is_synced=True) as temporary:
        # Pass the name, not a file: torch then writes in C++ and releases the GIL for the other threads.
        with progress.watch(f"Saving {file_path}", lambda: temporary.stat().st_size, unit="B"):
            torch.save(pt_obj, temporary)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of `pt_save` whose process was killed."""
    for path in folder.glob(".*.pt.*.tmp"):
        path.unlink(missing_ok=True)
        logger.info("Removed %s, which an interrupted save has left.", path)


def pt_load(file_path: str | os.PathLike[str], map_location: Any = None) -> Any:
    """Load a file written by `torch.save` from a path or a URL.

    Only tensors and plain containers are loaded, without running code from the file. Other objects are dropped.

    Args:
        map_location: device for the tensors; None: the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or was not written by `torch.save`.
    """
    if is_url(file_path):
        with _import_fsspec().open(os.fspath(file_path), "rb") as file:
            loaded = read_checkpoint(file, os.fspath(file_path))
    else:
        loaded = read_checkpoint(local_path(file_path))
    return loaded if map_location is None else _move(loaded, map_location)


def _move(nested: Any, device: Any) -> Any:
    if isinstance(nested, torch.Tensor):
        return nested.to(device)
    if isinstance(nested, dict):
        return {key: _move(value, device) for key, value in nested.items()}
    return type(nested)(_move(value, device) for value in nested) if isinstance(nested, (list, tuple)) else nested


def check_exists(file_path: str | os.PathLike[str]) -> bool:
    """Return whether the file at a path or URL exists."""
    if is_url(file_path):
        try:
            with _import_fsspec().open(os.fspath(file_path), "rb"):
                return True
        except FileNotFoundError:
            return False
    return local_path(file_path).is_file()


def open_binary(file_path: str | os.PathLike[str]) -> Any:
    """Open the file at a path or URL for reading."""
    return (
        _import_fsspec().open(os.fspath(file_path), "rb").open()
        if is_url(file_path)
        else local_path(file_path).open("rb")
    )


def remote_sync_s3(local_dir: str, remote_dir: str) -> bool:
    """Copy new files of `local_dir` to `remote_dir` (s3://...) with the `aws` command. Return whether it succeeded."""
    excluded = ("*epoch_latest.pt", "*epoch_latest/*", "*.tmp", "*.tmp/*")
    command = ["aws", "s3", "sync", local_dir, remote_dir, *(word for name in excluded for word in ("--exclude", name))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        logger.error(
            "Remote sync: the command `aws` was not found. Install the AWS CLI, or use --remote-sync-protocol fsspec."
        )
        return False
    if done.returncode != 0:
        logger.error("Remote sync to %s failed: %s", remote_dir, done.stderr.strip() or f"status {done.returncode}")
        return False
    logger.info("Remote sync to %s done.", remote_dir)
    return True


def remote_sync_fsspec(local_dir: str, remote_dir: str) -> bool:
    """Copy new files of `local_dir` to `remote_dir`, an fsspec URL. Return whether it succeeded.

    A file is new if the remote file is missing, older, or has another size. Nothing is removed. epoch_latest.pt and
    temporary files are not copied, as in `remote_sync_s3`.
    """
    try:
        filesystem, root = _import_fsspec().core.url_to_fs(remote_dir)
        copied = sum(_copy_if_new(path, local_dir, filesystem, root) for path in sorted(Path(local_dir).rglob("*")))
    except Exception as error:  # stores raise many types of errors, and none may end the training
        logger.error("Remote sync to %s failed: %s: %s", remote_dir, type(error).__name__, error)
        return False
    logger.info("Remote sync to %s done: %d files copied.", remote_dir, copied)
    return True


def _copy_if_new(path: Path, local_dir: str, filesystem: Any, root: str) -> bool:
    relative = path.relative_to(local_dir)
    is_excluded = any(part.endswith(".tmp") or part in ("epoch_latest", "epoch_latest.pt") for part in relative.parts)
    if is_excluded or not path.is_file():
        return False
    target = f"{root.rstrip('/')}/{relative.as_posix()}"
    local = path.stat()
    with contextlib.suppress(FileNotFoundError):
        remote = filesystem.info(target)
        if remote.get("size") == local.st_size and _modified_seconds(remote, filesystem, target) >= local.st_mtime:
            return False
    filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
    filesystem.put_file(str(path), target)
    return True


def _modified_seconds(info: dict[str, Any], filesystem: Any, target: str) -> float:
    """Return when the remote file was written, in seconds since 1970; infinity if the store does not know."""
    try:
        return filesystem.modified(target).timestamp()
    except NotImplementedError:
        return float("inf")


def remote_sync(local_dir: str, remote_dir: str, protocol: str) -> bool:
    """Copy the folder once with the protocol "s3" or "fsspec". Return whether it succeeded."""
    with progress.watch(f"Copying {local_dir} to {remote_dir}"):
        if protocol == "s3":
            return remote_sync_s3(local_dir, remote_dir)
        if protocol == "fsspec":
            return remote_sync_fsspec(local_dir, remote_dir)
    logger.error("Remote sync: the protocol must be s3 or fsspec, got %r.", protocol)
    return False


def keep_running_remote_sync(sync_every: float, local_dir: str, remote_dir: str, protocol: str) -> None:
    """Copy the folder every `sync_every` seconds, forever. Failures are logged and tried again the next time."""
    while True:
        time.sleep(sync_every)
        remote_sync(local_dir, remote_dir, protocol)


def start_sync_process(
    sync_every: float, local_dir: str, remote_dir: str, protocol: str
) -> multiprocessing.process.BaseProcess:
    """Create a process, not yet started, that runs `keep_running_remote_sync` and ends with its parent.

    It is spawned, because forking a process that has threads and uses a device is not safe.
    """
    context = multiprocessing.get_context("spawn")
    return context.Process(target=_run_sync_process, args=(sync_every, local_dir, remote_dir, protocol), daemon=True)


def _run_sync_process(sync_every: float, local_dir: str, remote_dir: str, protocol: str) -> None:
    children.lead_group()  # `aws` joins the group, so a Ctrl-C on the terminal does not reach it
    # A spawned process has no log handlers. It does not write to the log file of its parent.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s | %(levelname)s | %(message)s")
    keep_running_remote_sync(sync_every, local_dir, remote_dir, protocol)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL: s3://bucket/x, gs://..., memory://... file:// is a local path."""
    text = os.fspath(path)
    return "://" in text and not text.startswith("file://")


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return a local path, which may begin with file://, as a Path."""
    return Path(os.fspath(path).removeprefix("file://"))


def _import_fsspec() -> Any:
    try:
        import fsspec
        import fsspec.core
    except ImportError as error:
        raise ModuleNotFoundError(f"URLs need the package fsspec ({error}). Run: pip install fsspec") from error
    return fsspec
