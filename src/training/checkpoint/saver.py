"""When a run is saved, and how: a thread writes the file from a copy in host memory.

A save delays the training loop by the copy of the state to the host; on an accelerator, only by the start of this copy.
A thread waits for the copy and writes it. At most one save is in progress: the next one waits for it, and so does the
end of the run. A crash loses only the save in progress.
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
from training.checkpoint.latest import NUMBERED
from training.checkpoint.state import TrainState
from training.params import CheckpointConfig

logger = logging.getLogger(__name__)


class NullSaver:
    """A saver that writes nothing, for runs without a folder. It has the interface of Saver.

    Its context ends with the run.
    """

    def take_waited(self) -> float:
        """Return how many seconds the loop has waited for saving since the last call."""
        return 0.0

    def after_step(self) -> None:
        """Save what is due after a step."""

    def after_epoch(self) -> None:
        """Save what is due after an epoch. Call it before the evaluation."""

    def after_evaluation(self) -> None:
        """Call this before the weights change again."""

    def stop(self, is_collective: bool) -> None:
        """Save the current step, unless it is saved already, and wait until it is on disk."""

    def finish(self) -> None:
        """Wait for the save in progress, at the end of a successful run."""

    def close(self) -> None:
        """Wait for the save in progress, at the end of any run. An error of the save has been logged."""

    def __enter__(self) -> NullSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a second Ctrl-C do not wait for the writer; its temporary file is removed at the next start.
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.close()


class Saver(NullSaver):
    """Writes the checkpoints of a run to a folder, as the options say. Every rank calls its methods; the master writes.

    The save after the last epoch must succeed, whatever --on-save-failure says.
    """

    def __init__(self, cfg: CheckpointConfig, folder: Path, state: TrainState, epochs: int) -> None:
        """Create it. `epochs`: of the whole run."""
        self.cfg = cfg
        self.folder = folder
        self.state = state
        self.epochs = epochs
        self._waited = 0.0  # seconds, since the last `take_waited`
        self._copy = HostCopy(state.device)
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved_at: int | None = None  # step of the last save that was started
        self._at_epoch_end: dict[str, Any] | None = None  # the checkpoint, during the evaluation

    def take_waited(self) -> float:
        waited, self._waited = self._waited, 0.0
        return waited

    def after_step(self) -> None:
        """Save if --save-every-n-steps says so.

        Raises:
            OSError, RuntimeError: the last save failed, and --on-save-failure is "stop".
        """
        self._raise_if_failed()
        every = self.cfg.save_every_n_steps
        if every and self.state.step % every == 0:
            self._save([self._step_file()])

    def after_epoch(self) -> None:
        """Save what is due after an epoch, and keep the state for a `stop` during the evaluation.

        The evaluation may fail, and `stop` cannot ask other ranks for their states then.
        """
        state, cfg = self.state, self.cfg
        every = cfg.save_every_n_steps
        is_due = state.epoch == self.epochs or (cfg.save_frequency > 0 and state.epoch % cfg.save_frequency == 0)
        files = [self.folder / f"epoch_{state.epoch}.pt"] if is_due else []
        if not is_due and every and state.step % every == 0:
            files = [self._step_file()]
        if cfg.save_most_recent:
            files.append(self.folder / "epoch_latest.pt")
        with self._timed():
            self._at_epoch_end = state.state_dict()
        if files:
            self._save(files, self._at_epoch_end)

    def after_evaluation(self) -> None:
        self._at_epoch_end = None

    def stop(self, is_collective: bool) -> None:
        """Save the current step, unless it is saved already, and wait until it is on disk.

        Args:
            is_collective: whether all ranks call this. During an evaluation they may not: then nothing is gathered.

        Raises:
            OSError, RuntimeError: saving failed.
        """
        if self._saved_at != self.state.step or self._error is not None:
            if not is_collective and self._at_epoch_end is None:
                return
            self._save([self._step_file()], None if is_collective else self._at_epoch_end)
        self.finish()

    def finish(self) -> None:
        """Wait for the save in progress.

        Raises:
            OSError, RuntimeError: the last save failed.
        """
        self._wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
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
        except Exception as error:  # raised in the training loop
            self._error = error
            logger.error("Saving %s failed: %s. Earlier checkpoints are unchanged.", files[0], error)

    def _remove_older(self, file: Path) -> None:
        """Remove what --keep-last and --delete-previous-checkpoint do not keep, after `file` has been written."""
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
        # Later ones are from before the run was resumed from an earlier checkpoint.
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
            self._waited += time.perf_counter() - start


class HostCopy:
    """Copies nested containers with their tensors to host memory, which is reused for the next copy."""

    def __init__(self, device: torch.device) -> None:
        self._kind = devices.get(device)
        self._buffers: dict[tuple, Tensor] = {}

    def take(self, nested: Any) -> tuple[Any, Callable[[], None]]:
        """Copy the tensors in a container. Does not wait for the device.

        Returns:
            The copy, and a function that waits until its tensors are complete.
        """
        made: dict[tuple, Tensor] = {}

        def copy(value: Any, path: tuple) -> Any:
            if isinstance(value, dict):
                return {key: copy(item, (*path, key)) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(copy(item, (*path, i)) for i, item in enumerate(value))
            if not isinstance(value, Tensor):
                return value
            # A tensor with two names stays one tensor in the file.
            same = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if same not in made or value.numel() == 0:
                made[same] = self._fill(path, value.detach())
            return made[same]

        copied = copy(nested, ())
        return copied, self._kind.mark()

    def _fill(self, path: tuple, value: Tensor) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            # Pinned memory lets the copy from a device run in the background.
            pinned = self._kind.pin_memory and value.device.type == self._kind.type
            buffer = self._buffers[path] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        return buffer.copy_(value, non_blocking=True)
