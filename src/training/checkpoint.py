"""What a run is made of, and its checkpoints: one state, saved whole and restored whole.

A checkpoint is open_clip's: {"epoch", "name", "state_dict", "optimizer"[, "scaler"]}, with one key of our own,
"train_state", for what open_clip does not keep: the step, the samples seen, and the state of every random generator of
every rank. So each side's checkpoints resume on the other. Tensors and plain values only, which
`torch.load(weights_only=True)` reads.
"""

from __future__ import annotations

import io
import logging
import pickle
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_clip.checkpoint import refusal, strip_prefixes
from training import distributed, file_utils, rng
from training.params import CheckpointConfig

logger = logging.getLogger(__name__)

@dataclass
class TrainState:
    """Everything that a resumed run needs; what changes over time is here, or does not exist.

    model: the bare module (not DDP's or the compiler's wrapper).
    optimizer, scaler: None in a run that only evaluates, or without gradient scaling.
    epoch: epochs completed. step: updates of the weights. samples_seen: over all ranks.
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
    epoch: int = 0
    step: int = 0
    samples_seen: int = 0

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint, referring to the live tensors. Collective: the ranks' random states are gathered."""
        here = distributed.world()
        weights = self.model.state_dict()
        if here.distributed:  # as open_clip writes them from DDP; its own distributed resume wants them so
            weights = {f"module.{name}": value for name, value in weights.items()}
        checkpoint: dict[str, Any] = {"epoch": self.epoch, "name": self.name, "state_dict": weights}
        if self.optimizer is not None:
            checkpoint["optimizer"] = self.optimizer.state_dict()
        if self.scaler is not None:
            checkpoint["scaler"] = self.scaler.state_dict()
        checkpoint["train_state"] = {
            "version": 1,
            "step": self.step,
            "samples_seen": self.samples_seen,
            "rng": _of_all_ranks(rng.rng_state(self.device)),
        }
        return checkpoint

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restores a checkpoint of ours or of open_clip's; a plain dict of weights sets the weights alone.

        Raises:
            ValueError: for a checkpoint of another model or another optimizer.
        """
        if not _is_training_checkpoint(checkpoint):
            load_weights(self.model, checkpoint.get("state_dict", checkpoint))
            logger.info("The checkpoint has weights only: the run starts with them at epoch 0.")
            return
        load_weights(self.model, checkpoint["state_dict"])
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
        self._load_rng(train_state["rng"])

    def _load_optimizer(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.optimizer is not None
        if "optimizer" not in checkpoint:
            logger.warning("The checkpoint has no optimizer state: its moments start from zero.")
        else:
            try:
                self.optimizer.load_state_dict(checkpoint["optimizer"])
            except (ValueError, KeyError) as error:
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


def _is_training_checkpoint(checkpoint: Mapping[str, Any]) -> bool:
    return "epoch" in checkpoint and isinstance(checkpoint.get("state_dict"), Mapping)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into the model, every one or none.

    Raises:
        ValueError: naming what is missing, too much, or of another shape.
    """
    named, own = strip_prefixes(dict(weights)), model.state_dict()
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
            + "; it ".join(f"{what} {_some(names)}" for what, names in found if names)
            + ". Give the --model (and --force-*) options that it was trained with, or, to start a new run from it, "
            "--pretrained instead of --resume."
        )
    model.load_state_dict(named)


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint into the host's memory.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a file that is no checkpoint, or holds code.
    """
    if not file_utils.check_exists(path):
        raise FileNotFoundError(
            f"--resume {str(path)!r}: there is no such file. (--resume latest finds the newest one of a run.)"
        )
    try:
        checkpoint = file_utils.pt_load(path, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(f"--resume: {refusal(path, str(error))}") from None
    except (RuntimeError, OSError, EOFError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"--resume {str(path)!r} cannot be read as a checkpoint (torch.save of tensors and plain containers): "
            f"{reason[0] if reason else type(error).__name__}. It is damaged or of another format. To start from "
            "weights in other formats use --pretrained."
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"--resume {str(path)!r} holds a {type(checkpoint).__name__}, not a checkpoint.")
    return dict(checkpoint)


def natural_key(string_: str) -> list[Any]:
    """A sort key by which epoch_10 comes after epoch_9."""
    parts = filter(None, re.split(r"(\d+)", string_.lower()))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def get_latest_checkpoint(path: str | Path, remote: bool = False) -> str | None:
    """The newest checkpoint (*.pt) in a folder, or at a URL with `remote`; None where there is none.

    Newest by the epoch in the name. epoch_latest.pt counts by the epoch that is in it, so that one left behind by an
    earlier run without --save-most-recent is not taken for new; the remote copy of a run never has it.
    """
    if remote:
        names = [name for name in _list_remote(str(path)) if re.fullmatch(r"epoch_\d+\.pt", name)]
        return f"{str(path).rstrip('/')}/{max(names, key=natural_key)}" if names else None
    folder = Path(path)
    numbered = sorted(folder.glob("epoch_[0-9]*.pt"), key=lambda file: natural_key(file.name))
    candidates = [*numbered[-1:], *folder.glob("epoch_latest.pt")]
    if not candidates:
        others = sorted(folder.glob("[!.]*.pt"), key=lambda file: natural_key(file.name))
        candidates = others[-1:]
    if len(candidates) == 2:
        candidates.sort(key=_epoch_of)
    return str(candidates[-1]) if candidates else None


def _epoch_of(path: Path) -> int:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mapped: the weights are not read
    return int(checkpoint.get("epoch", 0))


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


def save_epoch(state: TrainState, cfg: CheckpointConfig, folder: Path, epochs: int) -> None:
    """Writes what the options ask for after an epoch. Collective; the master writes, and the others do not wait."""
    last = state.epoch == epochs
    due = last or (cfg.save_frequency > 0 and state.epoch % cfg.save_frequency == 0)
    if not (due or cfg.save_most_recent):
        return
    checkpoint = state.state_dict()
    if not distributed.world().is_master:
        return
    if due:
        path = folder / f"epoch_{state.epoch}.pt"
        file_utils.pt_save(checkpoint, path)
        logger.info("Saved %s", path)
        if cfg.delete_previous_checkpoint:
            _delete_previous(folder, state.epoch)
    if cfg.save_most_recent:
        file_utils.pt_save(checkpoint, folder / "epoch_latest.pt")


def _delete_previous(folder: Path, epoch: int) -> None:
    """Removes the newest checkpoint before `epoch`, now that the new one is on disk."""
    numbers = [int(match[1]) for file in folder.iterdir() if (match := re.fullmatch(r"epoch_(\d+)\.pt", file.name))]
    earlier = [number for number in numbers if number < epoch]
    if earlier:
        (folder / f"epoch_{max(earlier)}.pt").unlink()
