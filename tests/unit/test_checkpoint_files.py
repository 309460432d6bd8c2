"""Reading of checkpoint files into state dicts, and the errors of files that cannot be read."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import enum
import os
import pickle
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from checkpoint_cases import (
    SAVERS,
    assert_same_weights,
    clip,
    digest,
    meta_clip,
    save_bare,
    save_legacy,
    save_npz,
    save_safetensors,
)
from open_clip.checkpoint.files import load_state_dict, read_checkpoint, read_state_dict
from open_clip.checkpoint.fit import load_checkpoint
from open_clip.formats.binary_file import BinaryFile, FileError


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
@pytest.mark.parametrize("save", SAVERS)
def test_formats_are_detected_by_content(tmp_path, save, suffix):
    weights = clip().state_dict()
    save(weights, tmp_path / f"file{suffix}")
    found = load_state_dict(tmp_path / f"file{suffix}")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize("save", [save_bare, save_legacy, save_safetensors, save_npz])
def test_weights_do_not_depend_on_the_file_after_loading(tmp_path, save):
    path = tmp_path / "file"
    save(clip().state_dict(), path)
    before = digest(path)
    weights = load_state_dict(path)
    assert str(path) not in Path("/proc/self/maps").read_text()
    for value in weights.values():
        value.add_(1)
    assert digest(path) == before
    path.write_bytes(b"")  # reading a mapped file would now end the process
    assert all(torch.equal(weights[key], value + 1) for key, value in clip().state_dict().items())


@pytest.mark.parametrize("save", [save_bare, save_safetensors])
def test_a_file_that_nobody_edits_may_be_mapped(tmp_path, save):
    path = tmp_path / "file"
    save(clip().state_dict(), path)
    before = digest(path)
    model = meta_clip()
    load_checkpoint(model, path, is_mapped=True)
    assert str(path) in Path("/proc/self/maps").read_text()
    assert_same_weights(model, clip())
    with torch.no_grad():
        model.visual.proj.add_(1)
    assert digest(path) == before


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("save", [save_bare, save_legacy])
def test_tensors_that_share_memory_in_a_file_become_independent(tmp_path, save, is_mapped):
    base = torch.arange(24.0).reshape(4, 6)
    weights = {
        "base": base, "same": base, "alias": base.view(24), "row": base[1], "column": base[:, 2], "turned": base.t(),
        "expanded": base[0, :1].expand(5), "empty": base[:0], "bytes": torch.arange(5, dtype=torch.uint8)[1:],
    }  # fmt: skip
    save(weights, tmp_path / "file.pt")
    found = read_state_dict(tmp_path / "file.pt", is_mapped)
    for key, value in weights.items():
        assert torch.equal(found[key], value), key
    for key in weights:
        found[key].fill_(7)
        for other in weights.keys() - {key}:
            assert torch.equal(found[other], weights[other]), (key, other)
        found[key].copy_(weights[key])


def test_a_small_view_keeps_no_large_storage(tmp_path):
    large = torch.randn(1000, 1000)
    torch.save({"row": large[3], "column": large[:, 3]}, tmp_path / "file.pt")
    for value in load_state_dict(tmp_path / "file.pt").values():
        assert value.untyped_storage().nbytes() == 4000


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    """The state of the optimizer, which is twice as large, is not read."""
    torch.save({"state_dict": {"a": torch.ones(10)}, "optimizer": {"m": torch.ones(1000)}}, tmp_path / "file.pt")
    read = []
    fill = BinaryFile.fill
    monkeypatch.setattr(BinaryFile, "fill", lambda file, reads: (read.extend(reads), fill(file, reads))[1])
    load_state_dict(tmp_path / "file.pt")
    assert sum(storage.nbytes() for storage, _ in read) == 40


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    width: int = 3


class Config(dict):
    pass


FOREIGN = {
    "numpy scalar": numpy.float64(0.3), "numpy array": numpy.ones(3), "namespace": argparse.Namespace(lr=1),
    "path": Path("a/b"), "enum": Colour.RED, "dataclass": Settings(), "dict's child": Config(a=1, b={"c": 2}),
    "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]), "model": nn.Linear(2, 2),
    "datetime": datetime.datetime.now(), "function": os.path.join, "class": Settings,
}  # fmt: skip
PLAIN = {
    "size": torch.Size([2, 3]), "dtype": torch.float16, "counter": Counter("aab"), "set": {1, 2}, "bytes": b"\xff\0",
    "ordered": OrderedDict(a=1), "none": None, "text": "x", "complex": 1j, "default": defaultdict(list, a=[1]),
    "large": 10**30,
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_new", [True, False])
def test_other_objects_are_dropped_with_one_warning(tmp_path, caplog, is_new, protocol):
    content = {**FOREIGN, **PLAIN, "in a list": [1, numpy.float32(2), torch.ones(2)], "state_dict": clip().state_dict()}
    path = tmp_path / "file.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_new, pickle_protocol=protocol)
    weights = load_state_dict(path)
    assert all(torch.equal(weights[key], value) for key, value in clip().state_dict().items())
    assert sum("dropped objects that are not tensors" in record.getMessage() for record in caplog.records) == 1
    loaded = read_checkpoint(path)
    assert not FOREIGN.keys() & loaded.keys()
    assert {key: loaded[key] for key in PLAIN} == PLAIN
    first, second, third = loaded["in a list"]
    assert (first, second, third.tolist()) == (1, None, [1, 1])


def test_a_whole_pickled_model_is_named(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"an object of torch.nn.modules.linear.Linear.*instead: model.state_dict\(\)"):
        load_state_dict(tmp_path / "file.pt")


class Evil:
    """Creates a file if it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("save", [save_bare, save_legacy])
