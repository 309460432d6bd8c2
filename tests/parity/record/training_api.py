"""Records open_clip_train 3.3.0's answers to tests/helpers/training_api_cases.py.

    python tests/parity/record training_api

It needs a numpy before 2.4: with a later one its `zero_shot.accuracy` fails.
Writes tests/parity/fixtures/training_api_answers.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import training_api_cases

target = Path(__file__).parents[1] / "fixtures/training_api_answers.json"
target.write_text(json.dumps(training_api_cases.answers(), indent=1) + "\n", encoding="utf-8")
