"""A small seeded fuzz of all readers: benchmarks/faults/damaged_files.py has the large one."""

from __future__ import annotations

import sys

import pytest

import processes

sys.path.insert(0, str(processes.ROOT / "benchmarks/faults"))

import damaged_files


@pytest.mark.parametrize("name", damaged_files.CHECKPOINTS + damaged_files.CONFIGS)
def test_a_damaged_file_is_read_or_named_in_an_error(name):
    assert damaged_files.run_batch(damaged_files.cases(25, (name,))) == []


@pytest.mark.parametrize("name", damaged_files.CHECKPOINTS)
def test_an_end_in_the_middle_of_tensors_is_an_error(name, tmp_path):
    """At every place: never a tensor of zeros."""
    from open_clip.checkpoint import load_state_dict

    content = damaged_files.write(name)
    for end in range(0, len(content) - 1, max(len(content) // 60, 1)):
        (tmp_path / name).write_bytes(content[:end])
        with pytest.raises(ValueError, match=name):
            load_state_dict(tmp_path / name)
