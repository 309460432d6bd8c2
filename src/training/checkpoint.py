"""What a run is made of, and its checkpoints: one state, saved whole and restored whole.

A checkpoint is open_clip's: {"epoch", "name", "state_dict", "optimizer"[, "scaler"]}, with one key of our own,
"train_state", for what open_clip does not keep: the step, the position within the epoch and its data, and the state of
every random generator of every rank; and with --ema-decay a second one, "state_dict_ema". So each side's checkpoints
resume on the other. Tensors and plain values only, which `torch.load(weights_only=True)` reads. Other objects in a
checkpoint are dropped when it is read.
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
from open_clip.checkpoint import check_layout
from open_clip.key_prefixes import drop_extras, strip_prefixes, strip_to_fit
from open_clip.mismatch import join_some
from training import distributed, file_utils, rng

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Everything that a resumed run needs; what changes over time is here, or does not exist.

    model: the bare module (not DDP's or the compiler's wrapper).
    optimizer, scaler: None in a run that only evaluates, or without gradient scaling.
    epoch: epochs completed. step: batches that were to update the weights. samples_seen: over all ranks.
    epoch_step, epoch_samples: the part of them that is of the epoch under way.
    samples_per_step: of all ranks; 0 where that is not known.
    data: training.data.DataInfo, whose position is saved. progress: training.train.Progress, or its state.
    average: training.ema.WeightAverage. guard: training.guard.StepGuard. None: the run has none.
    The schedule is a function of the step, so it has no state of its own.
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
        """The checkpoint, referring to the live tensors. Collective: the ranks' states are gathered."""
        here = distributed.world()
        weights = self.model.state_dict()
        # As open_clip writes them from DDP; its own distributed resume wants them so.
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
        ranks = _of_all_ranks(own)
        checkpoint["train_state"] = {
            "version": 2,
            "step": self.step,
            "samples_seen": self.samples_seen,
            "epoch_step": self.epoch_step,
            "epoch_samples": self.epoch_samples,
            "samples_per_step": self.samples_per_step,
            "rng": [rank["rng"] for rank in ranks],
            "data": [rank["data"] for rank in ranks if "data" in rank],
            "progress": self.progress if isinstance(self.progress, dict) else self.progress.state_dict(),
            "guard": {} if self.guard is None else self.guard.state_dict(),
        }
        return checkpoint

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restores a checkpoint of ours or of open_clip's; a plain dict of weights sets the weights alone.

        Raises:
            ValueError: for a checkpoint of another model or another optimizer.
        """
        if not _is_training_checkpoint(checkpoint):
            load_weights(self.model, checkpoint.get("state_dict", checkpoint))
            self._load_average(checkpoint)
            logger.info("The checkpoint has weights only: the run starts with them at epoch 0.")
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
            logger.info("The checkpoint has no random states (it is open_clip's): they start from --seed.")
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
            logger.info("The checkpoint has no averaged weights: --ema-decay starts from its weights.")

    def _load_position(self, train_state: Mapping[str, Any]) -> None:
        """Where in the epoch, and in its data, the run goes on."""
        self.epoch_step = int(train_state.get("epoch_step", 0))
        self.epoch_samples = int(train_state.get("epoch_samples", 0))
        self.progress = train_state.get("progress", {})
        if self.data is not None and train_state.get("data"):
            self.data.load_state_dict(train_state["data"])
        saved = int(train_state.get("samples_per_step", 0))
        if self.epoch_step and self.samples_per_step and saved != self.samples_per_step:
            # As many steps are left as the samples that are left are good for.
            self.epoch_step = min(-(-self.epoch_samples // self.samples_per_step), self.steps_per_epoch)
            self.step = self.epoch * self.steps_per_epoch + self.epoch_step
            logger.info(
                "A step of the checkpoint had %d samples and has %d now: the epoch goes on after %d of %d steps.",
                saved, self.samples_per_step, self.epoch_step, self.steps_per_epoch,
            )  # fmt: skip

    def _load_optimizer(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.optimizer is not None
        if "optimizer" not in checkpoint:
            logger.warning("The checkpoint has no optimizer state: its moments start from zero.")
        else:
            try:
                self.optimizer.load_state_dict(_complete_groups(checkpoint["optimizer"], self.optimizer))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"The checkpoint's optimizer state does not fit this run's ({error}): give the same --opt "
                    "and the same --lock-* options, or start from the weights alone with --pretrained."
                ) from error
        if self.scaler is not None:
            if "scaler" in checkpoint:
                # torch_npu's has an entry more than torch's.
                self.scaler.load_state_dict({**self.scaler.state_dict(), **checkpoint["scaler"]})
            else:
                logger.info("The checkpoint has no gradient scaler (another --precision): a new one begins.")

    def _load_rng(self, states: list[dict[str, Any]]) -> None:
        here = distributed.world()
        if len(states) == here.world_size:
            rng.set_rng_state(states[here.rank], self.device)
            return
        rng.random_seed(self.seed + self.step, here.rank)
        logger.info(
            "The checkpoint is from %d process(es) and this run has %d: random generators start from seed and step.",
            len(states),
            here.world_size,
        )


def _of_all_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Tensors and plain values from each rank; as bytes, since torch_npu warns of tensors that are pickled."""
    file = io.BytesIO()
    torch.save(state, file)
    files = distributed.all_gather_object(None, file.getvalue())
    return [torch.load(io.BytesIO(content), weights_only=True) for content in files]


