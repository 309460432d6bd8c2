"""Folders of sharded checkpoints: damage, interrupted saves, malicious files, other programs, and consolidation."""

from __future__ import annotations

import os
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import open_clip
import sharded_states
from open_clip.checkpoint.files import load_state_dict
from open_clip.formats.sharded_folder import ShardedFolder
from sharded_states import save
from training import consolidate, run_folder
from training.checkpoint import folder as checkpoint_folder
from training.checkpoint.folder import find_damage
from training.checkpoint.latest import get_latest_checkpoint
from training.checkpoint.stored_tensor import read_all
from training.checkpoint.weights import load_checkpoint


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_content_is_that_of_a_file(tmp_path):
    saved = save(tmp_path / "epoch_1")
    loaded = read_all(load_checkpoint(tmp_path / "epoch_1"))
    assert list(loaded["state_dict"]) == list(saved["state_dict"])
    for key in ("state_dict", "state_dict_ema"):
        assert_same(loaded[key], dict(saved[key]))
    assert loaded["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
    assert_same(loaded["optimizer"]["state"], saved["optimizer"]["state"])
    assert loaded["train_state"].keys() == saved["train_state"].keys()


DAMAGES = {
    "emptied": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "one bit flipped": lambda data: (
        data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 4]) + data[len(data) // 3 + 1 :]
    ),
}


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "training.pt", "manifest.json"])
def test_latest_skips_a_damaged_folder(tmp_path, caplog, name):
    save(tmp_path / "epoch_1")
    save(tmp_path / "epoch_2")
    file = tmp_path / "epoch_2" / name
    data = file.read_bytes()
    for damage in (*DAMAGES, "missing"):
        if damage == "one bit flipped" and name == "manifest.json":
            continue  # a wrong size or checksum is found, a wrong name of the format does not matter
        file.unlink()
        if damage != "missing":
            file.write_bytes(DAMAGES[damage](data))
        assert get_latest_checkpoint(tmp_path) == str(tmp_path / "epoch_1"), damage
    assert "epoch_2 is damaged and skipped" in caplog.text
    file.write_bytes(data)
    assert get_latest_checkpoint(tmp_path) == str(tmp_path / "epoch_2")


def test_files_and_folders_are_ordered_together(tmp_path):
    for name in ("epoch_1.pt", "epoch_2_step_9.pt"):
        torch.save({"epoch": 1, "state_dict": {}}, tmp_path / name)
    save(tmp_path / "epoch_2")
    assert get_latest_checkpoint(tmp_path) == str(tmp_path / "epoch_2_step_9.pt")
    save(tmp_path / "epoch_2_step_10")
    assert get_latest_checkpoint(tmp_path) == str(tmp_path / "epoch_2_step_10")


def test_a_start_completes_or_removes_what_an_interrupted_save_has_left(tmp_path):
    for name in ("epoch_1", "epoch_2", "epoch_3", "epoch_4"):
        save(tmp_path / name)
    (tmp_path / "epoch_1").rename(tmp_path / ".epoch_1.00000000.tmp")  # complete but for its name
    (tmp_path / "epoch_2").rename(tmp_path / ".epoch_2.00000000.tmp")
    (tmp_path / ".epoch_2.00000000.tmp" / "manifest.json").unlink()
    (tmp_path / "epoch_3").rename(tmp_path / ".epoch_3.00000000.removed.tmp")
    (tmp_path / "epoch_4").rename(tmp_path / ".epoch_4.00000000.tmp")
    for name in ("manifest.json", "training.pt"):  # what is left looks like a folder of open_clip
        (tmp_path / ".epoch_4.00000000.tmp" / name).unlink()
    (tmp_path / ".epoch_latest.tmp").symlink_to("epoch_1")
    assert get_latest_checkpoint(tmp_path) is None
    run_folder._remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_1"]
    assert find_damage(tmp_path / "epoch_1") is None


