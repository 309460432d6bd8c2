"""Configuration of the NPU tests, which run on the real torch_npu with the emulated CANN: `make test-npu`.

With -m npu, a missing NPU is an error, so the tests are never skipped silently. Otherwise, without an NPU the test
files are not imported, because they import torch_npu.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from open_clip import device

HERE = Path(__file__).parent
MISSING = device.get("npu").why_missing()
os.environ.setdefault("CANN_EMULATOR_STRICT", "1")  # tests that need unsupported operations set 0


def pytest_configure(config: pytest.Config) -> None:
    if MISSING and config.option.markexpr == "npu":
        raise pytest.UsageError(f"The NPU's tests cannot run: {MISSING}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if MISSING or config.option.markexpr == "not npu" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.npu)
