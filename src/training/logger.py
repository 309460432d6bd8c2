"""Logs and metrics of a run: the text log, TensorBoard, Weights & Biases, results.jsonl."""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_clip import progress
from training.params.checks import reporters

if TYPE_CHECKING:
    from training.params import LoggingConfig

_handlers: list[logging.Handler] = []  # those that setup_logging added to the root logger


def setup_logging(log_file: str | None, level: int, include_host: bool = False) -> None:
    """Write the records of all loggers to stderr and append them to `log_file`.

    A second call replaces the handlers of the first one. Other handlers are kept.

    Args:
        log_file: path in an existing folder; None: only stderr.
        level: level of the root logger, such as logging.INFO. Loggers with another level keep it.
        include_host: add the host name to each line, for combined logs of several machines.
    """
    host = f"{socket.gethostname()} | " if include_host else ""
    formatter = logging.Formatter(f"%(asctime)s | {host}%(levelname)s | %(message)s", datefmt="%Y-%m-%d,%H:%M:%S")
    root = logging.getLogger()
    while _handlers:
        handler = _handlers.pop()
        root.removeHandler(handler)
        handler.close()
    _handlers.append(progress.LogHandler())
    if log_file:
        _handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in _handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(level)


class MetricsWriter:
    """Writes the metrics of a run. On processes other than the master its methods do nothing.

    `write` reports to TensorBoard (`directory/tensorboard`) and W&B, as `report_to` says. `write_results` always writes
    to `directory/checkpoints/results.jsonl`. The object is a context manager.
    """

    def __init__(
        self,
        cfg: LoggingConfig,
        directory: str | Path | None,
        is_master: bool,
        run_config: Mapping[str, Any] | None = None,
        resume: bool = False,
        name: str | None = None,
    ) -> None:
        """Open the reports.

        Args:
            cfg: `report_to` and `wandb_*` are used.
            directory: LOGS/NAME; None: write no files.
            is_master: whether this process writes.
            run_config: options to show with the run in W&B.
            resume: continue the W&B run with this name.
            name: name and id of the run in W&B; None: W&B chooses them.

        Raises:
            ModuleNotFoundError: a package that `report_to` needs is not installed.
        """
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._results: Path | None = None
        if not is_master:
            return
        wanted = set(reporters(cfg.report_to))
        if directory is not None:
            directory = Path(directory)
            self._results = directory / "checkpoints" / "results.jsonl"
            if wanted & {"tensorboard", "all"}:
                self._tensorboard = _open_tensorboard(directory / "tensorboard")
        if wanted & {"wandb", "all"}:
            self._wandb = _open_wandb(cfg, name, directory, dict(run_config or {}), resume)

    def write(self, metrics: Mapping[str, Any], step: int, prefix: str = "") -> None:
        """Report the numbers in `metrics` at `step` as `prefix/name` ("train/loss"). Other values are ignored."""
        named = {f"{prefix}/{name}" if prefix else name: value for name, value in _keep_numbers(metrics).items()}
        if self._tensorboard is not None:
            for name, value in named.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**named, "step": step}, step=step)

    def write_results(self, metrics: Mapping[str, Any], epoch: int) -> None:
        """Append the metrics and `epoch` to results.jsonl as one line, which is on disk when this returns."""
        if self._results is None:
            return
        self._results.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**_keep_numbers(metrics), "epoch": epoch})
        # Open the file each time: a crash loses nothing, and a file that was removed is created again.
        with self._results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Close the reports. Later calls of the methods do nothing."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._tensorboard = self._wandb = self._results = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _keep_numbers(metrics: Mapping[str, Any]) -> dict[str, float | int]:
    """Return the entries that are numbers, or tensors and arrays with one element, as Python numbers."""
    found: dict[str, float | int] = {}
    for name, value in metrics.items():
        if hasattr(value, "item") and math.prod(value.shape) == 1:
            value = value.item()
        if isinstance(value, numbers.Integral):
            found[name] = int(value)
        elif isinstance(value, numbers.Real):
            found[name] = float(value)
    return found


def _open_tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--report-to tensorboard needs the package tensorboard ({error}). Run: pip install tensorboard"
        ) from error
    return SummaryWriter(str(directory))


def _open_wandb(
    cfg: LoggingConfig, name: str | None, directory: Path | None, run_config: dict[str, Any], resume: bool
) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--report-to {cfg.report_to} needs wandb ({error}). Run: pip install wandb, or use tensorboard."
        ) from error
    return wandb.init(
        project=cfg.wandb_project_name,
        name=name,
        id=name,
        notes=cfg.wandb_notes,
        tags=[],
        dir=None if directory is None else str(directory),
        resume="auto" if resume else None,
        config=run_config,
    )
