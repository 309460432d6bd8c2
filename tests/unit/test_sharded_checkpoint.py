"""Checkpoints of sharded states: both forms, on any number of ranks, and what a failed or interrupted save leaves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sharded_states
from gloo_ranks import run_ranks
from training import ranks
from training.checkpoint import folder as checkpoint_folder
from training.checkpoint.latest import get_latest_checkpoint
from training.checkpoint.saver import Saver
from training.checkpoint.state import TrainState
from training.checkpoint.weights import load_checkpoint
from training.params import CheckpointConfig

SIZES = (4, 2, 1)


def saved_by(form: str, size: int) -> str:
    return f"{form}-{size}/epoch_1" + (".pt" if form == "full" else "")


def save_and_load(rank: int, size: int) -> dict[str, Any]:
    """Save both forms, and load those that more ranks have saved."""
    from torch.distributed.device_mesh import init_device_mesh

    folder, mesh = Path(sys.argv[-1]), init_device_mesh("cpu", (size,))
    state = sharded_states.create(rank, mesh)
    result: dict[str, Any] = {"saved": sharded_states.whole(state)}
    state.epoch = 1
    for form in ("full", "sharded"):
        checkpoints = folder / f"{form}-{size}"
        checkpoints.mkdir(exist_ok=True)
        saver = Saver(CheckpointConfig(fsdp_checkpoint=form, save_most_recent=True), checkpoints, state, epochs=1)
        saver.after_epoch()
        saver.finish_shared()
        saver.finish()
        ranks.barrier()
        for larger in (n for n in SIZES if n >= size):
            other = sharded_states.create(rank, mesh, seed=9)
            other.load_state_dict(load_checkpoint(folder / saved_by(form, larger), is_lazy=True))
            result[f"{form}-{larger}"] = sharded_states.whole(other)
            result[f"{form}-{larger} data"] = other.rank_parts["data"].value
    if size == 2:
        result["failed save"] = save_with_a_full_disk(rank, folder / "full disk", state)
        result["failed copy"] = save_with_a_failed_copy(rank, folder / "failed copy", state)
        result["two names"] = save_tied_weights(rank, folder / "tied", mesh)
    result["losses"] = [sharded_states.make_step(state, step) for step in (2, 3)]
    result["losses of resumed"] = [sharded_states.make_step(other, step) for step in (2, 3)]
    return result


def save_with_a_full_disk(rank: int, folder: Path, state: Any) -> dict[str, Any]:
    """Save three times. The second time, the disk of rank 1 is full. Return what each save left."""
    folder.mkdir(exist_ok=True)
    cfg = CheckpointConfig(fsdp_checkpoint="sharded", save_every_n_steps=1, keep_last=1)
    saver, write_parts = Saver(cfg, folder, state, epochs=9), checkpoint_folder._write_parts
    found: dict[str, Any] = {}
    for number, is_full in enumerate((False, True, False)):

        def write(*arguments: Any, is_full: bool = is_full) -> Any:
            entries = write_parts(*arguments)
            if is_full and rank == 1:
                raise OSError(28, "No space left on device")
            return entries

        checkpoint_folder._write_parts = write
        state.step += 1
        saver.after_step()
        saver.finish_shared()
        ranks.barrier()
        found[f"folders {number}"] = sorted(path.name for path in folder.iterdir())
        found[f"error {number}"] = str(saver._error or "")
        ranks.barrier()
    checkpoint_folder._write_parts = write_parts
    state.step -= 3
    return found


def save_with_a_failed_copy(rank: int, folder: Path, state: Any) -> str:
    """Save while the copy fails on rank 1. Return the error."""
    folder.mkdir(exist_ok=True)
    cfg = CheckpointConfig(fsdp_checkpoint="sharded", save_every_n_steps=1)
    saver = Saver(cfg, folder, state, epochs=9)
    copy = saver._writer.copy

    def fail() -> None:
        raise RuntimeError("the device is lost")

    def failing(*arguments: Any, **options: Any) -> Any:
        content, ready = copy(*arguments, **options)
        return content, fail if rank == 1 else ready

    saver._writer.copy = failing
    saver.after_step()
    saver.finish_shared()
    return str(saver._error)


def save_tied_weights(rank: int, folder: Path, mesh: Any) -> list[Any]:
    """Save a parameter that has two names as a file. Return the weights in it, and the memory that they have."""
    from torch.distributed.fsdp import fully_shard

    folder.mkdir(exist_ok=True)
    model: Any = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(2)))
    model[1].weight = model[0].weight
    fully_shard(model, mesh=mesh)
    saver = Saver(CheckpointConfig(), folder, TrainState(model, sharded_states.CPU, epoch=1), epochs=1)
    saver.after_epoch()
    saver.finish()
    ranks.barrier()
    weights = torch.load(folder / "epoch_1.pt", weights_only=True)["state_dict"]
    return [list(weights), len({value.data_ptr() for value in weights.values()})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, list]:
    return run_ranks(__file__, "save_and_load", SIZES, folder)


def assert_same(ours: Any, theirs: Any, path: str = "") -> None:
    """Check that two nested containers are bit-identical."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), path
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{path} {key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), path
        for number, value in enumerate(theirs):
            assert_same(ours[number], value, f"{path} {number}")
    elif isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype, path
        assert torch.equal(ours, theirs), path
    else:
        assert ours == theirs, path


