"""Sizes of OpenAI's models, inferred from the shapes of their weights."""

from __future__ import annotations

import math

import torch

from ..config import CLIPTextCfg, CLIPVisionCfg
from ..constants import RESNET_STRIDE


def infer_vision_cfg(state_dict: dict[str, torch.Tensor]) -> CLIPVisionCfg:
    """Infer the configuration of the image tower."""
    if "visual.proj" in state_dict:
        width, _, patch_size, _ = state_dict["visual.conv1.weight"].shape
        side = math.isqrt(state_dict["visual.positional_embedding"].shape[0] - 1)
        layers = _count_blocks(state_dict, "visual.transformer.resblocks.")
        return CLIPVisionCfg(layers=layers, width=width, patch_size=patch_size, image_size=patch_size * side)
    side = math.isqrt(state_dict["visual.attnpool.positional_embedding"].shape[0] - 1)
    first, second, third, fourth = (_count_blocks(state_dict, f"visual.layer{number}.") for number in (1, 2, 3, 4))
    width = state_dict["visual.layer1.0.conv1.weight"].shape[0]
    return CLIPVisionCfg(layers=(first, second, third, fourth), width=width, image_size=RESNET_STRIDE * side)


def infer_text_cfg(state_dict: dict[str, torch.Tensor]) -> CLIPTextCfg:
    """Infer the configuration of the text tower."""
    context_length, width = state_dict["positional_embedding"].shape
    return CLIPTextCfg(
        context_length=context_length,
        vocab_size=state_dict["token_embedding.weight"].shape[0],
        width=width,
        heads=width // 64,
        layers=_count_blocks(state_dict, "transformer.resblocks."),
    )


def _count_blocks(state_dict: dict[str, torch.Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)})
