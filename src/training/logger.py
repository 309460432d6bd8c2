"""Where a run's words and numbers go: the text log, TensorBoard, Weights & Biases, results.jsonl."""

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
from training.flag_checks import reporters

if TYPE_CHECKING:
    from training.params import LoggingConfig

_handlers: list[logging.Handler] = []  # those that setup_logging gave to the root


def setup_logging(log_file: str | None, level: int, include_host: bool = False) -> None:
    """Sends all loggers to stderr and, if given, to the end of `log_file`.

    Called again (a second run in the process) it replaces what it set before; handlers of others stay.

    Args:
        log_file: path, its folder existing; None for stderr only.
        level: of the root, such as logging.INFO. Loggers that were given a level of their own keep it.
        include_host: put the host's name into each line, for logs of many machines that are read together.
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
    """Writes the numbers of a run; on processes that are not the master all its methods do nothing.

    `report_to` says which of TensorBoard (`directory/tensorboard`) and W&B get every `write`; the results of
    evaluations go to `directory/checkpoints/results.jsonl`, whatever it says. Usable as a context manager.
    """

    def __init__(
        self,
        cfg: LoggingConfig,
        directory: str | Path | None,
        is_master: bool,
        run_config: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        """
        Args:
            cfg: `report_to`, `name`, `wandb_*`.
            directory: LOGS/NAME; None: nothing is written to files.
            is_master: whether this process writes.
            run_config: options shown beside the run in W&B.
            resume: continue the W&B run of this name.

        Raises:
            ModuleNotFoundError: where what `report_to` asks for is not installed.
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
                self._tensorboard = _tensorboard_writer(directory / "tensorboard")
        if wanted & {"wandb", "all"}:
            self._wandb = _wandb_run(cfg, directory, dict(run_config or {}), resume)

    def write(self, metrics: Mapping[str, Any], step: int, prefix: str = "") -> None:
        """Reports each number of `metrics` at `step` as `prefix/name` ("train/loss"); what is no number is left out."""
        named = {f"{prefix}/{name}" if prefix else name: value for name, value in _numbers(metrics).items()}
        if self._tensorboard is not None:
            for name, value in named.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**named, "step": step}, step=step)

    def write_results(self, metrics: Mapping[str, Any], epoch: int) -> None:
        """Appends one line of JSON, the metrics and `epoch`, to results.jsonl; on disk when it returns."""
        if self._results is None:
            return
        self._results.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**_numbers(metrics), "epoch": epoch})
        # Opened each time: a crash loses nothing, and a file removed by hand is made anew.
        with self._results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Ends the reports; later calls do nothing."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._tensorboard = self._wandb = self._results = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float | int]:
    """The entries that are numbers, or hold a single one (a tensor, numpy's scalars), as Python's."""
    found: dict[str, float | int] = {}
    for name, value in metrics.items():
        if hasattr(value, "item") and math.prod(value.shape) == 1:
            value = value.item()
        if isinstance(value, numbers.Integral):
            found[name] = int(value)
        elif isinstance(value, numbers.Real):
            found[name] = float(value)
    return found


def _tensorboard_writer(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--report-to tensorboard needs the package tensorboard ({error}): pip install tensorboard"
        ) from error
    return SummaryWriter(str(directory))


def _wandb_run(cfg: LoggingConfig, directory: Path | None, run_config: dict[str, Any], resume: bool) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--report-to {cfg.report_to} needs the package wandb ({error}): pip install wandb, or use tensorboard"
        ) from error
    return wandb.init(
        project=cfg.wandb_project_name,
        name=cfg.name,
        id=cfg.name,
        notes=cfg.wandb_notes,
        tags=[],
        dir=None if directory is None else str(directory),
        resume="auto" if resume else None,
        config=run_config,
    )
