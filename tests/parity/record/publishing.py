"""Records from open_clip_torch 3.3.0 what it writes when a model is saved for the hub; see test_publishing.py.

    python tests/parity/record publishing

Writes tests/parity/fixtures/publishing_3.3.0.json: the text of open_clip_config.json, READMEs by model card, and what
its push_pretrained_to_hf_hub would upload as configuration.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path

import open_clip
import tiny_clip

FIXTURE = Path(__file__).parents[1] / "fixtures/publishing_3.3.0.json"
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
CARDS = [
    {},
    {"tags": "x", "license": "apache-2.0"},
    {"tags": ["a", "b"], "pipeline_tag": "feature-extraction"},
    {"details": {}},
    {
        "description": "D",
        "details": {"Dataset": "LAION", "List": ["x", "y"], "Map": {"k": 1}, "Text": "t"},
        "usage": "U",
        "comparison": "C",
        "citation": ["one", "two"],
    },
    {"citation": "one"},
]


def config_text(push: object, name: str, preprocess_cfg: dict) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tiny_clip.folder(Path(folder), preprocess_cfg=preprocess_cfg)
        model = open_clip.create_model(f"local-dir:{folder}")
        push.save_config_for_hf(model, Path(folder) / name, tiny_clip.config())
        return (Path(folder) / name).read_text(encoding="utf-8")


def pushed_config(push: object, **kwargs: object) -> dict:
    """What push_pretrained_to_hf_hub hands on, with nothing built, downloaded or uploaded."""
    found = {}
    push.push_to_hf_hub = lambda model_config, **_: found.update(model_config)
    push.create_model_from_pretrained = lambda *_, **__: (None, None)
    push.get_tokenizer = lambda *_, **__: None
    push.push_pretrained_to_hf_hub("ViT-B-32", "openai", "org/name", **kwargs)
    return found


def main() -> None:
    push = importlib.import_module("open_clip.push_to_hf_hub")
    recorded = {
        "config": config_text(push, "saved.json", PREPROCESS),
        "config_by_default": config_text(push, "saved.json", {}),
        "readmes": [[card, push.generate_readme(json.loads(json.dumps(card)), "NAME")] for card in CARDS],
        "pushed": pushed_config(push),
        "pushed_tokenizer_self": pushed_config(push, hf_tokenizer_self=True),
    }
    FIXTURE.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
