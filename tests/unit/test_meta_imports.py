"""Models on the meta device, in a process that has not imported the libraries of their towers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import hf_cases
import processes
import tiny_clip

SCRIPT = """
import sys, torch, open_clip
assert sys.argv[2] not in sys.modules
model = open_clip.create_model(sys.argv[1], device="meta")
assert {p.device.type for p in model.parameters()} == {"meta"}
assert sys.argv[2] in sys.modules
"""

COMPILER = """
import sys, torch
from open_clip.utils import import_compiler
import_compiler()
assert "torch._dynamo" not in sys.modules, "without a mode, there is nothing to do"
with torch.device("meta"), torch.overrides.BaseTorchFunctionMode():
    before = [torch._C._get_function_stack_at(i) for i in range(2)]
    import_compiler()
    assert "torch._dynamo" in sys.modules
    assert [torch._C._get_function_stack_at(i) for i in range(2)] == before
    assert torch.empty(1).is_meta
"""


def test_modes_are_active_again_after_the_compiler_is_imported() -> None:
    processes.run([sys.executable, "-c", COMPILER])


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_library_of_a_tower_is_imported_while_the_meta_device_is_active(library: str, tmp_path: Path) -> None:
    """torch 2.6 cannot import its compiler then, which both libraries import."""
    if library == "timm":
        name = tiny_clip.folder(tmp_path, vision={"timm_model_name": "test_vit", "image_size": 160})
    else:
        name = hf_cases.write_clip(tmp_path, "bert")
    processes.run([sys.executable, "-c", SCRIPT, name, library])