def test_what_looks_like_a_folder_of_open_clip_is_written_last(tmp_path, monkeypatch):
    """A save that is interrupted before the manifest must not leave weights without the rest of the state."""
    seen = []

    def synced(descriptor: int) -> None:
        folder = next(tmp_path.glob(".epoch_1.*.tmp"), None)
        if folder is not None:
            seen.append({path.name for path in folder.iterdir()})

    monkeypatch.setattr(checkpoint_folder.os, "fsync", synced)
    save(tmp_path / "epoch_1")
    assert len(seen) > 3
    assert all("training.pt" in names for names in seen if ".metadata" in names)
    (tmp_path / "epoch_1" / "training.pt").unlink()
    with pytest.raises(ValueError, match=r"damaged: it has no training\.pt"):
        load_checkpoint(tmp_path / "epoch_1")


def test_a_host_that_does_not_share_the_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "_create_temporary", lambda folder: folder / "elsewhere" / "x.tmp")
    with pytest.raises(OSError, match=r"not visible to rank 0\. All hosts must share the folder .*elsewhere"):
        save(tmp_path / "epoch_1")


def test_a_failed_commit_leaves_the_folder_that_it_would_replace(tmp_path, monkeypatch):
    before = save(tmp_path / "epoch_1")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_folder.json, "dumps", fail)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "epoch_1", sharded_states.create(0, seed=3))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_1"]
    assert_same(read_all(load_checkpoint(tmp_path / "epoch_1"))["state_dict"], dict(before["state_dict"]))


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", [".metadata", "training.pt", "manifest.json", "__0_0.distcp"])
def test_nothing_in_a_folder_is_executed(tmp_path, name):
    save(tmp_path / "epoch_1")
    marker = tmp_path / "executed"
    (tmp_path / "epoch_1" / name).write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(ValueError, match="None of the checkpoints"):
        get_latest_checkpoint(tmp_path)
    if name != "manifest.json":
        with pytest.raises(ValueError, match=r"damaged|did not write"):
            read_all(load_checkpoint(tmp_path / "epoch_1"))
    assert not marker.exists()


def test_a_folder_cannot_name_files_outside_of_it(tmp_path):
    save(tmp_path / "epoch_1")
    metadata = tmp_path / "epoch_1" / ".metadata"
    metadata.write_bytes(metadata.read_bytes().replace(b"__0_0.distcp", b"../../../etc"))
    with pytest.raises(ValueError, match=r"outside the folder|damaged"):
        ShardedFolder(str(tmp_path / "epoch_1"))


