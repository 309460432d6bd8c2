"""A small fuzz test of all readers with a fixed seed. benchmarks/faults/damaged_files.py is the large one."""

from __future__ import annotations

import sys

import pytest

import processes

sys.path.insert(0, str(processes.ROOT / "benchmarks/faults"))

import damaged_files


@pytest.mark.parametrize("name", damaged_files.CHECKPOINTS + damaged_files.CONFIGS)
def test_a_damaged_file_is_read_or_raises_an_error_with_its_name(name):
    assert damaged_files.run_batch(damaged_files.cases(25, (name,))) == []


@pytest.mark.parametrize("name", damaged_files.CHECKPOINTS)
def test_a_file_truncated_within_tensors_raises(name, tmp_path):
    """At every position: no tensor is filled with zeros."""
    from open_clip.checkpoint.files import load_state_dict

    content = damaged_files.write(name)
    for end in range(0, len(content) - 1, max(len(content) // 60, 1)):
        (tmp_path / name).write_bytes(content[:end])
        with pytest.raises(ValueError, match=name):
            load_state_dict(tmp_path / name)
