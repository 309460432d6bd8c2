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
model = open_clip.create_model(sys.argv[1], device="meta")
assert {p.device.type for p in model.parameters()} == {"meta"}
assert sys.argv[2] in sys.modules
"""


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_library_of_a_tower_is_imported_while_the_meta_device_is_active(library: str, tmp_path: Path) -> None:
    """torch 2.6 cannot import its compiler then, which both libraries import."""
    if library == "timm":
        name = tiny_clip.folder(tmp_path, vision={"timm_model_name": "test_vit", "image_size": 160})
    else:
        name = hf_cases.write_clip(tmp_path, "bert")
    processes.run([sys.executable, "-c", SCRIPT, name, library])
