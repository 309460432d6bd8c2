"""Models of open_clip's main branch (4.2.0.dev0) that 3.3.0 lacks: facts that were recorded from the main branch."""

from __future__ import annotations

import dataclasses
import json
import lzma
from pathlib import Path
from typing import Any

from open_clip import config

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures" / "open_clip_4"
# Facts of each model: class, parameters, context_length, image_input and GFLOPs.
PROFILES: dict[str, dict[str, Any]] = json.loads((FIXTURES / "model_profile.json").read_text(encoding="utf-8"))
REFUSED = [name for name in PROFILES if name.startswith(("CLAP-", "naflexclap_", "naflexgenlip_", "naflexgenlap_"))]
BUILT = [name for name in PROFILES if name not in REFUSED]


def state_dicts() -> dict[str, dict[str, tuple[list[int], str]]]:
    """Read names -> (shape, dtype) of the models' state dicts."""
    with lzma.open(FIXTURES / "state_dicts.json.xz") as file:
        return json.load(file)


def fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def is_known(name: str) -> bool:
    """Whether all fields of a model's configuration exist."""
    cfg: Any = config.get_model_config(name)
    return cfg["vision_cfg"].keys() <= fields(config.CLIPVisionCfg) and cfg["text_cfg"].keys() <= fields(
        config.CLIPTextCfg
    )


HAS_NAFLEX = "timm_model_kwargs" in fields(config.CLIPVisionCfg)
READY = [name for name in BUILT if is_known(name)]
