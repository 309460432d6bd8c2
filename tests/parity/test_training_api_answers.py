"""The training package answers scripts as open_clip_train 3.3.0 does (recorded by record/training_api.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import training_api_cases

RECORDED = json.loads((Path(__file__).parent / "fixtures/training_api_answers.json").read_text(encoding="utf-8"))


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{where}, {key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for index, value in enumerate(theirs):
            assert_same(ours[index], value, f"{where}, {index}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-6), where
    else:
        assert ours == theirs, where


def test_all_cases_are_recorded():
    assert list(training_api_cases.CASES) == list(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_answers_are_open_clips(name):
    assert_same(json.loads(json.dumps(training_api_cases.CASES[name]())), RECORDED[name], name)
