"""The folder of a run: its name, its log and options, the checkpoint that it resumes from, and its remote copy."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import open_clip
from open_clip import device as devices
from open_clip.formats.whole_file import write_text
from open_clip.utils import check_folder
from training import children, file_utils, ranks
from training import logger as logs
from training import precision as precisions
from training.checkpoint.folder import remove_leftovers
from training.checkpoint.latest import get_latest_checkpoint
from training.params import CheckpointConfig, TrainConfig, describe_like_4, sections, warnings_for
from training.precision import Precision
from training.ranks import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What is known about a run before anything is built.

    Attributes:
        cfg: the options, with the name of the run and of its precision.
        folder: LOGS/NAME; None: nothing is written.
        resume_from: the checkpoint to load; None: start from the beginning.
    """

    cfg: TrainConfig
    world: World
    precision: Precision
    folder: Path | None
    resume_from: str | None


def open_run(options: argparse.Namespace, world: World) -> Run:
    """Name the run, create its folder, find the checkpoint to resume from, and start the log.

    Raises:
        FileExistsError: the folder has another run.
        ValueError: the device does not support the precision, or no checkpoint in the folder can be read.
    """
    cfg = sections(options)
    precision = precisions.create(cfg.model.precision, world.device)
    cfg = _complete(cfg, precision)
    folder, resume_from = _prepare(cfg.checkpoint, world)
    run = Run(cfg, world, precision, folder, resume_from)
    _start_log(run, options)
    if cfg.logging.copy_codebase and folder is not None and world.is_master:
        _copy_packages(folder / "code")
    return run


def _complete(cfg: TrainConfig, precision: Precision) -> TrainConfig:
    """Return the options with the name of the precision, and a name for the run if none was given."""
    name = cfg.checkpoint.name
    if name is None:
        parts = [
            f"{datetime.now():%Y_%m_%d-%H_%M_%S}",
            "model_" + cfg.model.model.replace("/", "-").replace(":", "-"),
            f"lr_{cfg.optim.lr}",
            f"b_{cfg.data.batch_size}",
            f"j_{cfg.data.workers}",
            f"p_{precision.name}",
        ]
        name = ranks.broadcast_object("-".join(parts))  # clocks differ
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, precision=precision.name),
        checkpoint=dataclasses.replace(cfg.checkpoint, name=name),
    )


def _prepare(cfg: CheckpointConfig, world: World) -> tuple[Path | None, str | None]:
    """Create the folder. Return (LOGS/NAME, checkpoint to resume from), each may be None.

    The master looks for files and tells the other ranks, which may see the file system in another state.
    """
    folder = None if cfg.logs is None else Path(cfg.logs) / str(cfg.name)
    found: tuple[bool, str | None] = (False, None)
    if world.is_master:
        has_run = folder is not None and (folder / "out.log").exists() and not ranks.restarts()
        is_taken = has_run and cfg.resume is None
        if folder is not None and not is_taken:
            _remove_leftovers(folder / "checkpoints")
        found = (is_taken, None if is_taken else _find_checkpoint(cfg, folder))
    is_taken, resume_from = ranks.broadcast_object(found)
    if is_taken:
        raise FileExistsError(
            f"{folder} has a run already. Choose another --name, or continue that run with --resume latest."
        )
    if folder is not None:
        if world.is_master:
            check_folder(folder / "checkpoints", "--output-dir")
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return folder, resume_from


