"""The registry of published weights, and their download."""

from __future__ import annotations

import urllib.request  # noqa: F401  `download` uses it from here, where tests of programs replace it

from .. import aliases
from .checksum import is_unchanging
from .download import download_pretrained, download_pretrained_from_url
from .hub import download_pretrained_from_hf, has_hf_hub, hub_errors, shorten_error
from .registry import (
    get_pretrained_cfg,
    get_pretrained_url,
    is_pretrained_cfg,
    list_pretrained,
    list_pretrained_models_by_tag,
    list_pretrained_tags_by_model,
    nearest_tags,
)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

__all__ = [
    "download_pretrained",
    "download_pretrained_from_hf",
    "download_pretrained_from_url",
    "get_pretrained_cfg",
    "get_pretrained_url",
    "has_hf_hub",
    "hub_errors",
    "is_pretrained_cfg",
    "is_unchanging",
    "list_pretrained",
    "list_pretrained_models_by_tag",
    "list_pretrained_tags_by_model",
    "nearest_tags",
    "shorten_error",
]
