"""The registry of published weights.

It is `pretrained.json`: model -> tag -> {url, hf_hub, mean, std, interpolation, resize_mode[, quick_gelu]}.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from ..config import closest


@functools.lru_cache(maxsize=1)
def read_registry() -> dict[str, dict[str, dict[str, Any]]]:
    """Read the registry once per process: entries by model and tag."""
    table = json.loads((Path(__file__).parents[1] / "pretrained.json").read_text(encoding="utf-8"))
    for tags in table.values():
        for cfg in tags.values():
            cfg["mean"], cfg["std"] = tuple(cfg["mean"]), tuple(cfg["std"])
    return table


def _clean_tag(tag: str) -> str:
    """Normalize a tag for comparison: lower case, `-` becomes `_`."""
    return tag.lower().replace("-", "_")


def list_pretrained(as_str: bool = False) -> list[Any]:
    """List all (model, tag) pairs, as tuples or, with `as_str`, as strings `"model:tag"`."""
    pairs = [(model, tag) for model, tags in read_registry().items() for tag in tags]
    return [":".join(pair) for pair in pairs] if as_str else pairs


def list_pretrained_models_by_tag(tag: str) -> list[str]:
    """List the models that have weights with this tag."""
    tag = _clean_tag(tag)
    return [model for model, tags in read_registry().items() if tag in map(_clean_tag, tags)]


def list_pretrained_tags_by_model(model: str) -> list[str]:
    """List the tags of a model's weights."""
    return list(read_registry().get(model, ()))


def get_pretrained_cfg(model: str, tag: str) -> dict[str, Any]:
    """Return a copy of the registry entry of this model and tag, or an empty dict."""
    tag = _clean_tag(tag)
    for name, cfg in read_registry().get(model, {}).items():
        if _clean_tag(name) == tag:
            return dict(cfg)
    return {}


def is_pretrained_cfg(model: str, tag: str) -> bool:
    """Whether the registry has weights of this model with this tag."""
    return bool(get_pretrained_cfg(model, tag))


def get_pretrained_url(model: str, tag: str) -> str:
    """Return the URL of the weights, or "" if there is none (many are on the Hugging Face Hub only)."""
    return get_pretrained_cfg(model, tag).get("url", "")


def nearest_tags(model: str, tag: str, limit: int = 5) -> list[str]:
    """List the model's tags, most similar to `tag` first, for messages about an unknown tag."""
    tags = {_clean_tag(name): name for name in list_pretrained_tags_by_model(model)}
    close = closest(_clean_tag(tag), tags, n=limit, cutoff=0.3)
    return [tags[name] for name in [*close, *(name for name in tags if name not in close)][:limit]]