def test_torch_reads_our_folders(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    saved = save(tmp_path / "epoch_1")
    dcp_to_torch_save(tmp_path / "epoch_1", tmp_path / "out.pt")
    assert_same(torch.load(tmp_path / "out.pt", weights_only=True)["model"], dict(saved["state_dict"]))
    model = sharded_states.Model()
    weights = model.state_dict()
    dcp.load({"model": weights}, checkpoint_id=tmp_path / "epoch_1")
    assert_same(weights, saved["state_dict"])


def test_folders_that_other_programs_wrote_with_torch_resume(tmp_path):
    """As open_clip does: {model, optimizer} and a file with the rest."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    theirs = sharded_states.create(0)
    optimizer: Any = theirs.parts["optimizer"]
    weights, states = get_state_dict(theirs.model, optimizer)
    weights["logit_scale"] = weights["logit_scale"].reshape(1)  # fully_shard needs a dimension
    all_states: Any = states["state"]
    of_scale = all_states["logit_scale"]
    moments = {key: value.reshape(1) for key, value in of_scale.items() if key.startswith("exp_avg")}
    all_states["logit_scale"] = {**of_scale, **moments}
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path / "epoch_2")
    torch.save({"epoch": 2, "name": "theirs", "global_step": 8}, tmp_path / "epoch_2" / "_metadata_extra.pt")
    assert get_latest_checkpoint(tmp_path) == str(tmp_path / "epoch_2")
    checkpoint = load_checkpoint(tmp_path / "epoch_2")
    groups = [[name for name, p in theirs.model.named_parameters() if p.requires_grad and (p.ndim < 2) == is_first]
              for is_first in (True, False)]  # fmt: skip
    assert checkpoint["train_state"]["optimizer_names"] == groups
    ours = sharded_states.create(0, seed=5)
    ours.steps_per_epoch = 4
    ours.load_state_dict(checkpoint)
    assert (ours.epoch, ours.step) == (2, 8)
    assert sharded_states.make_step(ours, 7) == sharded_states.make_step(theirs, 7)
    assert sharded_states.make_step(ours, 8) == sharded_states.make_step(theirs, 8)


def test_consolidation_writes_the_file_of_a_full_checkpoint(tmp_path, monkeypatch):
    saved = save(tmp_path / "epoch_1")
    read, alive = ShardedFolder.read, []

    def reading(*arguments: Any) -> Any:
        assert sum(reference() is not None for reference in alive) <= 1, "one tensor at a time"
        tensor = read(*arguments)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(ShardedFolder, "read", reading)
    consolidate.main([str(tmp_path / "epoch_1"), str(tmp_path / "epoch_1.pt")])
    written = torch.load(tmp_path / "epoch_1.pt", weights_only=True)
    torch.save(saved, tmp_path / "expected.pt")
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    assert_same(written["state_dict"], {f"module.{name}": value for name, value in expected["state_dict"].items()})
    assert_same(written["state_dict_ema"], expected["state_dict_ema"])
    assert_same(written["optimizer"]["state"], expected["optimizer"]["state"])
    resumed = sharded_states.create(0, seed=4)
    resumed.load_state_dict(load_checkpoint(tmp_path / "epoch_1.pt"))
    assert_same(dict(resumed.model.state_dict()), dict(expected["state_dict"]))
    (tmp_path / "epoch_1" / ".metadata").unlink()
    assert get_latest_checkpoint(tmp_path) == str(tmp_path / "epoch_1.pt"), "its checksums are right"


def test_consolidation_of_one_part(tmp_path):
    saved = save(tmp_path / "epoch_1")
    consolidate.main([str(tmp_path / "epoch_1"), str(tmp_path / "ema.pt"), "--only", "average"])
    assert_same(torch.load(tmp_path / "ema.pt", weights_only=True), dict(saved["state_dict_ema"]))


def test_consolidation_refuses_what_it_cannot_do(tmp_path):
    save(tmp_path / "epoch_1")
    out = tmp_path / "out.pt"
    with pytest.raises(FileNotFoundError, match=r"not a sharded checkpoint.*epoch_3"):
        consolidate.main([str(tmp_path), str(out)])
    out.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        consolidate.main([str(tmp_path / "epoch_1"), str(out)])
    file = tmp_path / "epoch_1" / "__0_0.distcp"
    file.write_bytes(DAMAGES["one bit flipped"](file.read_bytes()))
    with pytest.raises(ValueError, match=r"damaged.*Use an earlier checkpoint"):
        consolidate.main([str(tmp_path / "epoch_1"), str(out), "--overwrite"])
    assert out.read_bytes() == b"mine"


def test_pretrained_names_the_command_that_makes_a_file(tmp_path):
    save(tmp_path / "epoch_1")
    with pytest.raises(RuntimeError, match=r"python -m training\.consolidate"):
        open_clip.create_model("ViT-B-32", pretrained=str(tmp_path / "epoch_1"))
    with pytest.raises(FileNotFoundError, match=r"python -m training\.consolidate"):
        load_state_dict(str(tmp_path / "epoch_1"))


def test_a_remote_folder_is_used_only_if_it_is_complete(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    saved = save(tmp_path / "epoch_1")
    memory = fsspec.filesystem("memory")
    for name in ("epoch_1", "epoch_2"):
        memory.put(str(tmp_path / "epoch_1"), f"/sharded/{name}", recursive=True)
    memory.rm("/sharded/epoch_2/__0_0.distcp")
    found = get_latest_checkpoint("memory://sharded", remote=True)
    assert found == "memory://sharded/epoch_1"
    assert_same(read_all(load_checkpoint(found))["state_dict"], dict(saved["state_dict"]))
    memory.rm("/sharded", recursive=True)
