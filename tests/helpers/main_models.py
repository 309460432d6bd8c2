"""Models of open_clip's main branch (4.2.0.dev0) that 3.3.0 lacks: facts that were recorded from the main branch."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures" / "open_clip_4"
# Facts of each model: class, parameters, context_length, image_input and GFLOPs.
PROFILES: dict[str, dict[str, Any]] = json.loads((FIXTURES / "model_profile.json").read_text(encoding="utf-8"))
REFUSED = [name for name in PROFILES if name.startswith(("CLAP-", "naflexclap_", "naflexgenlip_", "naflexgenlap_"))]
BUILT = [name for name in PROFILES if name not in REFUSED]


def state_dicts() -> dict[str, dict[str, tuple[list[int], str]]]:
    """Read names -> (shape, dtype) of the models' state dicts."""
    with lzma.open(FIXTURES / "state_dicts.json.xz") as file:
        return json.load(file)
