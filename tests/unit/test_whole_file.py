"""Atomic replacement of files."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from open_clip.formats.whole_file import replacing, write_text


def test_the_new_file_appears_atomically(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_target_of_a_link_is_replaced(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "other/x")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "other/x").read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_permissions_are_the_default_ones(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "x") as temporary:
            save_file({"a": torch.ones(1)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask
