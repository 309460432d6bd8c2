"""CoCa against open_clip_torch 3.3.0's recorded answers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_native_models import assert_same

import coca_cases
from open_clip import coca_model

FIXTURES = Path(__file__).parent / "fixtures"
STATE_DICTS = json.loads((FIXTURES / "coca_state_dicts.json").read_text())
CAPTIONS = json.loads((FIXTURES / "coca_captions.json").read_text())
INIT = json.loads((FIXTURES / "coca_init.json").read_text())


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    return torch.load(FIXTURES / "coca_features.pt", weights_only=True)


def layout(model: torch.nn.Module) -> str:
    found = [(key, list(value.shape), str(value.dtype)) for key, value in model.state_dict().items()]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dict_has_keys_shapes_dtypes_and_order_of_open_clip(name: str) -> None:
    assert layout(coca_cases.build(coca_model, name)) == STATE_DICTS[name]


@pytest.mark.parametrize("case", coca_cases.CASES)
def test_outputs_are_open_clips(case: str, answers: dict[str, Any]) -> None:
    assert_same(coca_cases.answers(coca_cases.filled(coca_model, case), case), answers[case], case)


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_are_open_clips(name: str) -> None:
    model = coca_cases.filled(coca_model, coca_cases.CAPTIONS[name][0])
    assert coca_cases.caption(model, name, sum_logits=True) == CAPTIONS[name]


def test_a_seed_gives_open_clips_initial_towers() -> None:
    """But not its decoder, whose last projection is left uninitialised there."""
    torch.manual_seed(0)
    ours = coca_cases.build(coca_model).state_dict()
    assert [key for key in ours if "text_decoder" not in key] == list(INIT)
    for name, first in INIT.items():
        assert ours[name].flatten()[:3].tolist() == pytest.approx(first, abs=1e-6), name
