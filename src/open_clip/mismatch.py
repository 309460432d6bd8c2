"""What a checkpoint and a model that do not fit have different, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .config import get_model_config, list_models

Facts = dict[str, Any]

# (pattern of a parameter's name, what tower it tells of, what kind that is)
_KINDS = (
    (r"visual\.trunk\.", "image tower", "timm's"),
    (r"visual\.layer1\.", "image tower", "a ResNet"),
    (r"visual\.class_embedding$", "image tower", "a native ViT"),
    (r"(text\.)?token_embedding\.", "text tower", "native"),
    (r"(text\.)?transformer\.(?!resblocks\.)", "text tower", "Hugging Face's"),
)
_DECODER = "text_decoder."
_BLOCKS = r"transformer\.resblocks\.(\d+)\."


def some(names: Iterable[str], limit: int = 4) -> str:
    """A list in words that fits a line: the first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def facts_of_weights(state_dict: Mapping[str, torch.Tensor]) -> Facts:
    """Kinds and sizes of the towers, from a state dict in the layout of CLIP or CustomTextCLIP."""
    facts: Facts = {}
    for pattern, tower, kind in _KINDS:
        if any(re.match(pattern, key) for key in state_dict):
            facts[tower] = kind
    shapes = {key.removeprefix("text."): tuple(value.shape) for key, value in state_dict.items()}
    if "token_embedding.weight" in shapes:
        facts["vocabulary"], facts["text width"] = shapes["token_embedding.weight"]
        facts["text layers"] = _count(shapes, _BLOCKS)
    if facts.get("image tower") == "a native ViT" and "visual.conv1.weight" in shapes:
        facts["image width"], _, _, facts["patch size"] = shapes["visual.conv1.weight"]
        facts["image layers"] = _count(shapes, rf"visual\.{_BLOCKS}")
    if any(key.startswith(_DECODER) for key in state_dict):
        facts["captioning decoder"] = "there"
    return facts


def _count(names: Iterable[str], pattern: str) -> int:
    return max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1) + 1


def facts_of_config(cfg: Mapping[str, Any]) -> Facts:
    """The same from a model's configuration, as far as it tells; defaults are CLIPVisionCfg's and CLIPTextCfg's."""
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    facts: Facts = {}
    if vision.get("timm_model_name"):
        facts["image tower"] = "timm's"
    elif isinstance(vision.get("layers"), (list, tuple)):
        facts["image tower"] = "a ResNet"
    else:
        sizes = {"width": 768, "layers": 12, "patch_size": 16} | dict(vision)
        facts |= {"image tower": "a native ViT", "image width": sizes["width"]}
        facts |= {"patch size": sizes["patch_size"], "image layers": sizes["layers"]}
    if text.get("hf_model_name"):
        facts["text tower"] = "Hugging Face's"
    else:
        sizes = {"width": 512, "layers": 12, "vocab_size": 49408} | dict(text)
        facts |= {"text tower": "native", "text width": sizes["width"]}
        facts |= {"vocabulary": sizes["vocab_size"], "text layers": sizes["layers"]}
    if "multimodal_cfg" in cfg:
        facts["captioning decoder"] = "there"
    return facts


def explain(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """How the towers of a checkpoint differ from a model's, and which architectures have them; "" for not at all."""
    theirs, ours = facts_of_weights(state_dict), facts_of_weights(expected)
    if not theirs.keys() & {"image tower", "text tower"}:
        return ""
    names = [name for name in [*theirs, *(name for name in ours if name not in theirs)] if _tells(name, theirs, ours)]
    differences = [
        f"{name} {theirs.get(name, 'not there')} (the model's: {ours.get(name, 'not there')})"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]
    if not differences:
        return ""
    return f"Its towers are others: {', '.join(differences)}. {_architectures(theirs)}"


def _tells(name: str, theirs: Facts, ours: Facts) -> bool:
    """Whether a fact is one of both, or of a kind; the width of a tower that only one has is none."""
    return name in ("image tower", "text tower", "captioning decoder") or (name in theirs and name in ours)


def _architectures(facts: Facts) -> str:
    """Advice on which model has these towers."""
    configs = {name: facts_of_config(get_model_config(name) or {}) for name in list_models()}
    fitting = [name for name, cfg in configs.items() if cfg == facts]
    if not fitting:
        return "Build the model with the configuration that it was trained with."
    return f"Of the known architectures, these have such towers: {some(fitting, limit=6)}."
