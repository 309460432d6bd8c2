"""Tiny native models with every option, and weights and inputs from a formula.

Used to record the outputs of open_clip_torch (parity/record/native_models.py) and to compare ours with them
(parity/test_native_models.py). With a formula, the two need not draw the same random numbers.
"""

from __future__ import annotations

import copy
import zlib
from typing import Any

import torch

EMBED_DIM = 12
VISION: dict[str, Any] = {"layers": 2, "width": 24, "head_width": 12, "patch_size": 8, "image_size": 16}
TEXT: dict[str, Any] = {"context_length": 6, "vocab_size": 30, "width": 16, "heads": 2, "layers": 2}
EOT = 29  # the highest id, as in CLIP's vocabulary


def _cases() -> dict[str, tuple[str, dict, dict, dict]]:
    """Return (class name, vision_cfg, text_cfg, other arguments) by the name of the case."""
    cases = {}

    def add(
        name: str, vision: dict | None = None, text: dict | None = None, classes: str = "both", **kwargs: Any
    ) -> None:
        for cls in ("CLIP", "CustomTextCLIP"):
            if classes in ("both", cls):
                cases[f"{cls} {name}"] = (cls, VISION | (vision or {}), TEXT | (text or {}), kwargs)

    add("plain")
    add("quick_gelu", quick_gelu=True)
    add("bias", init_logit_bias=-10.0)
    add("nonscalar", init_logit_bias=-10.0, nonscalar_logit_scale=True)
    add("output_dict", init_logit_bias=-10.0, output_dict=True)
    add("oblong", {"image_size": (16, 32)}, classes="CLIP")
    add("layer scale", {"ls_init_value": 1e-2}, {"ls_init_value": 1e-2})
    kwargs = {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-2}}
    add("act and norm kwargs", kwargs, kwargs)
    add("mlp_ratio", {"mlp_ratio": 3.3}, {"mlp_ratio": 2.7})
    add("no_ln_pre", {"no_ln_pre": True}, classes="CLIP")
    add("sin_cos_2d", {"pos_embed_type": "sin_cos_2d"}, classes="CLIP")
    add(
        "attentional_pool", {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2}, classes="CLIP"
    )
    for pool_type in ("tok", "avg", "none"):
        for after in (False, True):
            vision = {"pool_type": pool_type, "final_ln_after_pool": after}
            add(f"image {pool_type} {after}", vision, classes="CLIP")
    for pool_type in ("first", "last", "argmax", "eos"):
        add(f"text {pool_type}", text={"pool_type": pool_type})
    add("eos_id", text={"pool_type": "eos", "eos_id": 7}, classes="CLIP")
    add("no_causal_mask", text={"no_causal_mask": True, "pool_type": "last"})
    add("embed_cls", text={"embed_cls": True}, classes="CustomTextCLIP")
    add("embed_cls pad_id", text={"embed_cls": True, "pad_id": 3}, classes="CustomTextCLIP")
    add("embed_cls no_causal_mask", text={"embed_cls": True, "no_causal_mask": True}, classes="CustomTextCLIP")
    add("no projection", text={"proj_type": "none", "width": EMBED_DIM})
    add("proj_bias", text={"proj_bias": True})
    for option in ("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"):
        add(option, {option: True}, {option: True}, classes="CLIP")
    add("custom", {"block_type": "custom"}, {"block_type": "custom"}, classes="CustomTextCLIP")
    every = dict.fromkeys(("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), True)
    add("all scales", every | {"ls_init_value": 1e-2}, every | {"ls_init_value": 1e-2}, quick_gelu=True)
    return cases


CASES = _cases()

# Arguments of forward_intermediates, tested with one model of each class
INTERMEDIATES: dict[str, dict[str, Any]] = {
    "default": {},
    "last": {"image_indices": 1, "text_indices": 1},
    "listed": {"image_indices": [1, 0], "text_indices": [-1]},
    "stop_early": {"image_indices": [0], "text_indices": [0], "stop_early": True},
    "stop_early only": {"image_indices": [0], "text_indices": [0], "stop_early": True, "intermediates_only": True},
    "not normalized": {"normalize": False},
    "normalize_intermediates": {"normalize_intermediates": True},
    "intermediates_only": {"intermediates_only": True, "output_logits": True, "output_logit_scale_bias": True},
    "NLC": {"image_output_fmt": "NLC", "image_output_extra_tokens": True, "text_output_extra_tokens": True},
    "extra tokens": {"image_output_extra_tokens": True},
    "logits": {"output_logits": True},
    "scale and bias": {"output_logit_scale_bias": True},
}
INTERMEDIATES_MODELS = ("CLIP bias", "CustomTextCLIP bias", "CustomTextCLIP embed_cls")
LOCK_MODELS = ("CLIP plain", "CLIP attentional_pool", "CustomTextCLIP embed_cls", "CustomTextCLIP no projection")


def build(module: Any, case: str) -> torch.nn.Module:
    """Build the model of `case` with the classes of `module` (ours or open_clip_torch's), in evaluation mode."""
    cls, vision, text, kwargs = copy.deepcopy(CASES[case])
    return getattr(module, cls)(EMBED_DIM, vision, text, **kwargs).eval()


def formula(name: str, shape: torch.Size | tuple[int, ...], scale: float = 0.3) -> torch.Tensor:
    """Return irregular values in [-scale, scale], float32."""
    size = int(torch.Size(shape).numel())
    phase = zlib.crc32(name.encode()) % 1000
    steps = torch.arange(size, dtype=torch.float64)
    return (scale * torch.cos(steps * steps * 0.37 + steps * 1.7 + phase)).float().reshape(shape)


def set_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Set the trainable parameters of `model` by the formula. Fixed sine-cosine tables are not changed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                near_one = name.endswith(".weight") and parameter.dim() == 1
                parameter.copy_(formula(name, parameter.shape) + (1.0 if near_one else 0.0))
    return model


def inputs(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two images, and the token ids of two texts: one without padding, and one with it."""
    _, vision, text_cfg, _ = CASES[case]
    size = vision["image_size"]
    height, width = size if isinstance(size, tuple) else (size, size)
    image = formula("image", (2, 3, height, width), scale=2.0)
    end = text_cfg.get("eos_id", 2) if text_cfg.get("pool_type") == "eos" else EOT
    pad = text_cfg.get("pad_id", 0)
    return image, torch.tensor([[20, 4, 9, 11, 13, end], [20, 8, 14, end, pad, pad]])
