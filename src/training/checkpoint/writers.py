"""The two forms of a checkpoint: a file, which the master writes, and a folder, to which all ranks write."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from training import file_utils, ranks
from training.checkpoint import folder
from training.checkpoint.host_copy import HostCopy
from training.checkpoint.state import TrainState


class FileWriter:
    """Writes epoch_N.pt. Only the master writes; sharded tensors are gathered in its host memory.

    Attributes:
        suffix: of the names.
        is_shared: whether all ranks write.
        is_collective: whether all ranks must take part in `copy`.
    """

    suffix = ".pt"
    is_shared = False

    def __init__(self, state: TrainState) -> None:
        self.is_collective = state.is_sharded
        self._is_master = ranks.world().is_master
        self._copy = HostCopy(state.device, keeps=self._is_master)

    def copy(self, checkpoint: dict[str, Any], is_written_now: bool) -> tuple[Any, Callable[[], None]]:
        """Copy a checkpoint. Does not wait for the device.

        Args:
            is_written_now: whether `write` is called before the state changes. Then a copy is made only if tensors must
                be gathered.

        Returns:
            The copy for `write`, None if this rank does not write; and a function that waits until it is complete.
        """
        if self.is_collective or (self._is_master and not is_written_now):
            copied, ready = self._copy.take(checkpoint)
            return copied if self._is_master else None, ready
        return checkpoint if self._is_master else None, lambda: None

    def write(self, content: Any, ready: Callable[[], None], paths: Sequence[Path]) -> Iterator[Path]:
        """Write a copy to each path, and yield the path. See `copy` for `content` and `ready`."""
        ready()
        for path in paths:
            file_utils.pt_save(content, path)
            yield path


class FolderWriter(FileWriter):
    """Writes the folder epoch_N, see `checkpoint.folder`. No rank has the tensors of the others."""

    suffix = ""
    is_shared = True

    def __init__(self, state: TrainState) -> None:
        super().__init__(state)
        self._copy = HostCopy(state.device)
        self._state = state
        self._peers = folder.Peers()

    def copy(self, checkpoint: dict[str, Any], is_written_now: bool) -> tuple[Any, Callable[[], None]]:
        parts, rest = folder.split(checkpoint, self._state.optimizer_parameter_names())
        if is_written_now:
            return (parts, rest), lambda: None
        (values, rest), ready = self._copy.take(([part.values for part in parts], rest))
        return ([part.with_values(v) for part, v in zip(parts, values, strict=True)], rest), ready

    def write(self, content: Any, ready: Callable[[], None], paths: Sequence[Path]) -> Iterator[Path]:
        parts, rest = content
        folder.write(paths[0], _wait_for(ready, parts), rest, self._peers)
        for link in paths[1:]:  # epoch_latest, the same state: a link, which can be replaced atomically
            if self._is_master:
                replace_link(link, paths[0].name)
        # Only now may `paths[0]` cause the removal of the folder to which the link pointed.
        yield from paths


def _wait_for(ready: Callable[[], None], parts: Iterable[folder.Part]) -> Iterator[folder.Part]:
    """Yield the parts of a complete copy. An error of the copy is raised where the ranks agree on errors."""
    ready()
    yield from parts


def replace_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, atomically."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def create_writer(state: TrainState, is_folder: bool) -> FileWriter:
    """Create the writer. A run without sharded weights writes files. Collective."""
    return FolderWriter(state) if is_folder and state.is_sharded else FileWriter(state)


def remove(path: Path) -> None:
    """Remove a checkpoint of either form."""
    if path.is_dir():
        folder.remove(path)
    else:
        path.unlink()
