"""Saving: what is due, from a copy and behind the loop's back, and what a failing or damaged save leaves."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from training import file_utils
from training.checkpoint.host_copy import HostCopy
from training.checkpoint.latest import get_latest_checkpoint, natural_key
from training.checkpoint.saver import NullSaver, Saver
from training.checkpoint.state import TrainState
from training.params import CheckpointConfig

CPU = torch.device("cpu")


def state_of(**values) -> TrainState:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    return TrainState(model=model, device=CPU, parts={"optimizer": torch.optim.AdamW(model.parameters())}, **values)


def saver_of(folder: Path, state: TrainState, epochs: int = 9, **options) -> Saver:
    return Saver(CheckpointConfig(**options), folder, state, epochs)


def names(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.iterdir()), key=natural_key)


def run(saver: Saver, epochs: int, steps_per_epoch: int = 4) -> None:
    state = saver.state
    for epoch in range(1, epochs + 1):
        for _ in range(steps_per_epoch - 1):
            state.step += 1
            state.epoch_step += 1
            saver.after_step()
        state.step += 1
        state.epoch, state.epoch_step = epoch, 0
        saver.after_epoch()
        saver.after_evaluation()
    saver.finish()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"save_every_n_steps": 3},
         ["epoch_1.pt", "epoch_1_step_6.pt", "epoch_2.pt", "epoch_2_step_9.pt", "epoch_3.pt"]),
        ({"save_every_n_steps": 3, "keep_last": 1, "save_frequency": 0}, ["epoch_2_step_9.pt", "epoch_3.pt"]),
        ({"save_every_n_steps": 4, "save_frequency": 3}, ["epoch_1_step_4.pt", "epoch_2_step_8.pt", "epoch_3.pt"]),
        ({"save_every_n_steps": 2, "keep_last": 1, "delete_previous_checkpoint": True, "sync_save": True},
         ["epoch_2_step_10.pt", "epoch_3.pt"]),
    ],
)  # fmt: skip
def test_what_is_on_disk_after_three_epochs_of_four_steps(tmp_path, options, expected):
    run(saver_of(tmp_path, state_of(), epochs=3, **options), 3)
    assert names(tmp_path) == expected
    assert get_latest_checkpoint(tmp_path) == str(tmp_path / "epoch_3.pt")


def test_what_was_ahead_is_given_up_by_the_first_save(tmp_path):
    """Gone on from an earlier checkpoint, or with other steps: `latest` must not find the old future."""
    for name in ("epoch_0_step_2.pt", "epoch_1.pt", "epoch_1_step_30.pt", "epoch_2_step_50.pt"):
        torch.save({"epoch": 0, "state_dict": {}}, tmp_path / name)
    saver = saver_of(tmp_path, state_of(epoch=1, step=20), save_every_n_steps=5)
    saver.after_step()
    saver.finish()
    assert names(tmp_path) == ["epoch_0_step_2.pt", "epoch_1.pt", "epoch_1_step_20.pt"]


def test_the_file_has_the_weights_of_its_step_though_training_goes_on(tmp_path, monkeypatch):
    go, save = threading.Event(), file_utils.pt_save
    monkeypatch.setattr(file_utils, "pt_save", lambda *args: (go.wait(10), save(*args))[1])
    state = state_of(step=2)
    saver = saver_of(tmp_path, state, save_every_n_steps=2)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    start = time.perf_counter()
    saver.after_step()
    assert names(tmp_path) == [], "it is being written"
    assert saver.take_waited() <= time.perf_counter() - start < 5, "and not waited for"
    with torch.no_grad():
        state.model.weight.add_(1)
    go.set()
    saver.finish()
    saved = torch.load(tmp_path / "epoch_0_step_2.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    assert saver.take_waited() == 0.0


def test_the_next_save_waits_for_the_one_under_way_and_says_how_long(tmp_path, monkeypatch):
    save, writing = file_utils.pt_save, []

    def slow(*args):
        writing.append(threading.current_thread())
        assert sum(thread.is_alive() for thread in writing) == 1, "one at a time"
        time.sleep(0.3)
        save(*args)

    monkeypatch.setattr(file_utils, "pt_save", slow)
    state = state_of(step=1)
    saver = saver_of(tmp_path, state, save_every_n_steps=1)
    saver.after_step()
    assert saver.take_waited() < 0.25
    state.step = 2
    saver.after_step()
    assert 0.2 < saver.take_waited() < 5
    saver.close()
    assert names(tmp_path) == ["epoch_0_step_1.pt", "epoch_0_step_2.pt"]


def full_disk(monkeypatch, failing: list[bool]) -> None:
    save = torch.save

    def writes(checkpoint, path):
        save(checkpoint, path)
        if failing[0] and isinstance(path, Path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_utils.torch, "save", writes)


@pytest.mark.parametrize("sync_save", [False, True])
def test_a_failing_save_keeps_those_before_and_training_goes_on(tmp_path, monkeypatch, caplog, sync_save):
    failing = [False]
    full_disk(monkeypatch, failing)
    state = state_of(epoch=1)
    saver = saver_of(tmp_path, state, epochs=3, delete_previous_checkpoint=True, sync_save=sync_save)
    saver.after_epoch()
    saver.close()
    failing[0], state.epoch, state.step = True, 2, 1
    saver.after_epoch()
    saver.close()
    saver.after_step()
    assert names(tmp_path) == ["epoch_1.pt"], "the old one is there, and nothing of the new one"
    assert "No space left" in caplog.text
    with pytest.raises(OSError, match="No space"):
        saver.finish()  # had it been the last
    failing[0], state.epoch, state.step = False, 3, 2
    saver.after_epoch()
    saver.finish()
    assert names(tmp_path) == ["epoch_3.pt"]


def test_a_failing_save_ends_the_run_where_that_is_asked_for(tmp_path, monkeypatch):
    full_disk(monkeypatch, [True])
    saver = saver_of(tmp_path, state_of(step=1), save_every_n_steps=1, on_save_failure="stop")
    saver.after_step()
    saver.close()
    with pytest.raises(OSError, match="No space"):
        saver.after_step()


@pytest.mark.parametrize(("error", "is_written"), [(None, True), (ValueError, True), (KeyboardInterrupt, False)])
def test_the_end_of_a_run_waits_for_the_writer_except_after_a_second_ctrl_c(tmp_path, monkeypatch, error, is_written):
    go, save = threading.Event(), file_utils.pt_save
    monkeypatch.setattr(file_utils, "pt_save", lambda *args: (go.wait(10), save(*args))[1])
    with contextlib.suppress(*([] if error is None else [error])), saver_of(tmp_path, state_of(epoch=1)) as saver:
        saver.after_epoch()
        threading.Timer(0.3, go.set).start()
        if error is not None:
            raise error
    assert (names(tmp_path) == ["epoch_1.pt"]) == is_written
    go.set()
    saver.close()


def test_a_saver_without_a_folder_does_nothing():
    with NullSaver() as saver:
        saver.after_step()
        saver.after_epoch()
        saver.after_evaluation()
        saver.stop(is_collective=True)
        saver.finish()
    assert saver.take_waited() == 0
    assert {name for name in vars(Saver) if not name.startswith("_")} <= set(dir(NullSaver))


def test_a_stop_saves_what_is_not_saved_yet(tmp_path):
    state = state_of(step=7, epoch=1)
    saver = saver_of(tmp_path, state)
    saver.stop(is_collective=True)
    assert names(tmp_path) == ["epoch_1_step_7.pt"]
    modified = (tmp_path / "epoch_1_step_7.pt").stat().st_mtime_ns
    saver.stop(is_collective=True)
    assert (tmp_path / "epoch_1_step_7.pt").stat().st_mtime_ns == modified


def test_a_stop_in_an_evaluation_asks_nobody(tmp_path, monkeypatch):
    state = state_of(step=8, epoch=2)
    saver = saver_of(tmp_path, state, save_frequency=3)
    saver.after_epoch()
    assert names(tmp_path) == []
    monkeypatch.setattr(TrainState, "state_dict", lambda self: pytest.fail("collective"))
    saver.stop(is_collective=False)
    assert torch.load(tmp_path / "epoch_2_step_8.pt", weights_only=True)["epoch"] == 2


def test_a_copy_shares_nothing_with_its_source_and_its_memory_is_used_again():
    copier, weight = HostCopy(CPU), torch.arange(4.0)
    nested = {"a": weight, "b": [weight, (1, "x")], "empty": [torch.zeros(0), torch.zeros(0, 2)], "n": None}
    first, ready = copier.take(nested)
    ready()
    weight.add_(1)
    assert first["a"].tolist() == [0, 1, 2, 3]
    assert first["a"] is first["b"][0], "what was one tensor is one"
    assert first["b"][1] == (1, "x")
    assert [list(empty.shape) for empty in first["empty"]] == [[0], [0, 2]]
    second, _ = copier.take(nested)
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert second["a"].tolist() == [1, 2, 3, 4]


@pytest.fixture
def folders(monkeypatch) -> None:
    """Let every run write folders, also without sharded weights."""
    monkeypatch.setattr(TrainState, "is_sharded", True)


@pytest.mark.usefixtures("folders")
def test_the_folder_that_epoch_latest_points_to_is_kept(tmp_path):
    options = {"save_frequency": 0, "save_most_recent": True, "save_every_n_steps": 3, "keep_last": 1}
    saver = saver_of(tmp_path, state_of(), fsdp_checkpoint="sharded", **options)
    run(saver, 1)
    state = saver.state
    for state.step in (6, 9):
        saver.after_step()
    saver.finish()
    assert names(tmp_path) == ["epoch_1_step_4", "epoch_1_step_9", "epoch_latest"]
    assert (tmp_path / "epoch_latest").resolve().name == "epoch_1_step_4"
    state.epoch, state.step = 2, 10
    saver.after_epoch()
    saver.finish()
    assert names(tmp_path) == ["epoch_2_step_10", "epoch_latest"]
    assert (tmp_path / "epoch_latest").resolve().name == "epoch_2_step_10"


@pytest.mark.usefixtures("folders")
def test_the_previous_epoch_is_removed_after_epoch_latest_points_to_the_new_one(tmp_path):
    options = {"save_most_recent": True, "delete_previous_checkpoint": True}
    run(saver_of(tmp_path, state_of(), epochs=3, fsdp_checkpoint="sharded", **options), 3)
    assert names(tmp_path) == ["epoch_3", "epoch_latest"]


# The newest that loads


def three_checkpoints(folder: Path) -> list[Path]:
    paths = [folder / name for name in ("epoch_1.pt", "epoch_1_step_9.pt", "epoch_1_step_10.pt")]
    for number, path in enumerate(paths):
        torch.save({"epoch": 1, "state_dict": {"weight": torch.full((999,), float(number))}}, path)
    return paths


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-40], lambda b: b[: len(b) // 2], lambda b: b"x" * 99, flip]
)
def test_a_damaged_newest_is_named_and_passed_over(tmp_path, caplog, damage):
    paths = three_checkpoints(tmp_path)
    assert get_latest_checkpoint(tmp_path) == str(paths[2])
    paths[2].write_bytes(damage(paths[2].read_bytes()))
    assert get_latest_checkpoint(tmp_path) == str(paths[1])
    assert "epoch_1_step_10.pt is damaged" in caplog.text
    (tmp_path / "epoch_latest.pt").write_bytes(b"half")
    assert get_latest_checkpoint(tmp_path) == str(paths[1])
    paths[1].write_bytes(b"")
    assert get_latest_checkpoint(tmp_path) == str(paths[0])
    paths[0].write_bytes(b"")
    with pytest.raises(ValueError, match="None of the checkpoints"):
        get_latest_checkpoint(tmp_path)


def test_open_clip_takes_the_same_one_for_the_latest(tmp_path):
    """It takes the last of the names in natural order."""
    paths = three_checkpoints(tmp_path)
    assert names(tmp_path)[-1] == paths[2].name


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    for name in (".epoch_1.pt.0123abcd.tmp", "epoch_1.pt", ".hidden", "x.tmp"):
        (tmp_path / name).write_bytes(b"")
    file_utils.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "epoch_1.pt", "x.tmp"]
