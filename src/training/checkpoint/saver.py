"""When a run is saved: a thread writes a checkpoint from a copy in host memory.

A save delays the training loop by the copy of the state to the host; on an accelerator, only by the start of this copy.
A thread waits for the copy and writes it. At most one save is in progress: the next one waits for it, and so does the
end of the run. A crash loses only the save in progress.

`checkpoint.writers` has the two forms of a checkpoint: a file, which the master writes, and a folder, to which all
ranks write.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training import ranks
from training.checkpoint.latest import find_numbered
from training.checkpoint.state import TrainState
from training.checkpoint.writers import create_writer, remove
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

    def finish_shared(self) -> None:
        """Wait for the save in progress if other ranks take part in it. Call it before the ranks part."""

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
    """Writes the checkpoints of a run to a folder, as the options say. Every rank calls its methods.

    The save after the last epoch must succeed, whatever --on-save-failure says.
    """

    def __init__(self, cfg: CheckpointConfig, folder: Path, state: TrainState, epochs: int) -> None:
        """Create it. `epochs`: of the whole run."""
        self.cfg = cfg
        self.folder = folder
        self.state = state
        self.epochs = epochs
        self._waited = 0.0  # seconds, since the last `take_waited`
        self._writer = create_writer(state, is_folder=cfg.fsdp_checkpoint == "sharded")
        self._thread: threading.Thread | None = None
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
        state, cfg, writer = self.state, self.cfg, self._writer
        every = cfg.save_every_n_steps
        is_due = state.epoch == self.epochs or (cfg.save_frequency > 0 and state.epoch % cfg.save_frequency == 0)
        files = [self.folder / f"epoch_{state.epoch}{writer.suffix}"] if is_due else []
        # The state of several ranks cannot be saved during an evaluation, so it is always saved now.
        if not is_due and ((every and state.step % every == 0) or writer.is_collective):
            files = [self._step_file()]
        if cfg.save_most_recent:
            files.append(self.folder / f"epoch_latest{writer.suffix}")
        with self._timed():
            checkpoint = state.state_dict()
        if files:
            self._save(files, checkpoint)
        if not writer.is_collective:
            self._at_epoch_end = checkpoint

    def after_evaluation(self) -> None:
        self._at_epoch_end = None

    def stop(self, is_collective: bool) -> None:
        """Save the current step, unless it is saved already, and wait until it is on disk.

        Args:
            is_collective: whether all ranks call this. During an evaluation they may not: then nothing is gathered.

        Raises:
            OSError, RuntimeError: saving failed.
        """
        self._wait()
        is_due = self._saved_at != self.state.step or self._error is not None
        if is_collective:
            is_due = ranks.broadcast_object(is_due)  # another rank does not know the errors of the master
            if is_due:
                self._save([self._step_file()])
        elif is_due and self._at_epoch_end is not None:
            self._save([self._step_file()], self._at_epoch_end)
        self.finish()

    def finish(self) -> None:
        """Wait for the save in progress.

        Raises:
            OSError, RuntimeError: the last save failed.
        """
        self._wait()
        if self._error is not None:
            raise self._error

    def finish_shared(self) -> None:
        if self._writer.is_shared:
            self._wait()

    def close(self) -> None:
        self._wait()

    def _step_file(self) -> Path:
        return self.folder / f"epoch_{self.state.epoch}_step_{self.state.step}{self._writer.suffix}"

    def _save(self, files: list[Path], checkpoint: dict[str, Any] | None = None) -> None:
        self._saved_at = self.state.step
        with self._timed():
            if checkpoint is None:
                checkpoint = self.state.state_dict()  # collective
            self._wait()
            self._raise_if_failed()
            content, ready = self._writer.copy(checkpoint, is_written_now=self.cfg.sync_save)
            if content is None:
                return  # this rank does not write
            if self.cfg.sync_save:
                self._write(content, ready, files)
                self._raise_if_failed()
                return
            self._thread = threading.Thread(target=self._write, args=(content, ready, files), name="saver", daemon=True)
            self._thread.start()

    def _write(self, content: Any, ready: Callable[[], None], files: list[Path]) -> None:
        start = time.perf_counter()
        try:
            for file in self._writer.write(content, ready, files):
                if ranks.world().is_master:
                    logger.info("Saved %s in %.1f s.", file, time.perf_counter() - start)
                    self._remove_older(file)
            self._error = None
        except Exception as error:  # raised in the training loop
            self._error = error
            logger.error("Saving %s failed: %s. Earlier checkpoints are unchanged.", files[0], error)

    def _remove_older(self, file: Path) -> None:
        """Remove what --keep-last and --delete-previous-checkpoint do not keep, after `file` has been written.

        The folder to which epoch_latest points is kept.
        """
        numbered = find_numbered(self.folder)
        if file not in numbered:
            return
        here = numbered[file]
        latest = self.folder / "epoch_latest"  # of folders, a link
        linked = latest.resolve() if latest.is_symlink() else None
        if self.cfg.delete_previous_checkpoint and here[1] == 0:
            earlier = [path for path, at in numbered.items() if at[1] == 0 and at < here]
            previous = max(earlier, key=numbered.__getitem__, default=None)
            if previous is not None and previous.resolve() != linked:
                remove(previous)
        steps = sorted((path for path, at in numbered.items() if at[1]), key=numbered.__getitem__)
        # Later ones are from before the run was resumed from an earlier checkpoint.
        before = [path for path in steps if numbered[path] <= here]
        for older in before[: -self.cfg.keep_last]:
            if older.resolve() != linked:
                remove(older)
        for later in steps[len(before) :]:
            if later.resolve() == linked:
                latest.unlink()
            remove(later)

    def _raise_if_failed(self) -> None:
        if self._error is not None and self.cfg.on_save_failure == "stop":
            raise self._error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start
