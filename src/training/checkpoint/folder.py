"""Sharded checkpoints: a folder in the format of torch.distributed.checkpoint (DCP), to which each rank adds its parts.

    epoch_3/
        __0_0.distcp, __1_0.distcp, ...   the tensors of each rank: weights, averaged weights, optimizer state
        .metadata                         where each part of each tensor is (DCP reads this file)
        training.pt                       everything else that a resumed run needs; written before .metadata
        manifest.json                     epoch, step, and the size and checksum of each file; written last

`torch.distributed.checkpoint.load` and its `dcp_to_torch_save` read the tensors. Their names are model.NAME,
average.NAME and optimizer.state.NAME.KEY, as in open_clip's sharded checkpoints.

The folder is written under a temporary name and renamed when all its files are on disk, so it is complete or does not
exist. The ranks exchange only the positions of their parts and their errors, in a process group of their own, so that a
thread can write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import uuid
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_clip.formats.sharded_folder import METADATA, ShardedFolder
from open_clip.formats.whole_file import sync_folder
from training import ranks
from training.checkpoint.file_format import DDP_PREFIX
from training.checkpoint.stored_tensor import is_written_here
from training.sharding.tensors import is_sharded, part_and_offsets

MANIFEST = "manifest.json"
TRAINING = "training.pt"
_VERSION = 1
_PIECE = 16 << 20  # bytes


@dataclass(frozen=True)
class Part:
    """A part of a tensor that this rank writes.

    Attributes:
        path: the keys of the tensor: ("model", "visual.proj"). Its name is "model.visual.proj".
        shape: of the whole tensor.
        offsets: of the part.
        values: the part.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor

    def with_values(self, values: Tensor) -> Part:
        return dataclasses.replace(self, values=values)


