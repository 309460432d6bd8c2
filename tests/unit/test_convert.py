"""Layouts of other projects are recognized by their names and converted without changing a value.

The inverse tables here are written after the makers' own code; the image towers' are timm's to know, and checked here
in the model that they are for.
"""

from __future__ import annotations

import re

import pytest
import timm
import torch

import open_clip
import tiny_clip
from open_clip.checkpoint.fit import put_weights
from open_clip.convert import (
    convert_mobile_clip_state_dict,
    convert_state_dict,
    to_custom_text_layout,
    to_plain_layout,
)
from versions import require_timm_model

# our names -> Apple's, applied in order
APPLE_TEXT = [
    (r"^text\.", "text_encoder."),
    (r"token_embedding\.", "embedding_layer."),
    (r"positional_embedding$", "positional_embedding.pos_embed.pos_embed"),
    (r"transformer\.resblocks\.", "transformer."),
    (r"\.ln_1\.", ".pre_norm_mha.0."),
    (r"\.attn\.in_proj_", ".pre_norm_mha.1.qkv_proj."),
    (r"\.attn\.out_proj\.", ".pre_norm_mha.1.out_proj."),
    (r"\.ln_2\.", ".pre_norm_ffn.0."),
    (r"\.mlp\.c_fc\.", ".pre_norm_ffn.1."),
    (r"\.mlp\.c_proj\.", ".pre_norm_ffn.4."),
    (r"ln_final\.", "final_layer_norm."),
    (r"text_projection$", "projection_layer"),
]
APPLE_FASTVIT = [
    (r"^visual\.trunk\.", "image_encoder.model."),
    (r"stem\.", "patch_embed."),
    (r"stages\.0\.blocks\.", "network.0."),
    (r"stages\.1\.downsample\.", "network.1."),
    (r"stages\.1\.blocks\.", "network.2."),
    (r"stages\.2\.downsample\.", "network.3."),
    (r"stages\.2\.blocks\.", "network.4."),
    (r"stages\.3\.downsample\.", "network.5."),
    (r"stages\.3\.pos_emb\.pos_enc\.", "network.6.pe."),
    (r"stages\.3\.blocks\.", "network.7."),
    (r"large_conv", "lkb_origin"),
    (r"conv_kxk", "rbr_conv"),
    (r"conv_scale", "rbr_scale"),
    (r"identity\.", "rbr_skip."),
    (r"final_conv\.", "conv_exp."),
    (r"\.mlp\.", ".convffn."),
    (r"se\.fc1", "se.reduce"),
    (r"se\.fc2", "se.expand"),
    (r"layer_scale(_\d)?\.gamma", r"layer_scale\1"),
    (r"head\.fc\.weight", "head.proj"),
]
APPLE_VIT = [
    (r"^visual\.trunk\.", "image_encoder.model."),
    (r"patch_embed\.backbone\.(\d)\.bn", r"patch_emb.\1.block.norm"),
    (r"patch_embed\.backbone\.(\d)\.conv", r"patch_emb.\1.block.conv"),
    (r"model\.norm\.", "model.post_transformer_norm."),
    (r"blocks\.", "transformer."),
    (r"\.norm1\.", ".pre_norm_mha.0."),
    (r"\.attn\.qkv\.", ".pre_norm_mha.1.qkv_proj."),
    (r"\.attn\.proj\.", ".pre_norm_mha.1.out_proj."),
    (r"\.norm2\.", ".pre_norm_ffn.0."),
    (r"\.mlp\.fc1\.", ".pre_norm_ffn.1."),
    (r"\.mlp\.fc2\.", ".pre_norm_ffn.4."),
    (r"pos_embed$", "pos_embed.pos_embed.pos_embed"),
    (r"head\.weight", "classifier.proj"),
]
META_IMAGE = [
    (r"^visual\.trunk\.", "visual."),
    (r"patch_embed\.proj\.", "conv1."),
    (r"pos_embed$", "positional_embedding"),
    (r"cls_token$", "class_embedding"),
    (r"blocks\.", "transformer.resblocks."),
    (r"\.norm_pre\.", ".ln_pre."),
    (r"visual\.norm\.", "visual.ln_post."),
    (r"(resblocks\.\d+)\.norm(\d)\.", r"\1.ln_\2."),
    (r"(resblocks\.\d+)\.attn\.qkv\.", r"\1.attn.in_proj_"),
    (r"(resblocks\.\d+)\.attn\.proj\.", r"\1.attn.out_proj."),
    (r"(resblocks\.\d+)\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (r"(resblocks\.\d+)\.mlp\.fc2\.", r"\1.mlp.c_proj."),
    (r"attn_pool\.latent$", "attn_pool.probe"),
    (r"attn_pool\.proj\.", "attn_pool.attn.out_proj."),
    (r"attn_pool\.norm\.", "attn_pool.layernorm."),
    (r"attn_pool\.mlp\.fc1\.", "attn_pool.mlp.c_fc."),
    (r"attn_pool\.mlp\.fc2\.", "attn_pool.mlp.c_proj."),
    (r"visual\.head\.weight$", "visual.proj"),
    (r"^text\.", ""),
]


def renamed(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, theirs in table:
        name = re.sub(pattern, theirs, name)
    return name


def small(monkeypatch: pytest.MonkeyPatch, name: str, depth: int | None = None) -> torch.nn.Module:
    """Build a bundled model with a shorter text tower and, if requested, a shallower image tower."""
    cfg = open_clip.get_model_config(name)
    cfg["text_cfg"] |= {"layers": 2, "vocab_size": 64}
    if depth is not None:
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, depth=depth, **kwargs))
    del cfg["custom_text"]
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape))
        for name, parameter in model.visual.trunk.named_parameters():
            if name in ("head.fc.bias", "head.bias"):
                parameter.zero_()  # Apple's projections have no bias
    return model


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(("name", "fastvit"), [("MobileCLIP-S1", True), ("MobileCLIP-B", False)])
def test_mobile_clip(monkeypatch, name, fastvit):
    model = small(monkeypatch, name, depth=None if fastvit else 2)
    ours = model.state_dict()
    theirs = {}
    for key, value in ours.items():
        if key in ("visual.trunk.head.fc.bias", "visual.trunk.head.bias"):
            continue
        image = APPLE_FASTVIT if fastvit else APPLE_VIT
        other = renamed(key, image if key.startswith("visual.") else APPLE_TEXT)
        if other.endswith(("head.proj", "classifier.proj")):
            value = value.T
        elif other.endswith("pos_embed.pos_embed"):
            value = value[None] if key.startswith("visual.") else value[None, None]
        theirs[other] = value
    assert not any(key.startswith(("visual.", "text.")) for key in theirs)
    assert_equal(convert_mobile_clip_state_dict(model, theirs, fastvit=fastvit), ours)
    found = convert_state_dict(model, theirs)
    assert_equal(found, ours)
    assert all(value.is_contiguous() for value in found.values())
    key = "transformer.0.pre_norm_mha.1.qkv_proj.weight"
    shared = found["text.transformer.resblocks.0.attn.in_proj_weight"]
    assert shared.data_ptr() == theirs[f"text_encoder.{key}"].data_ptr()


