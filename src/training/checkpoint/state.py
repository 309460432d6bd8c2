"""The state of a training run, and its checkpoints.

A checkpoint has the keys of open_clip: {"epoch", "name", "state_dict", "optimizer"[, "scaler"]}. Two more keys hold
what open_clip does not save. "train_state" has the step, the read position within the epoch and its data, and the
states of the random generators of every rank. "state_dict_ema" (with --ema-decay) has the averaged weights. Therefore
open_clip can resume these checkpoints, and this package can resume open_clip's.

Checkpoints contain only tensors and plain values, so that `torch.load(weights_only=True)` can read them. Other objects
are dropped when a checkpoint is read.
"""

from __future__ import annotations

import io
import logging
import re
import shutil
import subprocess
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_clip import progress
from open_clip.checkpoint.files import check_layout
from open_clip.checkpoint.key_prefixes import drop_extras, strip_prefixes, strip_to_fit
from open_clip.checkpoint.mismatch import compare, join_some
from training import file_utils, ranks
from training.checkpoint import rng

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """All state of a run that changes over time. A resumed run continues from it.

    The learning rate schedule is a function of the step, so it has no state.

    Attributes:
        model: the bare module, not wrapped by DDP or the compiler.
        optimizer, scaler: None in a run that only evaluates, or without gradient scaling.
        epoch: completed epochs.
        step: completed steps, including skipped ones.
        samples_seen: samples of all ranks.
        epoch_step, epoch_samples: the steps and samples of the current epoch.
        samples_per_step: samples of all ranks; 0 if unknown.
        data: training.data.DataInfo, whose read position is saved.
        progress: training.train.Progress, or its state.
        average: training.ema.WeightAverage, or None.
        guard: training.step_guard.StepGuard, or None.
    """

    model: nn.Module
    device: torch.device
    name: str = ""
    seed: int = 0
    optimizer: torch.optim.Optimizer | None = None
    scaler: Any = None
    steps_per_epoch: int = 0
    samples_per_epoch: int = 0
    samples_per_step: int = 0
    epoch: int = 0
    step: int = 0
    samples_seen: int = 0
    epoch_step: int = 0
    epoch_samples: int = 0
    data: Any = None
    progress: Any = field(default_factory=dict)
    average: Any = None
    guard: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Build the checkpoint. Its tensors are the live ones. Collective: gathers the states of all ranks."""
        here = ranks.world()
        weights = self.model.state_dict()
        # open_clip writes the names of DDP's wrapper, and its distributed resume needs them.
        prefix = "module." if here.distributed else ""
        checkpoint: dict[str, Any] = {
            "epoch": self.epoch,
            "name": self.name,
            "state_dict": {prefix + name: value for name, value in weights.items()},
        }
        if self.optimizer is not None:
            checkpoint["optimizer"] = self.optimizer.state_dict()
        if self.scaler is not None:
            checkpoint["scaler"] = self.scaler.state_dict()
        if self.average is not None:
            checkpoint["state_dict_ema"] = self.average.state_dict(weights)
        own = {"rng": rng.rng_state(self.device)} | ({} if self.data is None else {"data": self.data.state_dict()})
        by_rank = _gather_states(own)
        checkpoint["train_state"] = {
            "version": 2,
            "step": self.step,
            "samples_seen": self.samples_seen,
            "epoch_step": self.epoch_step,
            "epoch_samples": self.epoch_samples,
            "samples_per_step": self.samples_per_step,
            "rng": [rank["rng"] for rank in by_rank],
            "data": [rank["data"] for rank in by_rank if "data" in rank],
            "progress": self.progress if isinstance(self.progress, dict) else self.progress.state_dict(),
            "guard": {} if self.guard is None else self.guard.state_dict(),
        }
        return checkpoint

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load a checkpoint of this package or of open_clip. A plain state dict sets only the weights.

        Raises:
            ValueError: the checkpoint is of another model or another optimizer.
        """
        if not _is_training_checkpoint(checkpoint):
            load_weights(self.model, checkpoint.get("state_dict", checkpoint))
            self._load_average(checkpoint)
            logger.info("The checkpoint has only weights. The run starts with them at epoch 0.")
            return
        load_weights(self.model, checkpoint["state_dict"])
        self._load_average(checkpoint)
        self.epoch = int(checkpoint["epoch"])
        if self.optimizer is not None:
            self._load_optimizer(checkpoint)
        train_state = checkpoint.get("train_state")
        if train_state is None:
            self.step = self.epoch * self.steps_per_epoch
            self.samples_seen = self.epoch * self.samples_per_epoch
            logger.info("The checkpoint has no random states (it is from open_clip). They start from --seed.")
            return
        self.step, self.samples_seen = int(train_state["step"]), int(train_state["samples_seen"])
        self._load_position(train_state)
        if self.guard is not None and train_state.get("guard"):
            self.guard.load_state_dict(train_state["guard"])
        self._load_rng(train_state["rng"])

    def _load_average(self, checkpoint: Mapping[str, Any]) -> None:
        if self.average is None:
            return
        if "state_dict_ema" in checkpoint:
            self.average.load_state_dict(strip_prefixes(checkpoint["state_dict_ema"]))
        else:
            self.average.restart()
            logger.info("The checkpoint has no averaged weights. The average of --ema-decay starts from its weights.")

    def _load_position(self, train_state: Mapping[str, Any]) -> None:
        self.epoch_step = int(train_state.get("epoch_step", 0))
        self.epoch_samples = int(train_state.get("epoch_samples", 0))
        self.progress = train_state.get("progress", {})
        if self.data is not None and train_state.get("data"):
            self.data.load_state_dict(train_state["data"])
        saved = int(train_state.get("samples_per_step", 0))
        if self.epoch_step and self.samples_per_step and saved != self.samples_per_step:
            # Keep the number of samples that are left in the epoch, not the number of steps.
            self.epoch_step = min(-(-self.epoch_samples // self.samples_per_step), self.steps_per_epoch)
            self.step = self.epoch * self.steps_per_epoch + self.epoch_step
            logger.info(
                "A step had %d samples when the checkpoint was saved and has %d now. The epoch continues after %d of "
                "%d steps.",
                saved, self.samples_per_step, self.epoch_step, self.steps_per_epoch,
            )  # fmt: skip

    def _load_optimizer(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.optimizer is not None
        if "optimizer" not in checkpoint:
            logger.warning("The checkpoint has no optimizer state. The moments start from zero.")
        else:
            try:
                self.optimizer.load_state_dict(_complete_groups(checkpoint["optimizer"], self.optimizer))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"The optimizer state of the checkpoint does not fit this run ({error}). Use the same --opt and "
                    "--lock-* options, or load only the weights with --pretrained."
                ) from error
        if self.scaler is not None:
            if "scaler" in checkpoint:
                # The scaler of torch_npu has one more entry than torch's.
                self.scaler.load_state_dict({**self.scaler.state_dict(), **checkpoint["scaler"]})
            else:
                logger.info("The checkpoint has no gradient scaler (another --precision). The run uses a new one.")

    def _load_rng(self, states: list[dict[str, Any]]) -> None:
        here = ranks.world()
        if len(states) == here.world_size:
            rng.set_rng_state(states[here.rank], self.device)
            return
        rng.random_seed(self.seed + self.step, here.rank)
        logger.info(
            "The checkpoint is from %d process(es) and this run has %d. Random generators are seeded by seed and step.",
            len(states),
            here.world_size,
        )


def _gather_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    file = io.BytesIO()  # bytes, because torch_npu warns about pickled tensors
    torch.save(state, file)
    files = ranks.all_gather_object(file.getvalue())
    return [torch.load(io.BytesIO(content), weights_only=True) for content in files]


def _complete_groups(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill options that the saved optimizer state lacks with the values of this run.

    Values that were not plain numbers, such as a NumPy learning rate, are dropped when a checkpoint is read.
    """
    groups = []
    for number, group in enumerate(saved["param_groups"]):
        ours = optimizer.param_groups[min(number, len(optimizer.param_groups) - 1)]
        absent = {key: value for key, value in ours.items() if key not in group and key != "params"}
        if absent:
            logger.info(
                "The optimizer state of the checkpoint has no %s. The values of this run are used.", join_some(absent)
            )
        groups.append({**group, **absent})
    return {**saved, "param_groups": groups}


def _is_training_checkpoint(checkpoint: Mapping[str, Any]) -> bool:
    return "epoch" in checkpoint and isinstance(checkpoint.get("state_dict"), Mapping)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into the model. If they do not fit, the model is not changed.

    Raises:
        ValueError: see `check_fit`.
    """
    model.load_state_dict(check_fit(model, weights))


def check_fit(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the prefixes of wrappers, after checking that they fit the model.

    Raises:
        ValueError: there are no weights, or one of them is missing, unexpected, or has another shape.
    """
    if not any(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError("--resume: the checkpoint has no model weights. They are expected under 'state_dict'.")
    named, own = strip_prefixes(weights), model.state_dict()
    if not own.keys() <= named.keys():
        named = strip_to_fit(named, own, lambda stripped: stripped, "The checkpoint") or named
    named = drop_extras(named, own)
    if mismatch := compare(own, named):
        raise ValueError(
            f"The checkpoint is of another model than this run. {mismatch} Use the --model and --force-* options that "
            "it was trained with. To start a new run from its weights, use --pretrained instead of --resume."
        )
    return named


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint into host memory.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or not a checkpoint.
    """
    if not file_utils.check_exists(path):
        raise FileNotFoundError(
            f"--resume {str(path)!r}: there is no such file. Use --resume latest to find the newest one of a run."
        )
    try:
        with progress.watch(f"Loading {path}"):
            checkpoint = file_utils.pt_load(path)
    except ValueError as error:
        raise ValueError(f"--resume: {error} For weights in other formats use --pretrained.") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"--resume {str(path)!r} holds a {type(checkpoint).__name__}, not a checkpoint.")
    return dict(checkpoint)


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
