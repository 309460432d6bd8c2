"""Tests of the state of a run: saving, loading, compatibility with open_clip_torch, damaged files."""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gloo_ranks import run_ranks
from training.checkpoint.file_format import COUNTERS, RunState, from_file, to_file
from training.checkpoint.latest import get_latest_checkpoint, natural_key
from training.checkpoint.rng import random_seed
from training.checkpoint.saver import Saver
from training.checkpoint.state import TrainState
from training.checkpoint.stored_tensor import read_all
from training.checkpoint.weights import load_checkpoint, load_weights
from training.params import CheckpointConfig
from training.precision import DisabledScaler

CPU = torch.device("cpu")


class Scaler:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def state_dict(self):
        return {"scale": self.scale}

    def load_state_dict(self, state):
        self.scale = state["scale"]


def state_of(seed: int = 0, scaler: Scaler | None = None, **values) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    parts = {"optimizer": optimizer} | ({} if scaler is None else {"scaler": scaler})
    return TrainState(model=model, device=CPU, name="run", parts=parts, **values)


def train(state: TrainState, steps: int) -> list[float]:
    """Make steps that use every random generator and return their losses."""
    losses = []
    optimizer = state.parts["optimizer"]
    for _ in range(steps):
        x = torch.randn(8, 3) * random.random() + float(np.random.rand())
        loss = state.model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state.step += 1
        losses.append(loss.item())
    return losses


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    unbroken = state_of(scaler=Scaler(4.0), epoch=3, samples_seen=120)
    train(unbroken, 3)
    torch.save(unbroken.state_dict(), tmp_path / "c.pt")
    expected = train(unbroken, 5)

    restored = state_of(seed=9, scaler=Scaler())
    random_seed(1)
    restored.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True))
    assert (restored.epoch, restored.step, restored.samples_seen, restored.parts["scaler"].scale) == (3, 3, 120, 4.0)
    assert train(restored, 5) == expected
    for ours, theirs in zip(restored.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_file_has_the_keys_of_open_clip_and_one_of_ours():
    saved = state_of(scaler=Scaler(), epoch=2).state_dict()
    assert set(saved) == {"epoch", "name", "state_dict", "optimizer", "scaler", "train_state"}
    assert list(saved["state_dict"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (saved["epoch"], saved["name"]) == (2, "run")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_checkpoint_of_open_clip_resumes(prefix):  # tests/parity/test_training_checkpoint.py has a real one
    theirs = state_of()
    train(theirs, 4)
    saved = theirs.state_dict()
    del saved["train_state"]
    saved["epoch"] = 2
    saved["state_dict"] = {prefix + name: value for name, value in saved["state_dict"].items()}
    ours = state_of(seed=5, scaler=Scaler(7.0), steps_per_epoch=2, samples_per_epoch=16)
    ours.load_state_dict(copy.deepcopy(saved))
    assert (ours.epoch, ours.step, ours.samples_seen, ours.parts["scaler"].scale) == (2, 4, 32, 7.0)
    random_seed(0)
    expected = train(theirs, 2)
    random_seed(0)
    assert train(ours, 2) == expected


class Part:
    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class RankPart(Part):
    def load_state_dict(self, states):
        self.value = [state["value"] for state in states]


def test_a_new_part_is_saved_and_loaded_under_its_name():
    state = state_of()
    state.parts["new"], state.rank_parts["data"] = Part(3), RankPart(4)
    saved = state.state_dict()
    assert saved["train_state"]["new"] == {"value": 3}
    assert saved["train_state"]["data"] == [{"value": 4}]
    other = state_of()
    other.parts["new"], other.rank_parts["data"] = Part(0), RankPart(0)
    other.load_state_dict(saved)
    assert (other.parts["new"].value, other.rank_parts["data"].value) == (3, [4])
    del saved["train_state"]["new"]  # a checkpoint from before the part existed
    other.parts["new"] = Part(7)
    other.load_state_dict(saved)
    assert other.parts["new"].value == 7


def test_reading_a_file_is_the_inverse_of_writing_it():
    parts = {"optimizer": {"param_groups": []}, "scaler": {"scale": 2.0}, "average": {"w": torch.ones(2)}}
    counters = dict(zip(COUNTERS, range(len(COUNTERS)), strict=True))
    by_rank = {"rng": [{"a": 1}], "data": [{"b": 2}]}
    weights = {"w": torch.zeros(2)}
    state = RunState(weights, 3, "run", counters, parts | {"guard": {"counts": 1}}, by_rank)
    file = to_file(state, is_distributed=True)
    assert set(file) == {"epoch", "name", "state_dict", "optimizer", "scaler", "state_dict_ema", "train_state"}
    assert set(file["train_state"]) == {"version", *COUNTERS, "rng", "data", "guard"}
    assert list(file["state_dict"]) == ["module.w"]
    found = from_file(file)
    assert (found.epoch, found.name, found.counters, found.by_rank) == (3, "run", counters, by_rank)
    assert found.parts == state.parts


def test_a_disabled_scaler_leaves_no_trace():
    state = state_of(scaler=DisabledScaler())
    saved = state.state_dict()
    assert "scaler" not in saved
    state.load_state_dict({**saved, "scaler": {"scale": 4.0}})
    assert not state.parts["scaler"].is_enabled()


def test_weights_alone_start_a_run():
    theirs, ours = state_of(), state_of(seed=5, epoch=0)
    ours.load_state_dict(theirs.model.state_dict())
    assert torch.equal(ours.model[0].weight, theirs.model[0].weight)
    assert ours.epoch == ours.step == 0
    ours.load_state_dict({"state_dict": state_of(seed=3).model.state_dict()})
    assert torch.equal(ours.model[0].weight, state_of(seed=3).model[0].weight)


def test_a_checkpoint_of_another_model_says_what_differs_and_changes_nothing():
    model = nn.Linear(3, 4)
    before = model.weight.clone()
    other = {"weight": torch.zeros(4, 5), "extra": torch.zeros(1)}
    with pytest.raises(ValueError, match="another model") as error:
        load_weights(model, other)
    for words in ("1 missing: bias.", "1 unexpected: extra.", "weight is [4, 5] instead of [4, 3]", "--pretrained"):
        assert words in str(error.value)
    assert torch.equal(model.weight, before)


def test_another_optimizers_state_says_so():
    saved = state_of()
    saved.parts["optimizer"] = torch.optim.SGD(saved.model.parameters(), 0.1, momentum=0.9)
    train(saved, 1)
    with pytest.raises(ValueError, match=r"no exp_avg, exp_avg_sq, which AdamW needs.*--opt"):
        state_of().load_state_dict(saved.state_dict())


def test_a_scaler_of_another_kind_keeps_what_is_its_own():
    """The scaler of torch_npu has one more entry than torch's, and requires it."""

    class Other(Scaler):
        dynamic = True

        def state_dict(self):
            return {"scale": self.scale, "dynamic": self.dynamic}

        def load_state_dict(self, state):
            self.scale, self.dynamic = state["scale"], state["dynamic"]

    ours = state_of(scaler=Other())
    ours.load_state_dict(state_of(scaler=Scaler(4.0)).state_dict())
    assert (ours.parts["scaler"].scale, ours.parts["scaler"].dynamic) == (4.0, True)


def test_evaluation_needs_no_optimizer():
    saved = state_of(epoch=4).state_dict()
    ours = TrainState(model=state_of(seed=2).model, device=CPU)
    ours.load_state_dict(saved)
    assert ours.epoch == 4
    assert torch.equal(ours.model[0].weight, saved["state_dict"]["0.weight"])


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run_and_damage_is_said(tmp_path):
    bad = tmp_path / "bad.pt"
    torch.save({"epoch": 1, "state_dict": Bomb(tmp_path / "made by the checkpoint")}, bad)
    assert load_checkpoint(bad) == {"epoch": 1}
    assert not (tmp_path / "made by the checkpoint").exists()
    torch.save(state_of().state_dict(), bad)
    bad.write_bytes(bad.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(bad)
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match="it is empty"):
        load_checkpoint(bad)
    torch.save([1], bad)
    with pytest.raises(ValueError, match="holds a list"):
        load_checkpoint(bad)
    with pytest.raises(FileNotFoundError, match="--resume latest"):
        load_checkpoint(tmp_path / "none.pt")


def test_parts_of_a_file_keep_no_memory_of_the_whole(tmp_path):
    torch.save({"state_dict": {"w": torch.arange(800.0).view(100, 8)}}, tmp_path / "x.pt")
    stored = load_checkpoint(tmp_path / "x.pt", is_lazy=True)["state_dict"]["w"]
    part = stored.read_part((10, 0), (25, 8))
    assert torch.equal(part, torch.arange(80.0, 280.0).view(25, 8))
    assert part.untyped_storage().nbytes() == part.numel() * 4
    assert torch.equal(stored.read(), torch.arange(800.0).view(100, 8))


def test_a_file_at_a_url_is_read_at_once(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    torch.save({"state_dict": {"w": torch.arange(3.0)}}, tmp_path / "x.pt")
    fsspec.filesystem("memory").put(str(tmp_path / "x.pt"), "/lazy/x.pt")
    for path, is_read in (("memory://lazy/x.pt", True), (f"file://{tmp_path}/x.pt", False)):
        weight = load_checkpoint(path, is_lazy=True)["state_dict"]["w"]
        assert (weight.device == CPU) == is_read
        assert read_all(weight).tolist() == [0, 1, 2]


def saved_names(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.iterdir()), key=natural_key)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["epoch_1.pt", "epoch_2.pt", "epoch_3.pt", "epoch_4.pt", "epoch_5.pt"]),
        ({"save_frequency": 2}, ["epoch_2.pt", "epoch_4.pt", "epoch_5.pt"]),
        ({"save_frequency": 0}, ["epoch_5.pt"]),
        ({"save_frequency": 0, "save_most_recent": True}, ["epoch_5.pt", "epoch_latest.pt"]),
        ({"delete_previous_checkpoint": True}, ["epoch_5.pt"]),
        ({"save_frequency": 2, "delete_previous_checkpoint": True}, ["epoch_5.pt"]),
    ],
)
def test_what_is_on_disk_after_five_epochs(tmp_path, options, expected):
    state = state_of()
    saver = Saver(CheckpointConfig(**options), tmp_path, state, epochs=5)
    for state.epoch in range(1, 6):
        saver.after_epoch()
    saver.finish()
    assert saved_names(tmp_path) == expected
    assert torch.load(tmp_path / expected[-1], weights_only=True)["epoch"] == 5


