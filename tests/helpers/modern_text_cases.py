"""Tiny models with a modern text tower."""

from __future__ import annotations

from typing import Any

import torch

import open_clip
import tiny_clip

PAD, BOS, EOS = 61, 62, 63
TEXT: dict[str, Any] = {"text_arch": "modern", "layers": 3, "pad_id": PAD, "bos_id": BOS, "eos_id": EOS}
EVERYTHING: dict[str, Any] = {
    "attn_gated": True, "qk_norm": True, "value_residual": True, "reg_tokens": 2, "pre_norm": True,
    "norm_placement": "sandwich", "ls_init_value": 0.5, "attention_bias": True, "mlp_bias": True,
}  # fmt: skip
MAP = {"pool_type": "map", "attention_mode": "bidirectional", "qk_norm": True}


def config(**text: Any) -> dict[str, Any]:
    return tiny_clip.config(vision={"layers": 2}, text={**TEXT, **text})


def build(**text: Any) -> open_clip.CustomTextCLIP:
    torch.manual_seed(0)
    return open_clip.CustomTextCLIP(**config(**text), output_dict=True)


def texts(*lengths: int, total: int = 12) -> torch.Tensor:
    """Return ids [texts, total]: BOS, words, EOS at place length - 1, padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, PAD, (len(lengths), total), generator=generator)
    for row, length in zip(ids, lengths, strict=True):
        row[0] = BOS
        row[length - 1] = EOS
        row[length:] = PAD
    return ids


def batch(*lengths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"image": torch.randn(len(lengths), 3, 32, 32, generator=generator), "text": texts(*lengths)}
