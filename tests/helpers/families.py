"""One model of each family of open_clip, small enough for a training step in a test, on any device.

Weights and inputs are from a formula (tower_cases), so they are equal on all devices. There is no dropout.
"""

from __future__ import annotations

from typing import Any

import torch

import open_clip
import tower_cases
from open_clip.checkpoint import fit as checkpoint
from versions import is_older, require_timm_model

# By name of the architecture: changes of vision_cfg (a smaller trunk of the same kind), and arguments of create_model
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "RN50": ({"layers": [1, 1, 1, 1]}, {"force_image_size": 64}),
    "convnext_tiny": ({"timm_model_name": "convnext_atto"}, {"force_image_size": 64}),
    "EVA02-B-16": ({"timm_model_name": "eva02_tiny_patch14_224", "timm_proj": "linear"}, {"force_image_size": 28}),
    "ViT-B-32-SigLIP2-256": ({}, {"force_image_size": 64}),
    "MobileCLIP2-S0": ({}, {"force_image_size": 64}),
    "ViTamin-S": ({}, {"force_image_size": 64}),
    "PE-Core-T-16-384": ({}, {"force_image_size": 48}),
    "swin_base_patch4_window7_224": ({"timm_model_name": "swin_tiny_patch4_window7_224"}, {"force_image_size": 64}),
    "vit_medium_patch16_gap_256": ({}, {"force_image_size": 32}),
    "vit_relpos_medium_patch16_cls_224": ({"timm_model_name": "test_vit_relpos"}, {"force_image_size": 32}),
}
BATCH = 4


def create(name: str) -> torch.nn.Module:
    """Build a model of FAMILIES on the CPU. If its text tower is not special, it gets a tiny one.

    The test is skipped if the installed timm does not have the model.
    """
    cfg = open_clip.get_model_config(name)
    assert cfg is not None
    changes, options = FAMILIES[name]
    vision_cfg, text_cfg = cfg["vision_cfg"] | changes, cfg["text_cfg"]
    if "timm_model_name" in vision_cfg:
        require_timm_model(vision_cfg["timm_model_name"])
        vision_cfg["timm_drop_path"] = 0.0
    if "timm_model_name" in vision_cfg or isinstance(vision_cfg.get("layers"), list):
        text_cfg = tower_cases.TEXT
    # timm before 1.0.23 cannot fill the buffers of a model that was built on the meta device.
    device = "cpu" if is_older("timm", "1.0.23") else "meta"
    model = open_clip.create_model(
        name, device=device, vision_cfg=vision_cfg, text_cfg=text_cfg, output_dict=True, **options
    )
    checkpoint.put_weights(model, tower_cases.weights(model.state_dict()))
    return model


def batch(model: Any, step: int) -> dict[str, torch.Tensor]:
    """Return images and texts for a training step."""
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    texts = (torch.arange(BATCH * model.context_length) * (7 + step)).remainder(60).reshape(BATCH, -1) + 1
    texts[:, -1] = 63  # the end of a text has the highest id
    return {"image": tower_cases.formula(f"image {step}", (BATCH, 3, height, width), scale=2.0), "text": texts}