def touch(folder: Path, **epochs: int) -> None:
    for name, epoch in epochs.items():
        torch.save({"epoch": epoch, "state_dict": {}}, folder / f"{name}.pt")


def test_the_latest_is_the_one_of_most_epochs(tmp_path):
    assert get_latest_checkpoint(tmp_path / "none") is None
    assert get_latest_checkpoint(tmp_path) is None
    touch(tmp_path, epoch_9=9, epoch_10=10, tmp=99)
    (tmp_path / ".epoch_11.pt.1234.tmp").write_bytes(b"half")
    assert get_latest_checkpoint(tmp_path) == str(tmp_path / "epoch_10.pt")
    touch(tmp_path, epoch_latest=4)  # from an earlier run
    assert get_latest_checkpoint(tmp_path) == str(tmp_path / "epoch_10.pt")
    touch(tmp_path, epoch_latest=11)
    assert get_latest_checkpoint(tmp_path) == str(tmp_path / "epoch_latest.pt")


def test_the_latest_among_files_of_other_names(tmp_path):
    touch(tmp_path, mine_2=1, mine_10=1)
    assert get_latest_checkpoint(tmp_path) == str(tmp_path / "mine_10.pt")


def test_the_latest_on_a_remote_store():
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    assert get_latest_checkpoint("memory://runs/none", remote=True) is None
    for name in ("epoch_2.pt", "epoch_11.pt", "results.jsonl"):
        store.pipe(f"/runs/a/{name}", b"x")
    assert get_latest_checkpoint("memory://runs/a/", remote=True) == "memory://runs/a/epoch_11.pt"


