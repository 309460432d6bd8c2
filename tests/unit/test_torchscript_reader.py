"""Reading of weights in TorchScript archives, without any effect of their other contents."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from open_clip.checkpoint.files import load_state_dict
from open_clip.formats.torchscript import is_torchscript, read_torchscript

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.mask = torch.full((4,), 5.0)  # an attribute, neither parameter nor buffer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)) * self.scale + self.mask


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.register_buffer("input_resolution", torch.tensor(224))
        self.in_half = nn.Parameter(torch.arange(6.0).reshape(2, 3).half())
        self.transposed = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
        self.in_bfloat16 = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.jit.save(torch.jit.script(Model().eval()), str(tmp_path / "model.pt"))
    return tmp_path / "model.pt"


def rewrite(source: Path, target: Path, changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Copy an archive with entries, by their names below the root, replaced or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        entries = {name: old.read(name) for name in old.namelist()}
        root = next(iter(entries)).split("/")[0]
        for name, content in {**entries, **{f"{root}/{name}": content for name, content in changes.items()}}.items():
            new.writestr(name, content)
    return target


def assert_weights(found: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    expected = Model().state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def test_weights_of_an_archive(archive):
    assert is_torchscript(archive)
    assert_weights(read_torchscript(archive))
    assert list(read_torchscript(archive)) == list(torch.jit.load(str(archive)).state_dict())


def test_files_of_torch_save_are_not_torchscript(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "file.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert not is_torchscript(tmp_path / "file.pt")
    assert not is_torchscript(tmp_path / "text.pt")


def test_load_state_dict_drops_sizes_of_the_architecture(archive):
    weights = load_state_dict(archive)
    assert "input_resolution" not in weights
    assert weights["in_half"].dtype == torch.float16


def test_weights_do_not_depend_on_the_file_after_loading(archive):
    weights = read_torchscript(archive)
    assert str(archive) not in Path("/proc/self/maps").read_text()
    archive.write_bytes(b"")
    assert_weights(weights)


def test_the_program_is_not_run(archive, tmp_path):
    """A missing or invalid program is not an error: then all tensors count as weights."""
    with zipfile.ZipFile(archive) as old:
        programs = [name.split("/", 1)[1] for name in old.namelist() if name.endswith(".py")]
    broken = rewrite(archive, tmp_path / "broken.pt", dict.fromkeys(programs, b"this is no program"))
    with pytest.raises(RuntimeError):
        torch.jit.load(str(broken))
    weights = read_torchscript(broken)
    assert weights.pop("blocks.0.mask").shape == (4,)
    del weights["blocks.1.mask"]
    assert_weights(weights)


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, exec, getattr, torch.load, torch.nn.Linear, __import__])
def test_code_in_a_pickle_is_not_run(archive, tmp_path, function):
    arguments = (str(tmp_path / "ran"),) if function is os.mkdir else ()
    evil = rewrite(archive, tmp_path / "evil.pt", {"data.pkl": pickle.dumps(Evil(function, arguments), 2)})
    for read in (read_torchscript, load_state_dict):
        with pytest.raises(ValueError, match="the top level is not a module"):
            read(evil)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["collections\nOrderedDict.fromkeys", "torch\n_utils._rebuild_tensor_v2", "torch\njit.load"]
)
def test_names_with_dots_cannot_reach_attributes(archive, tmp_path, name):
    evil = rewrite(archive, tmp_path / "evil.pt", {"data.pkl": b"\x80\x02c" + name.encode() + b"\n."})
    with pytest.raises(ValueError, match="the top level is not a module"):
        read_torchscript(evil)


def test_classes_of_the_program_are_inert(archive, tmp_path):
    """Instances only store attributes, whatever their class and arguments. Their state is not interpreted."""
    data = b"\x80\x02c__torch__.builtins\nexec\n)\x81}(X\x01\x00\x00\x00aX\x04\x00\x00\x00boomub."
    assert read_torchscript(rewrite(archive, tmp_path / "box.pt", {"data.pkl": data})) == {}


class TensorPickler(pickle.Pickler):
    """Writes tensors as TorchScript does, with arbitrary sizes."""

    def persistent_id(self, obj):
        return ("storage", torch.FloatStorage, "0", "cpu", obj.numel) if isinstance(obj, Storage) else None


class Storage:
    def __init__(self, numel: int):
        self.numel = numel


def tensor_pickle(numel: int, offset: int, size: tuple, stride: tuple) -> bytes:
    stream = io.BytesIO()
    arguments = (Storage(numel), offset, size, stride, False, OrderedDict())
    TensorPickler(stream, 2).dump(Evil(torch._utils._rebuild_tensor_v2, arguments))
    tensor = stream.getvalue()[2:-1]  # without the protocol header and the final STOP
    return b"\x80\x02c__torch__\nModule\n)\x81}X\x01\x00\x00\x00t" + tensor + b"sb."


def test_a_valid_hand_written_tensor_is_read(archive, tmp_path):
    content = {"data.pkl": tensor_pickle(4, 1, (3,), (1,)), "data/0": struct.pack("<4f", 1, 2, 3, 4)}
    weights = read_torchscript(rewrite(archive, tmp_path / "tensor.pt", content))
    assert weights["t"].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("numel", "offset", "size", "stride"),
    [
        (4, 0, (5,), (1,)),  # too long
        (4, 2, (3,), (1,)),  # starts too late
        (4, 0, (2, 2), (3, 1)),  # its last row is outside
        (5, 0, (2,), (1,)),  # the storage is shorter than stated
        (4, -1, (2,), (1,)),
        (4, 0, (-2,), (1,)),
        (4, 3, (3,), (-1,)),
        (4, 0, (2,), (1, 1)),
        (4, 0, ("2",), (1,)),
    ],
)
def test_a_tensor_outside_its_storage_raises(archive, tmp_path, numel, offset, size, stride):
    content = {"data.pkl": tensor_pickle(numel, offset, size, stride), "data/0": bytes(16)}
    with pytest.raises(ValueError, match=r"tensor\.pt is damaged"):
        read_torchscript(rewrite(archive, tmp_path / "tensor.pt", content))


def test_compressed_entries(archive, tmp_path):
    assert_weights(read_torchscript(rewrite(archive, tmp_path / "small.pt", {}, zipfile.ZIP_DEFLATED)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"byteorder": b"big"}, "big-endian"),
        ({"data.pkl": b""}, "damaged"),
        ({"data.pkl": b"\x80\x02}."}, "not a module"),
        ({"data.pkl": b"\x80\x02c__torch__.A\nA\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."}, "nested too deeply"),
        (
            {"data.pkl": tensor_pickle(4, 0, (4,), (1,)).replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00?")},
            "damaged",
        ),
    ],
)
def test_damaged_archives_raise(archive, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_torchscript(rewrite(archive, tmp_path / "broken.pt", changes))


def test_a_truncated_archive_raises(archive):
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut off"):
        load_state_dict(archive)
