"""A CLIP with about 10,000 parameters, as a folder for `local-dir:`, so that tests do not change the registry."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 64, "layers": 1, "width": 32, "heads": 2},
}


def config(vision: dict | None = None, text: dict | None = None, **top: object) -> dict:
    """Return a copy of CONFIG with keys added to its sections."""
    cfg = {**copy.deepcopy(CONFIG), **top}
    cfg["vision_cfg"].update(vision or {})
    cfg["text_cfg"].update(text or {})
    return cfg


def folder(path: Path, preprocess_cfg: dict | None = None, **changes: object) -> str:
    """Write the configuration into a folder and return the model's name."""
    return write_folder(path, config(**changes), preprocess_cfg)


def write_folder(path: Path, model_cfg: dict, preprocess_cfg: dict | None = None) -> str:
    """Write any configuration into a folder and return the model's name."""
    path.mkdir(parents=True, exist_ok=True)
    whole = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg or {}}
    (path / "open_clip_config.json").write_text(json.dumps(whole), encoding="utf-8")
    return f"local-dir:{path}"


def inputs(image_size: int = 32, context_length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fixed images [2, 3, image_size, image_size] and ids [3, context_length]."""
    count = 2 * 3 * image_size**2
    images = torch.linspace(-1, 1, count).sin().mul(3).cos().reshape(2, 3, image_size, image_size)
    texts = torch.arange(3 * context_length).mul(7).remainder(60).reshape(3, context_length)
    texts[:, -1] = 63  # the end of a text has the highest id
    return images, texts