def test_perception_encoder(monkeypatch):
    require_timm_model("vit_pe_core_tiny_patch16_384")
    model = small(monkeypatch, "PE-Core-T-16-384", depth=2)
    ours = model.state_dict()
    theirs = {"attn_mask": torch.zeros(2)}
    pool = "visual.trunk.attn_pool"
    for kind in ("weight", "bias"):
        fused = torch.cat([ours[f"{pool}.q.{kind}"], ours[f"{pool}.kv.{kind}"]])
        theirs[f"visual.attn_pool.attn.in_proj_{kind}"] = fused
    for key, value in ours.items():
        if key.startswith((f"{pool}.q.", f"{pool}.kv.")) or key == "visual.trunk.head.bias":
            continue
        other = renamed(key, META_IMAGE) if key.startswith("visual.") else key.removeprefix("text.")
        if other == "visual.proj":
            value = value.T
        elif other in ("visual.class_embedding", "visual.positional_embedding"):
            value = value.flatten(0, -2).squeeze(0)
        theirs[other] = value
    assert_equal(convert_state_dict(model, theirs), ours)


def test_a_native_model_is_not_recognized_as_metas():
    model = open_clip.CLIP(**tiny_clip.config())
    assert_equal(convert_state_dict(model, model.state_dict()), model.state_dict())


def test_layouts_of_clip_and_custom_text_clip():
    plain, custom = open_clip.CLIP(**tiny_clip.config()), open_clip.CustomTextCLIP(**tiny_clip.config())
    weights = plain.state_dict()
    assert to_custom_text_layout(weights).keys() == custom.state_dict().keys()
    assert to_custom_text_layout(custom.state_dict()).keys() == custom.state_dict().keys()
    assert_equal(to_plain_layout(to_custom_text_layout(weights)), weights)
    converted = convert_state_dict(custom, weights)
    assert all(converted[key].data_ptr() == value.data_ptr() for key, value in to_custom_text_layout(weights).items())


def test_position_ids_of_old_transformers_are_dropped():
    model = open_clip.CLIP(**tiny_clip.config())
    weights = {**model.state_dict(), "text.transformer.embeddings.position_ids": torch.arange(5)}
    assert put_weights(model, weights) == ([], [])
