"""The folder of a run: its name, its log and options, the checkpoint that it resumes from, and its remote copy."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import open_clip
from open_clip import device as devices
from open_clip.formats.whole_file import write_text
from open_clip.utils import check_folder
from training import children, file_utils, precision, ranks
from training import logger as logs
from training.checkpoint.state import get_latest_checkpoint
from training.params import CheckpointConfig, TrainConfig, warnings_for
from training.ranks import World

logger = logging.getLogger(__name__)


def complete(cfg: TrainConfig, world: World) -> TrainConfig:
    """The sections with what was left open decided: the precision by the device, the run's name by its options."""
    chosen = precision.resolve(cfg.model.precision, world.device)
    name = cfg.checkpoint.name
    if name is None:
        parts = [
            f"{datetime.now():%Y_%m_%d-%H_%M_%S}",
            "model_" + cfg.model.model.replace("/", "-").replace(":", "-"),
            f"lr_{cfg.optim.lr}",
            f"b_{cfg.data.batch_size}",
            f"j_{cfg.data.workers}",
            f"p_{chosen}",
        ]
        name = ranks.broadcast_object("-".join(parts))  # clocks differ
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, precision=chosen),
        checkpoint=dataclasses.replace(cfg.checkpoint, name=name),
    )


def prepare(cfg: CheckpointConfig, world: World) -> tuple[Path | None, str | None]:
    """(LOGS/NAME with its sub-folders made, or None where nothing is written; the checkpoint to resume from, or None).

    The master looks and tells the others: they may see the file system at another moment.
    """
    folder = None if cfg.logs is None else Path(cfg.logs) / str(cfg.name)
    found: tuple[bool, str | None] = (False, None)
    if world.is_master:
        taken = folder is not None and (folder / "out.log").exists() and not ranks.restarts()
        found = (taken and cfg.resume is None, _find_checkpoint(cfg, folder))
    taken, resume_from = ranks.broadcast_object(found)
    if taken:
        raise FileExistsError(
            f"{folder} has a run already. Choose another --name, or continue that run with --resume latest."
        )
    if folder is not None:
        if world.is_master:
            check_folder(folder / "checkpoints", "--output-dir")
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if world.is_master:
            file_utils.remove_leftovers(folder / "checkpoints")
    return folder, resume_from


def _find_checkpoint(cfg: CheckpointConfig, folder: Path | None) -> str | None:
    if cfg.resume != "latest":
        # What a restart goes on from is this run's own, whatever it began with.
        own = get_latest_checkpoint(folder / "checkpoints") if folder is not None and ranks.restarts() else None
        return own or cfg.resume
    latest = None
    if cfg.remote_sync is not None:
        latest = get_latest_checkpoint(f"{cfg.remote_sync.rstrip('/')}/{cfg.name}/checkpoints", remote=True)
    if latest is None and folder is not None:
        latest = get_latest_checkpoint(folder / "checkpoints")
    return latest


def start_log(cfg: TrainConfig, options: argparse.Namespace, world: World, folder: Path | None) -> None:
    """Text log to the screen and the run's folder, one for the run or one a machine, and the options to params.txt."""
    local = cfg.logging.log_local
    writes = world.is_local_master if local else world.is_master
    level = logging.DEBUG if cfg.logging.debug else logging.INFO if writes else logging.WARNING
    file = "out.log" if world.is_master else f"out-{world.rank}.log"
    logs.setup_logging(str(folder / file) if folder is not None and writes else None, level, include_host=local)
    if not world.is_master:
        return
    kind = devices.get(world.device)
    logger.info("Run %s on %d x %s (%s), precision %s.", cfg.checkpoint.name, world.world_size, world.device.type,
             kind.name(world.device.index), cfg.model.precision)  # fmt: skip
    for note in kind.notes():
        logger.info("%s", note)
    if cfg.distributed.deterministic:
        logger.info("--deterministic: %s.", kind.deterministic_settings())
    warn(kind.environment_warnings(), world)
    warn((f"{sentence}." for sentence in warnings_for(options, world.world_size)), world)
    if folder is not None:
        lines = [f"{name}: {value}\n" for name, value in sorted({**vars(options), **_decided(cfg, world)}.items())]
        write_text(folder / "params.txt", "".join(lines))


def warn(sentences: Iterable[str], world: World) -> None:
    """Logs warnings that hold for all ranks once."""
    for sentence in sentences if world.is_master else ():
        logger.warning("%s", sentence)


def _decided(cfg: TrainConfig, world: World) -> dict[str, Any]:
    """Options whose values were decided here, and this run's processes."""
    return {
        "name": cfg.checkpoint.name,
        "precision": cfg.model.precision,
        "device": str(world.device),
        "dist_backend": world.backend,
        "world_size": world.world_size,
        "distributed": world.distributed,
    }


def copy_codebase(args: CheckpointConfig | argparse.Namespace) -> str:
    """Copy the packages that run to LOGS/NAME/code, replace an earlier copy, and return the path."""
    target = Path(str(args.logs)) / str(args.name) / "code"
    for package in (open_clip, sys.modules["training"]):
        source = Path(package.__file__ or "").parent
        shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    logger.info("Copied the source to %s", target)
    return str(target)


@contextlib.contextmanager
def keep_remote_copy(cfg: CheckpointConfig, world: World, folder: Path | None) -> Iterator[None]:
    """Keeps a remote copy of the run's folder up to date, by a process of its own, and completes it at the end."""
    if cfg.remote_sync is None or folder is None or not world.is_master:
        yield
        return
    remote = f"{cfg.remote_sync.rstrip('/')}/{cfg.name}"
    if not file_utils.remote_sync(str(folder), remote, cfg.remote_sync_protocol):
        raise RuntimeError(f"--remote-sync: the first copy to {remote} failed (the reason is logged above).")
    process = file_utils.start_sync_process(cfg.remote_sync_frequency, str(folder), remote, cfg.remote_sync_protocol)
    process.start()
    remote_is_due = True
    try:
        yield
    except KeyboardInterrupt:  # a second Ctrl-C
        remote_is_due = False
        raise
    finally:
        children.end([process], seconds=0)
        if remote_is_due and not file_utils.remote_sync(str(folder), remote, cfg.remote_sync_protocol):
            logger.error("The last copy to %s failed: it may lack the newest files of %s.", remote, folder)


def create_metrics_writer(
    cfg: TrainConfig, options: argparse.Namespace, world: World, folder: Path | None, resume_from: str | None
) -> logs.MetricsWriter:
    run_config = {**vars(options), **_decided(cfg, world)}
    resumes, name = resume_from is not None, cfg.checkpoint.name
    return logs.MetricsWriter(cfg.logging, folder, world.is_master, run_config, resume=resumes, name=name)
