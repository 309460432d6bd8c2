"""Every architecture builds, and is open_clip_torch 3.3.0's: class, and keys, shapes and dtypes of the state dict.

The ten with a text tower of Hugging Face's, which 3.3.0 cannot build without a network, are in test_hf_towers.py, and
those of open_clip's main branch in test_open_clip_4_models.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import main_models
import open_clip

FIXTURE = Path(__file__).parent / "fixtures/architectures_3.3.0.json"
RECORDED = json.loads(FIXTURE.read_text(encoding="utf-8"))
OF_3_3_0 = [name for name in open_clip.list_models() if name not in main_models.BUILT]


def build(name: str) -> torch.nn.Module:
    return open_clip.create_model(name, device="meta", load_weights=False)


@pytest.mark.parametrize("name", RECORDED)
def test_state_dict_has_keys_shapes_dtypes_and_order_of_open_clip(name: str) -> None:
    model = build(name)
    layout = [(key, list(value.shape), str(value.dtype)) for key, value in model.state_dict().items()]
    digest = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
    assert {"class": type(model).__name__, "sha256": digest} == RECORDED[name]


@pytest.mark.parametrize("name", sorted(set(OF_3_3_0) - set(RECORDED)))
def test_what_open_clip_builds_with_a_network_only_is_built_without(name: str) -> None:
    model = build(name)
    assert "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]
    assert all(value.is_meta for value in model.state_dict().values())


def test_there_are_144() -> None:
    assert len(OF_3_3_0) == 144
    assert len(RECORDED) == 134
