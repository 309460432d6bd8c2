"""One model of each family of open_clip, small enough for a training step in a test, on any device.

Weights and inputs are from a formula (tower_cases), so they are equal on all devices. There is no dropout.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

import open_clip
import tower_cases
from open_clip.checkpoint import fit as checkpoint
from open_clip.hf_model import HFTextEncoder
from open_clip.modern_text import ModernTextTransformer
from open_clip.naflex import NaFlexTower
from training.unpadding import PaddingOptions, Unpadding
from versions import is_older, require_timm_model

PAD, BOS, EOS = 61, 62, 63
LENGTHS = (24, 15, 9, 2)  # of the texts of a batch, if they have padding
GRIDS = ((4, 4), (2, 7), (1, 3), (5, 2))  # of the images of a batch, if they are of any shape
PATCH = 4

_VIT = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
_COCA_VIT = {**_VIT, "attn_pooler_heads": 2}
_IDS = {"vocab_size": 64, "context_length": LENGTHS[0], "pad_id": PAD, "bos_id": BOS, "eos_id": EOS}
_MODERN = {**_IDS, "width": 32, "heads": 2, "layers": 2}
_NAFLEX = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": PATCH, "pos_embed_grid_size": [5, 5]}
_MODERNBERT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24,
    "pad_token_id": PAD, "bos_token_id": BOS, "cls_token_id": BOS, "eos_token_id": EOS, "sep_token_id": EOS,
    "local_attention": 8, "max_position_embeddings": 256,
}  # fmt: skip
_ROPE = {"pos_embed": "none", "rope_type": "axial", "pre_norm": True, "reg_tokens": 2}
_DECODER = {"context_length": LENGTHS[0], "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def _naflex(**options: Any) -> dict[str, Any]:
    """Return changes of vision_cfg for a small NaFlex tower."""
    return {"image_size": 20, "image_seq_len": 25, "timm_model_kwargs": {**_NAFLEX, **options}}


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
    "naflex_ViT-B-32": (_naflex(), {}),
    "naflex_ViT-B-16": (_naflex(**_ROPE), {}),  # rotary positions and registers, as no bundled architecture has them
    "ViT-B-16-SigLIP2-naflex": (_naflex(), {"embed_dim": 32}),
    "moderntext-ViT-B-32-256": (_VIT, {"force_image_size": 32}),
    "moderntext-naflex_ViT-B-32": (_naflex(), {}),
    "gte-modernbert-base-ViT-B-32-256": (_VIT, {"force_image_size": 32}),
    "coca_ViT-B-32": (_COCA_VIT, {"force_image_size": 32, "embed_dim": 32, "multimodal_cfg": _DECODER}),
}
# By name: changes of text_cfg. Other families with an image tower of timm, or a ResNet, get a tiny text tower.
TEXTS: dict[str, dict[str, Any]] = {
    "moderntext-ViT-B-32-256": {**_MODERN, "value_residual": True, "reg_tokens": 1},
    "moderntext-naflex_ViT-B-32": _MODERN,
    "gte-modernbert-base-ViT-B-32-256": {**_IDS, "hf_model_config": _MODERNBERT},
    "coca_ViT-B-32": {**_MODERN, "text_arch": "modern", "pool_type": "eos", "embed_cls": False},
}
PACKED = [name for name in FAMILIES if "naflex" in name or name.startswith("moderntext")]
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
    if name in TEXTS:
        text_cfg |= TEXTS[name]
    elif "timm_model_name" in vision_cfg or isinstance(vision_cfg.get("layers"), list):
        text_cfg = tower_cases.TEXT
    # timm before 1.0.23 cannot fill the buffers of a model that was built on the meta device.
    device = "cpu" if is_older("timm", "1.0.23") else "meta"
    model = open_clip.create_model(
        name,
        device=device,
        vision_cfg=vision_cfg,
        text_cfg=text_cfg,
        pretrained_text=False,
        output_dict=True,
        **copy.deepcopy(options),
    )
    checkpoint.put_weights(model, tower_cases.weights(model.state_dict()))
    return model


def batch(model: Any, step: int) -> dict[str, Any]:
    """Return images and texts for a training step. Images of any shape are patches, padded as the texts are."""
    return {"image": _images(model, step), "text": _texts(model, step)}


def packed(model: Any, step: int) -> dict[str, Any]:
    """Return the same batch without padding, as training makes it with --packing on."""
    return Unpadding([model], torch.device("cpu"), PaddingOptions(packing="on"))(batch(model, step))


def _images(model: Any, step: int) -> Any:
    if isinstance(model.visual, NaFlexTower):
        return _patches(step)
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return tower_cases.formula(f"image {step}", (BATCH, 3, height, width), scale=2.0)


def _patches(step: int) -> dict[str, torch.Tensor]:
    places = max(rows * columns for rows, columns in GRIDS)
    coord = torch.zeros(BATCH, places, 2, dtype=torch.int64)
    valid = torch.zeros(BATCH, places, dtype=torch.bool)
    for number, (rows, columns) in enumerate(GRIDS):
        coord[number, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        valid[number, : rows * columns] = True
    patches = tower_cases.formula(f"patches {step}", (BATCH, places, PATCH * PATCH * 3), scale=2.0)
    return {"patches": patches * valid[..., None], "patch_coord": coord, "patch_valid": valid}


def _texts(model: Any, step: int) -> torch.Tensor:
    has_padding = isinstance(getattr(model, "text", None), (ModernTextTransformer, HFTextEncoder))
    length = LENGTHS[0] if has_padding else model.context_length
    texts = (torch.arange(BATCH * length) * (7 + step)).remainder(60).reshape(BATCH, -1) + 1
    texts[:, -1] = EOS  # the end of a text has the highest id
    if has_padding:
        for row, tokens in zip(texts, LENGTHS, strict=True):
            row[0], row[tokens - 1] = BOS, EOS
            row[tokens:] = PAD
    return texts
