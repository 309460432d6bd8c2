"""Checks of a configuration of the modern text tower."""

from __future__ import annotations

from ..config import CLIPTextCfg, expect_defaults
from ..utils import expect
from .blocks import NORM_PLACEMENTS
from .layers import MLP_TYPES, NORM_TYPES
from .pool import POOL_TYPES

ATTENTION_MODES = ("causal", "bidirectional")

# Fields of CLIPTextCfg that only the native tower has.
_NATIVE_FIELDS = (
    *("embed_cls", "no_causal_mask", "act_kwargs", "norm_kwargs", "block_type"),
    *("scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"),
)
_POSITIVE = ("width", "heads", "layers", "vocab_size", "context_length", "rope_temperature", "norm_eps")


def pool_type_of(cfg: CLIPTextCfg) -> str:
    """Return the pool of a configuration. Its default, "argmax", means "eos"."""
    return "eos" if cfg.pool_type == "argmax" else cfg.pool_type


def check_config(cfg: CLIPTextCfg) -> None:
    """Check the configuration of a modern text tower.

    Raises:
        ValueError: a value is unknown, contradicts another one or has no effect, or a needed id is missing.
    """
    pool_type = pool_type_of(cfg)
    expect("pool_type of a modern text tower", pool_type, POOL_TYPES)
    expect("attention_mode", cfg.attention_mode, ATTENTION_MODES)
    expect("pos_embed", cfg.pos_embed, ("rope",))
    expect("mlp_type", cfg.mlp_type, MLP_TYPES)
    expect("norm_type", cfg.norm_type or "rmsnorm", NORM_TYPES)
    expect("norm_placement", cfg.norm_placement, NORM_PLACEMENTS)
    expect("proj_type", cfg.proj_type, ("linear", "none"))
    expect_defaults(cfg, _NATIVE_FIELDS, "has no effect on a modern text tower. Remove it from text_cfg, or text_arch.")
    for name in _POSITIVE:
        if getattr(cfg, name) <= 0:
            raise ValueError(f"{name}={getattr(cfg, name)} is not positive. Set another {name} in text_cfg.")
    if cfg.reg_tokens < 0:
        raise ValueError(f"reg_tokens={cfg.reg_tokens} is a number of tokens. Use 0 for none.")
    if cfg.pad_id is None:
        raise ValueError(
            "text_cfg has no pad_id, and the modern text tower finds padding by its id. Set pad_id to that of the "
            "tokenizer."
        )
    if pool_type == "eos" and cfg.eos_id is None:
        raise ValueError(
            "text_cfg has no eos_id, and pool_type 'eos' selects the token with this id. Set eos_id to that of the "
            "tokenizer, or use pool_type 'last', 'mean' or 'map'."
        )
    for name in ("pad_id", "bos_id", "eos_id"):
        value = getattr(cfg, name)
        if value is not None and not 0 <= value < cfg.vocab_size:
            raise ValueError(f"{name}={value} is not an id of this vocabulary: it has 0 to {cfg.vocab_size - 1}.")
    if cfg.pad_id == cfg.eos_id and pool_type == "eos" and cfg.attention_mode == "bidirectional":
        raise ValueError(
            f"pad_id and eos_id are both {cfg.pad_id}, so the end of text would be hidden as padding. Use "
            "attention_mode 'causal', another pool_type, or a tokenizer with two ids."
        )
