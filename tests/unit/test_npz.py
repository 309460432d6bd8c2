"""Loading of NumPy archives, and errors for damaged or other files."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from open_clip.formats.npz import is_npz, read_npz

DTYPES = ["float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays(tmp_path, dtype, save):
    """Arrays of any shape and memory order, and names with slashes."""
    plain = np.arange(24).reshape(2, 3, 4).astype(dtype)
    arrays = {"a/b/kernel": plain, "c": np.asfortranarray(plain), "scalar": plain[0, 0, 1], "empty": plain[:0]}
    save(tmp_path / "x.npz", **arrays)
    assert is_npz(tmp_path / "x.npz")
    found = read_npz(tmp_path / "x.npz")
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        assert found[name].shape == value.shape
        np.testing.assert_array_equal(found[name].clone().numpy(), value)


def test_arrays_do_not_depend_on_the_file_after_loading(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, weight=np.ones((100, 100), np.float32))
    found = read_npz(path)
    assert str(path) not in Path("/proc/self/maps").read_text()
    path.write_bytes(b"")
    assert found["weight"].sum() == 10_000


def test_bfloat16(tmp_path):
    values = torch.tensor([1.5, -2.0, 3e38], dtype=torch.bfloat16)
    np.savez(tmp_path / "x.npz", a=values.view(torch.int16).numpy().view("V2"))
    assert torch.equal(read_npz(tmp_path / "x.npz")["a"].clone(), values)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.mkdir, (self.marker,))


def test_objects_raise_and_are_not_unpickled(tmp_path):
    objects = np.array([Evil(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "x.npz", a=objects)
    with pytest.raises(ValueError, match="has the dtype object, which is not supported"):
        read_npz(tmp_path / "x.npz")
    assert not (tmp_path / "ran").exists()
    assert pickle.dumps(objects)  # the objects can be pickled, so the test is meaningful


@pytest.mark.parametrize("array", [np.array(["text"]), np.ones(2, ">f4"), np.ones(2, "complex64")])
def test_unsupported_dtypes_raise(tmp_path, array):
    np.savez(tmp_path / "x.npz", a=array)
    with pytest.raises(ValueError, match="which is not supported"):
        read_npz(tmp_path / "x.npz")


def test_other_files_raise(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    assert not is_npz(tmp_path / "x.npz")
    assert not is_npz(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"interrupted\?"):
        read_npz(tmp_path / "x.npz")


def test_an_array_shorter_than_its_header_says_raises(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.ones(1000, np.float32))
    path.write_bytes(path.read_bytes().replace(b"(1000,)", b"(9000,)"))
    with pytest.raises(ValueError, match=r"x\.npz is damaged"):
        read_npz(path)
