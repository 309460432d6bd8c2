"""Everything in this folder runs on the real torch_npu, over the emulated CANN: `make test-npu`.

Where the NPU is asked for (-m npu) and is not there, that is an error and not a row of skipped tests. Where it is not
asked for, these files are not even imported: they use torch_npu as they go.
"""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from open_clip import device

HERE = Path(__file__).parent
MISSING = device.get("npu").why_missing()
os.environ.setdefault("CANN_EMULATOR_STRICT", "1")  # a test that needs what an NPU does not have sets 0


def pytest_configure(config: pytest.Config) -> None:
    if MISSING and config.option.markexpr == "npu":
        raise pytest.UsageError(f"The NPU's tests cannot run: {MISSING}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if MISSING or config.option.markexpr == "not npu" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.npu)
