"""When a run is saved, and how: from a copy on the host, written behind the back of the training loop.

A save costs the loop the copy of the state to the host; on an accelerator only its being queued. A thread waits for the
copy and writes it. At most one save is under way: the next one waits for it, and so does the end of the run. A crash in
between loses that save, and no other.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_clip import device as devices
from training import file_utils, ranks
from training.checkpoint.state import NUMBERED, TrainState
from training.params import CheckpointConfig

logger = logging.getLogger(__name__)


class HostCopy:
    """Copies of nested containers whose tensors are on the host, in memory that is kept for the next copy."""

    def __init__(self, device: torch.device) -> None:
        self._row = devices.get(device)
        self._buffers: dict[tuple, Tensor] = {}

    def take(self, nested: Any) -> tuple[Any, Callable[[], None]]:
        """(the copy, a function that returns when the tensors in it are there). Waits for no device."""
        made: dict[tuple, Tensor] = {}

        def copy(value: Any, path: tuple) -> Any:
            if isinstance(value, dict):
                return {key: copy(item, (*path, key)) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(copy(item, (*path, i)) for i, item in enumerate(value))
            if not isinstance(value, Tensor):
                return value
            # One tensor under two names is one in the file, too.
            same = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if same not in made or value.numel() == 0:
                made[same] = self._fill(path, value.detach())
            return made[same]

        copied = copy(nested, ())
        return copied, self._row.mark()

    def _fill(self, path: tuple, value: Tensor) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            # Pinned where that lets the copy run beside the host; small ones on the host come and go.
            pinned = self._row.pin_memory and value.device.type == self._row.type
            buffer = self._buffers[path] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        return buffer.copy_(value, non_blocking=True)


class Saver:
    """Writes a run's checkpoints into a folder as the options say. Every rank calls its methods; the master writes.

    After `epochs` epochs the run is over: that save must succeed, whatever --on-save-failure says.
    """

    def __init__(self, cfg: CheckpointConfig, folder: Path, state: TrainState, epochs: int) -> None:
        self.cfg = cfg
        self.folder = folder
        self.state = state
        self.epochs = epochs
        self.waited = 0.0  # seconds, since `take_waited`
        self._copy = HostCopy(state.device)
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved_at: int | None = None  # the step of the last save that was begun
        self._at_epoch_end: dict[str, Any] | None = None

    def take_waited(self) -> float:
        """How long the loop has waited for saving since the last call, in seconds."""
        waited, self.waited = self.waited, 0.0
        return waited

    def after_step(self) -> None:
        """Saves where --save-every-n-steps asks for it.

        Raises OSError or RuntimeError for a save that failed, unless the run is to go on without it.
        """
        self._raise_if_failed()
        every = self.cfg.save_every_n_steps
        if every and self.state.step % every == 0:
            self._save([self._step_file()])

    def after_epoch(self) -> None:
        """Saves what is due after an epoch, and remembers what `stop` needs of the others during the evaluation."""
        state, cfg = self.state, self.cfg
        every = cfg.save_every_n_steps
        due = state.epoch == self.epochs or (cfg.save_frequency > 0 and state.epoch % cfg.save_frequency == 0)
        files = [self.folder / f"epoch_{state.epoch}.pt"] if due else []
        if not due and every and state.step % every == 0:
            files = [self._step_file()]
        if cfg.save_most_recent:
            files.append(self.folder / "epoch_latest.pt")
        with self._timed():
            self._at_epoch_end = state.state_dict()
        if files:
            self._save(files, self._at_epoch_end)

    def evaluated(self) -> None:
        """The evaluation after an epoch is over, and the weights will move again."""
        self._at_epoch_end = None

    def stop(self, together: bool) -> None:
        """Saves the present step, if it is not saved yet, and waits until it is on the disk.

        together: whether all ranks call this. In an evaluation they may not: then nothing is asked of the others.

        Raises OSError, RuntimeError: where that fails.
        """
        if self._saved_at != self.state.step or self._error is not None:
            if not together and self._at_epoch_end is None:
                return
            self._save([self._step_file()], None if together else self._at_epoch_end)
        self.finish()

    def finish(self) -> None:
        """Waits for what is being written. Raises OSError, RuntimeError: where the last save failed."""
        self._wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Waits for what is being written, at the end of a run that may have failed; its failure is only logged."""
        self._wait()

    def _step_file(self) -> Path:
        return self.folder / f"epoch_{self.state.epoch}_step_{self.state.step}.pt"

    def _save(self, files: list[Path], checkpoint: dict[str, Any] | None = None) -> None:
        self._saved_at = self.state.step
        with self._timed():
            if checkpoint is None:
                checkpoint = self.state.state_dict()  # collective
            if not ranks.world().is_master:
                return
            self._wait()
            self._raise_if_failed()
            if self.cfg.sync_save:
                self._write(checkpoint, lambda: None, files)
                self._raise_if_failed()
                return
            copied, ready = self._copy.take(checkpoint)
            self._writer = threading.Thread(target=self._write, args=(copied, ready, files), name="saver", daemon=True)
            self._writer.start()

    def _write(self, checkpoint: dict[str, Any], ready: Callable[[], None], files: list[Path]) -> None:
        start = time.perf_counter()
        try:
            ready()
            for file in files:
                file_utils.pt_save(checkpoint, file)
                logger.info("Saved %s in %.1f s.", file, time.perf_counter() - start)
                self._remove_older(file)
            self._error = None
        except Exception as error:  # for the loop, which looks for it
            self._error = error
            logger.error("Saving %s failed: %s. The checkpoints before it are as they were.", files[0], error)

    def _remove_older(self, file: Path) -> None:
        """What --keep-last and --delete-previous-checkpoint no longer want, now that `file` is on the disk."""
        found = [(NUMBERED.fullmatch(path.name), path) for path in self.folder.iterdir()]
        numbered = {path: (int(match[1]), int(match[2] or 0)) for match, path in found if match}
        if file not in numbered:
            return
        here = numbered[file]
        if self.cfg.delete_previous_checkpoint and here[1] == 0:
            earlier = [path for path, at in numbered.items() if at[1] == 0 and at < here]
            if earlier:
                max(earlier, key=numbered.__getitem__).unlink()
        steps = sorted((path for path, at in numbered.items() if at[1]), key=numbered.__getitem__)
        # Those ahead of this one are of a run that was given up, by going on from an earlier checkpoint.
        before = [path for path in steps if numbered[path] <= here]
        for older in [*before[: -self.cfg.keep_last], *steps[len(before) :]]:
            older.unlink()

    def _raise_if_failed(self) -> None:
        if self._error is not None and self.cfg.on_save_failure == "stop":
            raise self._error

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - start