def test_code_in_a_pickle_is_not_run(tmp_path, save, weights_only, caplog):
    marker = tmp_path / "ran"
    save({"state_dict": {"weight": torch.ones(1)}, "note": Evil(marker)}, tmp_path / "evil.pt")
    assert list(load_state_dict(tmp_path / "evil.pt", weights_only=weights_only)) == ["weight"]
    assert "evil.pt: dropped objects that are not tensors, numbers or containers: posix.mkdir" in caplog.text
    assert not marker.exists()


@pytest.mark.parametrize(
    "attack",
    [
        b"\x80\x02r\xff\xff\xff\x7f.",  # LONG_BINPUT: 34 GB of memo in the C unpickler
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00.",  # BYTEARRAY8
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # BINBYTES8
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # FRAME
        b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b"}q\x01h\x00K\x01s.",  # a key whose hash visits 2**60 tuples
        b"\x80\x02]" + b"q\x00]h\x00ah\x00a" * 60 + b".",  # a list of 2**60 lists
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",  # nested too deeply
        b"\x80\x02]q\x00h\x00a.",  # a list that contains itself
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        b"\x80\x02}(X\x01\x00\x00\x00a\x82\x01X\x01\x00\x00\x00b.",  # EXT1, unregistered
        b"\x80\x02ctorch.nn\nLinear\n}X\x01\x00\x00\x00aK\x01s\x86b.",  # BUILD that sets attributes of a class
    ],
)
def test_pickles_cannot_exhaust_memory_or_time(tmp_path, attack):
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("archive/data.pkl", attack)
    for load in (load_state_dict, read_checkpoint):
        with contextlib.suppress(FileError):
            load(tmp_path / "file.pt")
    with pytest.raises(FileError, match=r"file\.pt"):
        load_state_dict(tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"x" * 100, "starts with b'xxxxxxxx'"),
        (b"PK\x03\x04" + b"\0" * 100, "cut off"),
        (b"\x80\x02}q\x00.", "a pickle that torch.save did not write"),
        (pickle.dumps([1, 2]), "a pickle that torch.save did not write"),
    ],
)
def test_files_that_are_not_checkpoints_raise(tmp_path, content, message):
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_state_dict(tmp_path / "file.pt")


@pytest.mark.parametrize("save", [save_bare, save_legacy, save_safetensors, save_npz])
def test_a_truncated_file_raises(tmp_path, save):
    path = tmp_path / "file"
    save(clip().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"interrupted\?|damaged"):
        load_state_dict(path)


def test_missing_files_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_state_dict(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_state_dict(tmp_path / "nothing.pt")


@pytest.mark.parametrize(
    ("content", "message"), [({"epoch": 3}, "no state dict, only epoch"), ([torch.ones(1)], "a list")]
)
def test_files_without_weights_raise(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=message):
        load_state_dict(tmp_path / "file.pt")


def test_other_entries_are_ignored_with_a_warning(tmp_path, caplog):
    torch.save({"weight": torch.ones(1), "note": "hello"}, tmp_path / "file.pt")
    assert list(load_state_dict(tmp_path / "file.pt")) == ["weight"]
    assert "ignored entries that are not tensors: note" in caplog.text