LARGE = ("state_dict", "state_dict_ema", "optimizer")


def large(content: dict[str, Any]) -> dict[str, Any]:
    """Return the weights, averages and optimizer state, with names that do not depend on the number of ranks."""
    weights = {name.removeprefix("module."): value for name, value in content["state_dict"].items()}
    return {**{key: content[key] for key in LARGE}, "state_dict": weights}


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_any_number_of_ranks_resumes_bit_identically(results, form):
    for size in SIZES:
        for rank, result in enumerate(results[size]):
            for larger in (n for n in SIZES if n >= size):
                saved = results[larger][rank]["saved"]
                assert_same(large(result[f"{form}-{larger}"]), large(saved), f"{form} {larger}->{size}")
                assert result[f"{form}-{larger} data"] == [10 + n for n in range(larger)]
            assert result["losses of resumed"] == result["losses"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_run_without_sharding_resumes_and_goes_on_equally(folder, results, form, size):
    unsharded = sharded_states.create(0, seed=9)
    unsharded.load_state_dict(load_checkpoint(folder / saved_by(form, size)))
    found = sharded_states.whole(unsharded)
    assert_same(large(found), large(results[size][0]["saved"]))
    assert (unsharded.epoch, unsharded.step) == (1, 2)
    losses = [sharded_states.make_step(unsharded, step) for step in (2, 3)]
    assert losses == pytest.approx(results[size][0]["losses"], rel=1e-6)


def test_latest_finds_the_folder(folder, results):
    assert get_latest_checkpoint(folder / "sharded-4") == str(folder / "sharded-4" / "epoch_1")
    assert (folder / "sharded-4" / "epoch_latest").resolve() == folder / "sharded-4" / "epoch_1"


def test_all_ranks_know_that_a_save_failed_on_one_of_them(results):
    for result in results[2]:
        found = result["failed save"]
        assert (found["error 0"], found["error 2"]) == ("", "")
        assert found["error 1"] == "[Errno 28] No space left on device (rank 1)"
        assert found["folders 0"] == found["folders 1"] == ["epoch_1_step_3"]
        assert found["folders 2"] == ["epoch_1_step_5"]


def test_all_ranks_know_that_a_copy_failed_on_one_of_them(results):
    assert [result["failed copy"] for result in results[2]] == ["the device is lost (rank 1)"] * 2


def test_a_tensor_with_two_names_is_stored_once(results):
    assert results[2][0]["two names"] == [["module.0.weight", "module.1.weight"], 1]