def _remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves have left. A folder that was complete but for its name gets the name."""
    file_utils.remove_leftovers(folder)
    for temporary, name in remove_leftovers(folder):
        if name is None:
            logger.info("Removed %s, which an interrupted save has left.", temporary)
        else:
            logger.info("An interrupted save had completed %s. Its name is now %s.", temporary, name)


def _find_checkpoint(cfg: CheckpointConfig, folder: Path | None) -> str | None:
    if cfg.resume != "latest":
        # After a restart by torchrun the run continues from its own checkpoint, not from that of --resume.
        own = get_latest_checkpoint(folder / "checkpoints") if folder is not None and ranks.restarts() else None
        return own or cfg.resume
    latest = None
    if cfg.remote_sync is not None:
        latest = get_latest_checkpoint(f"{cfg.remote_sync.rstrip('/')}/{cfg.name}/checkpoints", remote=True)
    if latest is None and folder is not None:
        latest = get_latest_checkpoint(folder / "checkpoints")
    return latest


def _start_log(run: Run, options: argparse.Namespace) -> None:
    """Start the text log on the screen and in the folder, one per run or machine. Write the options to params.txt."""
    cfg, world, folder = run.cfg, run.world, run.folder
    local = cfg.logging.log_local
    writes = world.is_local_master if local else world.is_master
    level = logging.DEBUG if cfg.logging.debug else logging.INFO if writes else logging.WARNING
    file = "out.log" if world.is_master else f"out-{world.rank}.log"
    logs.setup_logging(str(folder / file) if folder is not None and writes else None, level, include_host=local)
    if not world.is_master:
        return
    kind = devices.get(world.device)
    logger.info(
        "Run %s on %d x %s (%s), precision %s.",
        cfg.checkpoint.name, world.world_size, world.device.type, kind.name(world.device.index), run.precision.name,
    )  # fmt: skip
    for note in kind.notes():
        logger.info("%s", note)
    if cfg.distributed.deterministic:
        logger.info("--deterministic: %s.", kind.deterministic_settings())
    if cfg.model.like_4:
        logger.info("%s", describe_like_4(options))
    warn(kind.environment_warnings(), world)
    warn((f"{sentence}." for sentence in warnings_for(options, world.world_size)), world)
    if folder is not None:
        lines = [f"{name}: {value}\n" for name, value in sorted(_values(run, options).items())]
        write_text(folder / "params.txt", "".join(lines))


def warn(sentences: Iterable[str], world: World) -> None:
    """Log warnings that hold for all ranks, on the master."""
    for sentence in sentences if world.is_master else ():
        logger.warning("%s", sentence)


def _values(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Return the options with the values that were decided here, and the processes of the run."""
    world = run.world
    return {
        **vars(options),
        "name": run.cfg.checkpoint.name,
        "precision": run.precision.name,
        "device": str(world.device),
        "dist_backend": world.backend,
        "world_size": world.world_size,
        "distributed": world.distributed,
    }


def copy_codebase(args: CheckpointConfig | argparse.Namespace) -> str:
    """Copy the source of both packages to LOGS/NAME/code and return its path. Files of an earlier copy are replaced."""
    return str(_copy_packages(Path(str(args.logs)) / str(args.name) / "code"))


def _copy_packages(target: Path) -> Path:
    for package in (open_clip, sys.modules["training"]):
        source = Path(package.__file__ or "").parent
        shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    logger.info("Copied the source to %s", target)
    return target


@contextlib.contextmanager
def keep_remote_copy(run: Run) -> Iterator[None]:
    """Keep a remote copy of the folder up to date with a child process, and complete it at the end of the run."""
    cfg, folder = run.cfg.checkpoint, run.folder
    if cfg.remote_sync is None or folder is None or not run.world.is_master:
        yield
        return
    remote = f"{cfg.remote_sync.rstrip('/')}/{cfg.name}"
    if not file_utils.remote_sync(str(folder), remote, cfg.remote_sync_protocol):
        raise RuntimeError(f"--remote-sync: the first copy to {remote} failed (the reason is logged above).")
    process = file_utils.start_sync_process(cfg.remote_sync_frequency, str(folder), remote, cfg.remote_sync_protocol)
    process.start()
    copies_at_end = True
    try:
        yield
    except KeyboardInterrupt:  # a second Ctrl-C
        copies_at_end = False
        raise
    finally:
        children.end([process], seconds=0)
        if copies_at_end and not file_utils.remote_sync(str(folder), remote, cfg.remote_sync_protocol):
            logger.error("The last copy to %s failed: it may lack the newest files of %s.", remote, folder)


def create_metrics_writer(run: Run, options: argparse.Namespace) -> logs.MetricsWriter:
    is_resumed, name = run.resume_from is not None, run.cfg.checkpoint.name
    values = _values(run, options)
    return logs.MetricsWriter(run.cfg.logging, run.folder, run.world.is_master, values, resume=is_resumed, name=name)