def _complete_groups(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer state with this run's values for options that the checkpoint lacks.

    It lacks what was not a plain number (a learning rate from NumPy): such objects are dropped when it is read.
    """
    groups = []
    for number, group in enumerate(saved["param_groups"]):
        ours = optimizer.param_groups[min(number, len(optimizer.param_groups) - 1)]
        absent = {key: value for key, value in ours.items() if key not in group and key != "params"}
        if absent:
            logger.info("The checkpoint's optimizer has no %s: this run's values are used.", join_some(absent))
        groups.append({**group, **absent})
    return {**saved, "param_groups": groups}


def _is_training_checkpoint(checkpoint: Mapping[str, Any]) -> bool:
    return "epoch" in checkpoint and isinstance(checkpoint.get("state_dict"), Mapping)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into the model, every one or none.

    Raises:
        ValueError: see `check_fit`.
    """
    model.load_state_dict(check_fit(model, weights))


def check_fit(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the prefixes of wrappers, if they are this model's.

    Raises:
        ValueError: there are no weights; or one is missing, unknown to the model, or has another shape.
    """
    if not any(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError("--resume: the checkpoint has no weights of a model, which it keeps under 'state_dict'.")
    named, own = strip_prefixes(weights), model.state_dict()
    if not own.keys() <= named.keys():
        named = strip_to_fit(named, own, lambda stripped: stripped, "The checkpoint") or named
    named = drop_extras(named, own)
    missing = [name for name in own if name not in named]
    unexpected = [name for name in named if name not in own]
    shapes = [
        f"{name} {list(value.shape)} instead of {list(own[name].shape)}"
        for name, value in named.items()
        if name in own and value.shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        found = [("lacks", missing), ("has, unknown to the model,", unexpected), ("has other shapes:", shapes)]
        raise ValueError(
            "The checkpoint is of another model than this run's: it "
            + "; it ".join(f"{what} {join_some(names, limit=3)}" for what, names in found if names)
            + ". Give the --model (and --force-*) options that it was trained with, or, to start a new run from it, "
            "--pretrained instead of --resume."
        )
    return named


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint into the host's memory.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a file that is damaged or not a checkpoint.
    """
    if not file_utils.check_exists(path):
        raise FileNotFoundError(
            f"--resume {str(path)!r}: there is no such file. (--resume latest finds the newest one of a run.)"
        )
    try:
        with progress.watch(f"Loading {path}"):
            checkpoint = file_utils.pt_load(path)
    except ValueError as error:
        raise ValueError(f"--resume: {error} To start from weights in other formats use --pretrained.") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"--resume {str(path)!r} holds a {type(checkpoint).__name__}, not a checkpoint.")
    return dict(checkpoint)


def natural_key(string_: str) -> list[Any]:
    """A sort key by which epoch_10 comes after epoch_9."""
    parts = filter(None, re.split(r"(\d+)", string_.lower()))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


# A checkpoint after N epochs, and one within an epoch: so many epochs completed, so many steps in all. They sort as the
# run went, for open_clip, too, which takes the last of all names.
NUMBERED = re.compile(r"epoch_(\d+)(?:_step_(\d+))?\.pt")


def get_latest_checkpoint(path: str | Path, remote: bool = False) -> str | None:
    """The newest checkpoint (*.pt) in a folder that loads, or the newest at a URL with `remote`; None where none is.

    Newest by the epoch and the step in the name. epoch_latest.pt counts by the epoch that is in it, so that one left
    behind by an earlier run without --save-most-recent is not taken for new; the remote copy of a run never has it.

    Raises:
        ValueError: where there are checkpoints, and none of them loads.
    """
    if remote:
        names = [name for name in _list_remote(str(path)) if NUMBERED.fullmatch(name)]
        return f"{str(path).rstrip('/')}/{max(names, key=natural_key)}" if names else None
    damaged = []
    for file in _newest_first(Path(path)):
        with progress.watch(f"Checking {file}"):
            reason = _damage(file)
        if reason is None:
            return str(file)
        logger.warning("%s is damaged and passed over: %s", file, reason)
        damaged.append(file.name)
    if damaged:
        raise ValueError(
            f"None of the checkpoints in {path} can be read ({', '.join(damaged)}; the log says why): restore one of "
            "them from a copy, or remove them to start from the beginning."
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
    """(epochs completed, step) of a numbered checkpoint, from its name; of epoch_latest.pt from what it says."""
    match = NUMBERED.fullmatch(file.name)
    if match:
        return int(match[1]), int(match[2] or 0)
    try:
        epoch = check_layout(file).get("epoch", 0)
    except (ValueError, OSError):
        return -1, 0
    return int(epoch) if isinstance(epoch, (int, float)) else 0, 0


def _damage(file: Path) -> str | None:
    """What is wrong with a file as a checkpoint; None if nothing is. Reads it whole and compares its checksums."""
    try:
        check_layout(file)
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (ValueError, RuntimeError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None if broken is None else f"{broken} in it has another checksum than when it was written"


def _list_remote(url: str) -> list[str]:
    """Names of the files at a URL, none where there is no such folder; s3 by the command `aws` where it is there."""
    if url.startswith("s3://") and shutil.which("aws"):
        ls = ["aws", "s3", "ls", url.rstrip("/") + "/"]
        done = subprocess.run(ls, capture_output=True, text=True, errors="replace")
        # It fails, too, on a folder that does not exist yet, as that of a new run.
        return [line.split()[-1] for line in done.stdout.splitlines() if line.strip()]
    import fsspec.core

    filesystem, root = fsspec.core.url_to_fs(url)
    try:
        return [name.rsplit("/", 1)[-1] for name in filesystem.ls(root, detail=False)]
    except FileNotFoundError:
        return []