@dataclass(frozen=True)
class _Entry:
    """A part in a file."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    nbytes: int


def split(content: Mapping[str, Any], parameter_names: list[str]) -> tuple[list[Part], dict[str, Any]]:
    """Split the content of a checkpoint file into the parts of tensors that this rank writes, and everything else.

    Args:
        content: see `file_format`.
        parameter_names: of the optimizer's parameters, by index.
    """
    rest = {key: value for key, value in content.items() if key not in ("state_dict", "state_dict_ema", "optimizer")}
    weights = {name.removeprefix(DDP_PREFIX): value for name, value in content["state_dict"].items()}
    tensors: dict[tuple[str, ...], Any] = {("model", name): value for name, value in weights.items()}
    for name, value in content.get("state_dict_ema", {}).items():
        if value is not weights.get(name):  # the average of a frozen parameter or a buffer is itself
            tensors["average", name] = value
    if "optimizer" in content:
        values: dict[str, dict[str, Any]] = {}
        for index, state in content["optimizer"]["state"].items():
            name = parameter_names[index]
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors["optimizer", "state", name, key] = value
                else:
                    values.setdefault(name, {})[key] = value
        groups = content["optimizer"]["param_groups"]
        rest["optimizer"] = {"param_groups": groups, "parameters": list(parameter_names), "values": values}
    rest["tensors"] = [".".join(path) for path in tensors]  # their order, which the ranks' files do not have
    return [part for path, value in tensors.items() for part in _own_part(path, value)], rest


def _own_part(path: tuple[str, ...], value: Any) -> Iterable[Part]:
    """Yield the part that this rank writes, if there is one. Each part is written by one rank."""
    if is_sharded(value) and value.numel():
        local, offsets = part_and_offsets(value)
        if local.numel() and is_written_here(value):
            yield Part(path, tuple(value.shape), offsets, local.detach())
        return
    here = ranks.world()
    if zlib.crc32(".".join(path).encode()) % here.world_size == here.rank:
        value, offsets = part_and_offsets(value)
        yield Part(path, tuple(value.shape), offsets, value.detach())


class Peers:
    """The ranks that write one folder, in a process group of their own. Its methods are collective."""

    def __init__(self) -> None:
        self.rank, self.size = ranks.world().rank, ranks.world().world_size
        self._group = ranks.create_host_group()

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks on rank 0; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        torch.distributed.gather_object(value, values or None, dst=0, group=self._group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self._group)
        return values[0]


def write(folder: Path, parts: Iterable[Part], rest: Mapping[str, Any], peers: Peers) -> None:
    """Write a folder. Collective: all ranks write, or the folder is not created. `rest` is that of rank 0.

    Raises:
        OSError: writing failed on one of the ranks.
    """
    temporary, error = peers.broadcast(_attempt(_create_temporary, folder) if peers.rank == 0 else None)
    if error is not None:
        raise OSError(error)
    results = peers.gather(_attempt(_write_parts, temporary, peers.rank, parts))
    error = None
    if peers.rank == 0:
        errors = [f"{error} (rank {rank})" for rank, (_, error) in enumerate(results) if error is not None]
        error = errors[0] if errors else None
        if error is None:
            entries = [entry for (found, _), _ in results for entry in found]
            checksums = {name: crc32 for (_, found), _ in results for name, crc32 in found.items()}
            _, error = _attempt(_commit, temporary, folder, entries, checksums, rest)
        if error is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    error = peers.broadcast(error)
    if error is not None:
        raise OSError(error)


def _attempt(function: Any, *arguments: Any) -> tuple[Any, str | None]:
    """Return (result, None) or (None, what failed), so that the ranks can agree on a failure."""
    try:
        return function(*arguments), None
    except Exception as error:
        return None, str(error) or type(error).__name__


def _create_temporary(folder: Path) -> Path:
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    return temporary


def _write_parts(folder: Path, rank: int, parts: Iterable[Part]) -> tuple[list[_Entry], dict[str, int]]:
    """Write the file of this rank. Return its entries, and its name with its checksum."""
    entries: list[_Entry] = []
    file_name = f"__{rank}_0.distcp"
    with _create(folder / file_name, rank) as file:
        for part in parts:
            values, start = part.values.cpu(), file.nbytes
            if values.untyped_storage().nbytes() != values.numel() * values.element_size():
                values = values.clone()  # torch.save writes the whole storage
            torch.save(values, file)
            sizes, nbytes = tuple(values.shape), file.nbytes - start
            entries.append(_Entry(part.path, part.shape, values.dtype, part.offsets, sizes, file_name, start, nbytes))
    return entries, {file_name: file.crc32}


def _create(path: Path, rank: int) -> _Checksummed:
    try:
        return _Checksummed(path)
    except FileNotFoundError as error:  # rank 0 has created the folder
        raise OSError(
            f"{path.parent} is not visible to rank {rank}. All hosts must share the folder {path.parent.parent}"
        ) from error


class _Checksummed:
    """A new file that is written sequentially and then synced.

    Attributes:
        nbytes, crc32: size and checksum of what has been written.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self.nbytes = self.crc32 = 0

    def __enter__(self) -> Any:  # torch.save accepts it, but its annotations want an IO
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        self.nbytes += self._file.write(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _commit(
    temporary: Path, folder: Path, entries: list[_Entry], checksums: dict[str, int], rest: Mapping[str, Any]
) -> None:
    """Complete the folder and give it its name.

    METADATA comes after TRAINING: a folder of open_clip has only METADATA, and would be resumed as such.
    """
    with _Checksummed(temporary / TRAINING) as file:
        torch.save(dict(rest), file)
    checksums[TRAINING] = file.crc32
    with _Checksummed(temporary / METADATA) as file:
        pickle.dump(_metadata(entries), file)
    checksums[METADATA] = file.crc32
    manifest = {
        "format": "sharded checkpoint of open_clip",
        "version": _VERSION,
        "epoch": rest.get("epoch", 0),
        "step": rest.get("train_state", {}).get("step", 0),
        "bytes": {name: (temporary / name).stat().st_size for name in checksums},
        "crc32": checksums,
    }
    with _Checksummed(temporary / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode())
    sync_folder(temporary)
    _rename(temporary, folder)


def _metadata(entries: list[_Entry]) -> Any:
    """Return the content of `.metadata`."""
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensors: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    paths: dict[str, tuple] = {}
    for entry in entries:
        name = ".".join(entry.path)
        paths[name] = entry.path
        if name not in tensors:
            properties = dcp.TensorProperties(dtype=entry.dtype)
            tensors[name] = dcp.TensorStorageMetadata(properties, torch.Size(entry.shape), [])
        offsets, sizes = torch.Size(entry.offsets), torch.Size(entry.sizes)
        tensors[name].chunks.append(dcp.ChunkStorageMetadata(offsets, sizes))
        storage[dcp.MetadataIndex(name, offsets)] = _StorageInfo(entry.file, entry.start, entry.nbytes)
    return dcp.Metadata(tensors, planner_data=paths, storage_data=storage, storage_meta=dcp.StorageMeta())


def _rename(temporary: Path, folder: Path) -> None:
    """Rename the complete folder. An older one of that name is removed."""
    if folder.exists():
        remove(folder)
    temporary.rename(folder)
    sync_folder(folder.parent)


def remove(folder: Path) -> None:
    """Remove a folder. Half of it never has its name."""
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.removed.tmp")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(folder: Path) -> list[tuple[Path, Path | None]]:
    """Remove the temporary folders of interrupted saves. One that is complete gets its name instead.

    Returns:
        Each temporary folder, and its name or None.
    """
    found: list[tuple[Path, Path | None]] = []
    for temporary in sorted(folder.glob(".epoch_*.tmp")):
        if temporary.is_symlink():  # to be epoch_latest
            temporary.unlink()
            found.append((temporary, None))
            continue
        if not temporary.is_dir():
            continue
        target = folder / temporary.name[1:].partition(".")[0]
        if not target.exists() and _is_complete(temporary):
            _rename(temporary, target)
            found.append((temporary, target))
        else:
            shutil.rmtree(temporary, ignore_errors=True)
            found.append((temporary, None))
    return found


def _is_complete(temporary: Path) -> bool:
    """Return whether a temporary folder has everything but its name. The manifest is written last."""
    is_removed = temporary.name.endswith(".removed.tmp")
    return not is_removed and (temporary / MANIFEST).exists() and find_damage(temporary) is None


def is_sharded_checkpoint(path: Path) -> bool:
    """Return whether a folder looks like a sharded checkpoint, also one of open_clip or a damaged one."""
    return path.is_dir() and any((path / name).exists() for name in (MANIFEST, METADATA, TRAINING))


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest; an empty dict if there is none.

    Raises:
        ValueError: it is damaged.
    """
    with contextlib.suppress(FileNotFoundError):
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and isinstance(manifest.get("bytes"), dict):
            return manifest
        raise ValueError(f"{path / MANIFEST} is damaged: it has no sizes.")
    return {}


def find_damage(path: Path) -> str | None:
    """Read a whole folder and verify its checksums. Return what is wrong with it, or None."""
    try:
        manifest = read_manifest(path)
        for name, size in manifest.get("bytes", {}).items():
            file = path / Path(name).name
            if file.stat().st_size != size:
                return f"{name} does not have {size} bytes"
            if _crc32(file) != manifest.get("crc32", {}).get(name):
                return f"the checksum of {name} is wrong"
        folder = ShardedFolder(str(path))
        if not manifest:  # from open_clip
            if (path / TRAINING).exists():
                return f"it has no {MANIFEST}"
            folder.verify_checksums()
    except (ValueError, OSError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def _crc32(path: Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while data := file.read(_PIECE):
            crc32 = zlib.crc32(data, crc32)
    return crc32