def test_natural_order():
    names = ["epoch_10.pt", "Epoch_9.pt", "epoch_latest.pt", "9", "a"]
    assert sorted(names, key=natural_key) == ["9", "a", "Epoch_9.pt", "epoch_10.pt", "epoch_latest.pt"]


def ranks_save(rank: int, world_size: int) -> dict:
    """Each rank uses its generators, saves, continues, and loads the file of rank 0."""
    state = state_of(seed=100 + rank)
    state.seed, state.step = 3, 5
    saved = state.state_dict()
    expected = torch.rand(2)
    torch.manual_seed(0)
    state.load_state_dict(saved)
    again = torch.rand(2)
    saved["train_state"]["rng"] = saved["train_state"]["rng"][:1]  # as if saved with another number of ranks
    state.load_state_dict(saved)
    return {"expected": expected, "again": again, "other": torch.rand(2), "names": list(saved["state_dict"])}


def test_each_rank_gets_its_own_random_state_back(tmp_path):
    ranks = run_ranks(__file__, "ranks_save", (2,), tmp_path)[2]
    for number, rank in enumerate(ranks):
        assert torch.equal(rank["expected"], rank["again"])
        fresh = torch.rand(2, generator=torch.Generator().manual_seed(3 + 5 + number))
        assert torch.equal(rank["other"], fresh), "seed + step + rank"
        assert rank["names"][0] == "module.0.weight", "as open_clip writes and reads it in a distributed run"
    assert not torch.equal(ranks[0]["expected"], ranks[1]["expected"])
