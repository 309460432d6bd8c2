"""Comparison of state dicts, and explanations of why a checkpoint does not fit a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..config import get_model_config, is_naflex_cfg, list_models

Facts = dict[str, Any]

_NAFLEX = "a NaFlex tower"
# (pattern of parameter names, tower, kind of that tower). The last one that matches counts.
_KINDS = (
    (r"visual\.trunk\.", "image tower", "timm's"),
    (r"visual\.trunk\.embeds\.", "image tower", _NAFLEX),
    (r"visual\.layer1\.", "image tower", "a ResNet"),
    (r"visual\.class_embedding$", "image tower", "a native ViT"),
    (r"(text\.)?token_embedding\.", "text tower", "native"),
    (r"text\.blocks\.", "text tower", "modern"),
    (r"(text\.)?transformer\.(?!resblocks\.)", "text tower", "Hugging Face's"),
)
_DECODER = "text_decoder."
_BLOCKS = r"transformer\.resblocks\.(\d+)\."
_MODERN_BLOCKS = r"blocks\.(\d+)\."


def join_some(names: Iterable[str], limit: int = 4) -> str:
    """Join the first `limit` names, followed by the number of the others, so that the result fits a line."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """How the tensors of a state dict differ from those that a model expects. It is false if they do not differ.

    Attributes:
        missing: names that the model expects and the state dict lacks.
        unexpected: names that only the state dict has.
        wrong_shapes: descriptions of tensors with another shape: "NAME is [2, 3] instead of [2, 4]".
    """

    missing: list[str]
    unexpected: list[str]
    wrong_shapes: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong_shapes)

    def __str__(self) -> str:
        """Format the differences as sentences of bounded length."""
        found = (("missing", self.missing), ("unexpected", self.unexpected), ("of a wrong shape", self.wrong_shapes))
        return " ".join(f"{len(names)} {what}: {join_some(names)}." for what, names in found if names)


def compare(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> Mismatch:
    """Compare the names and shapes of two state dicts."""
    return Mismatch(
        missing=[name for name in expected if name not in given],
        unexpected=[name for name in given if name not in expected],
        wrong_shapes=[
            f"{name} is {list(given[name].shape)} instead of {list(value.shape)}"
            for name, value in expected.items()
            if name in given and given[name].shape != value.shape
        ],
    )


def facts_of_weights(state_dict: Mapping[str, torch.Tensor]) -> Facts:
    """Find kinds and sizes of the towers from a state dict in the layout of CLIP or CustomTextCLIP."""
    facts: Facts = {}
    for pattern, tower, kind in _KINDS:
        if any(re.match(pattern, key) for key in state_dict):
            facts[tower] = kind
    shapes = {key.removeprefix("text."): tuple(value.shape) for key, value in state_dict.items()}
    if "token_embedding.weight" in shapes:
        facts["vocabulary"], facts["text width"] = shapes["token_embedding.weight"]
        facts["text layers"] = max(_count(shapes, _BLOCKS), _count(shapes, _MODERN_BLOCKS))
    if facts.get("image tower") == "a native ViT" and "visual.conv1.weight" in shapes:
        facts["image width"], _, _, facts["patch size"] = shapes["visual.conv1.weight"]
        facts["image layers"] = _count(shapes, rf"visual\.{_BLOCKS}")
    if any(key.startswith(_DECODER) for key in state_dict):
        facts["captioning decoder"] = "present"
    return facts


def _count(names: Iterable[str], pattern: str) -> int:
    return max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1) + 1


def facts_of_config(cfg: Mapping[str, Any]) -> Facts:
    """Find the same facts from a model's configuration, with the defaults of CLIPVisionCfg and CLIPTextCfg."""
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    facts: Facts = {}
    if vision.get("timm_model_name"):
        is_naflex = is_naflex_cfg(vision["timm_model_name"], vision.get("timm_model_kwargs"))
        facts["image tower"] = _NAFLEX if is_naflex else "timm's"
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
        kind = "modern" if text.get("text_arch") == "modern" else "native"
        facts |= {"text tower": kind, "text width": sizes["width"]}
        facts |= {"vocabulary": sizes["vocab_size"], "text layers": sizes["layers"]}
    if "multimodal_cfg" in cfg:
        facts["captioning decoder"] = "present"
    return facts


def explain_mismatch(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """Explain how the towers of a checkpoint differ from a model's, and which architectures have such towers.

    Returns:
        The explanation; "" if no difference was found.
    """
    theirs, ours = facts_of_weights(state_dict), facts_of_weights(expected)
    if not theirs.keys() & {"image tower", "text tower"}:
        return ""
    names = [name for name in dict.fromkeys([*theirs, *ours]) if _is_comparable(name, theirs, ours)]
    differences = [
        f"{name} {theirs.get(name, 'absent')} (the model's: {ours.get(name, 'absent')})"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]
    if not differences:
        return ""
    fixes = [explain_naflex(state_dict, expected), _suggest_architectures(theirs)]
    fix = " ".join(filter(None, fixes)) or "Build the model with the configuration that it was trained with."
    return f"Its towers differ: {', '.join(differences)}. {fix}"


def explain_naflex(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """Say how to build the model for the weights of a converted tower; "" if both or none have a NaFlex tower."""
    if facts_of_weights(state_dict).get("image tower") != _NAFLEX:
        return ""
    if facts_of_weights(expected).get("image tower") not in ("a native ViT", "timm's"):
        return ""
    return (
        "If its NaFlex tower is a converted ViT, as after --use-naflex, build the model with force_naflex_vision=True "
        "(--force-naflex-vision)."
    )


def _is_comparable(name: str, theirs: Facts, ours: Facts) -> bool:
    """Whether both have the fact, or its absence is a difference: the width of a missing tower is not."""
    return name in ("image tower", "text tower", "captioning decoder") or (name in theirs and name in ours)


def _suggest_architectures(facts: Facts) -> str:
    configs = {name: facts_of_config(get_model_config(name) or {}) for name in list_models()}
    fitting = [name for name, cfg in configs.items() if cfg == facts]
    return f"Of the known architectures, these have such towers: {join_some(fitting, limit=6)}." if fitting else ""
