"""The same seed gives open_clip 3.3.0's initial weights, to the bit. `initial_weights.json` is recorded from 3.3.0 by
tests/parity/record/initial_weights.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import open_clip

RECORDED = Path(__file__).with_name("initial_weights.json")

# Widths that are no power of 4: their square roots are rounded.
VISION = {"image_size": 16, "patch_size": 8, "width": 24, "head_width": 8, "layers": 2}
TEXT = {"context_length": 7, "vocab_size": 20, "width": 24, "heads": 2, "layers": 2}
POOLER = {"attn_pooler_heads": 2, "attn_pooler_queries": 3}
DECODER = {"context_length": 7, "vocab_size": 20, "width": 24, "heads": 2, "layers": 2}


def resnet(*layers: int) -> dict[str, Any]:
    return {"image_size": 64, "layers": list(layers), "width": 12, "head_width": 8, "patch_size": None}


def timm(name: str, **options: Any) -> dict[str, Any]:
    return {"timm_model_name": name, "image_size": 224, "timm_pool": "", "timm_proj": "linear"} | options


# name: (class, embed_dim, vision_cfg, text_cfg, options)
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ViT": ("CLIP", 16, VISION, TEXT, {}),
    "ViT quickgelu": ("CLIP", 16, VISION, TEXT, {"quick_gelu": True}),
    "ViT bf16": ("CLIP", 16, VISION, TEXT, {"cast_dtype": torch.bfloat16}),
    "ViT oblong": ("CLIP", 16, VISION | {"image_size": (16, 24)}, TEXT, {}),
    "custom text": ("CustomTextCLIP", 16, VISION, TEXT, {}),
    "RN50": ("CLIP", 16, resnet(3, 4, 6, 3), TEXT, {}),
    "RN101": ("CLIP", 16, resnet(3, 4, 23, 3), TEXT, {}),
    "attentional pool": ("CustomTextCLIP", 16, VISION | POOLER | {"attentional_pool": True}, TEXT, {}),
    "parallel pools": ("CustomTextCLIP", 24, VISION | POOLER | {"attentional_pool": "parallel"}, TEXT, {}),
    "cascaded pools": ("CustomTextCLIP", 24, VISION | POOLER | {"attentional_pool": "cascade"}, TEXT, {}),
    "sines": ("CLIP", 16, VISION | {"pos_embed_type": "sin_cos_2d", "pool_type": "avg", "no_ln_pre": True}, TEXT, {}),
    "SigLIP's text": (
        *("CustomTextCLIP", 16, VISION | {"ls_init_value": 0.1}),
        *(TEXT | {"proj_bias": True, "no_causal_mask": True, "pool_type": "last"}, {"init_logit_bias": -10}),
    ),
    "no projection": ("CustomTextCLIP", 16, VISION, TEXT | {"proj_type": "none"}, {}),
    "class token": ("CustomTextCLIP", 16, VISION, TEXT | {"embed_cls": True}, {}),
    "custom blocks": (
        *("CustomTextCLIP", 16, VISION | {"qk_norm": True, "scale_heads": True, "scale_attn": True, "scale_fc": True}),
        *(TEXT | {"scaled_cosine_attn": True}, {}),
    ),
    "CoCa": (
        *("CoCa", 24, VISION | POOLER | {"attentional_pool": True, "output_tokens": True}),
        *(TEXT | {"embed_cls": True, "output_tokens": True}, {"multimodal_cfg": DECODER}),
    ),
    "timm ViT": ("CustomTextCLIP", 16, timm("vit_tiny_patch16_224"), TEXT, {}),
    "timm ResNet, absolute": ("CLIP", 16, timm("resnet10t", timm_pool="abs_attn"), TEXT, {}),
    "timm ResNet, rotary": ("CLIP", 16, timm("resnet10t", timm_pool="rot_attn", timm_proj="mlp"), TEXT, {}),
    "Hugging Face mean": ("CustomTextCLIP", 12, VISION, {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"}, {}),
    "Hugging Face cls": ("CustomTextCLIP", 12, VISION, {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"}, {}),
}
ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
}


def digest(case: str, folder: Path) -> str:
    """Hash of all weights but CoCa's last projection, which 3.3.0 leaves as uninitialised memory."""
    name, embed_dim, vision, text, options = CASES[case]
    if "hf_pooler_type" in text:
        (folder / "config.json").write_text(json.dumps(ROBERTA), encoding="utf-8")
        text = text | {"hf_model_name": str(folder), "hf_model_pretrained": False, "context_length": 8}
    torch.manual_seed(0)
    model = getattr(open_clip, name)(embed_dim=embed_dim, vision_cfg=vision, text_cfg=text, **options)
    found = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if key != "text_decoder.text_projection":
            found.update(key.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("case", CASES)
def test_initial_weights(case, tmp_path):
    assert digest(case, tmp_path) == json.loads(RECORDED.read_text(encoding="utf-8"))[case]


def test_another_seed_gives_other_weights(tmp_path):
    torch.manual_seed(1)
    state = open_clip.CLIP(16, VISION, TEXT).state_dict()
    torch.manual_seed(0)
    assert not torch.equal(state["visual.proj"], open_clip.CLIP(16, VISION, TEXT).state_dict()["visual.proj"])
