"""`make demo`, shortened: a few epochs already tell digits apart that the model never saw."""

import re
import sys
from pathlib import Path

import pytest

import processes


@pytest.mark.slow
@pytest.mark.parametrize("data", ["csv", "shards"])
def test_demo_learns_digits(data: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    command = [sys.executable, processes.ROOT / "demo/digits.py", "--output", tmp_path, "--data", data, "--epochs", "3"]
    printed = processes.run(command)
    (accuracy,) = re.findall(r"Zero-shot accuracy on 360 digits \(held out\): ([\d.]+) %", printed)
    assert float(accuracy) > 30  # chance is 10
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "logs/digits/tensorboard").glob("events.*"))
    assert (tmp_path / "logs/digits/checkpoints/epoch_3.pt").exists()
