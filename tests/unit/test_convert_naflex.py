"""Conversion of ViTs for one image size to NaFlex towers: the same features, or a sentence that says why not."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

import open_clip
from open_clip import naflex_convert
from open_clip.convert import apply_naflex_vision_config, convert_naflex_state_dict
from open_clip.naflex import NaFlexTower
from open_clip.towers import build_vision_tower

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
NATIVE = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 2}
TIMM = {
    "vit": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"},
    "vit_mean": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg"},
    "vit_clip": {"timm_model_name": "vit_base_patch32_clip_224", "timm_pool": "token", "timm_proj": None},
    "vit_registers": {"timm_model_name": "vit_small_patch14_reg4_dinov2", "timm_pool": "token", "image_size": 56},
    "siglip": {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"},
    "eva": {"timm_model_name": "eva02_base_patch16_clip_224", "timm_pool": "token"},
    "rope": {"timm_model_name": "vit_base_patch16_rope_reg1_gap_256", "timm_pool": "avg"},
    # Perception Encoder, whose attention pooling also reads the class token
    "eva_map": {"timm_model_name": "vit_pe_core_base_patch16_224", "timm_pool": "map", "timm_proj": None},
    "eva_default_pool": {"timm_model_name": "vit_pe_core_base_patch16_224", "timm_pool": ""},
    "eva_mean": {"timm_model_name": "eva02_base_patch16_clip_224", "timm_pool": "avg"},
}


def make_model(vision_cfg: dict[str, Any], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(32, vision_cfg, TEXT, **kwargs).eval()


def fill(model: Any) -> Any:
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def folder(tmp_path: Any, vision_cfg: dict[str, Any], **kwargs: Any) -> str:
    cfg = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision_cfg, "text_cfg": TEXT, **kwargs}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(cfg), encoding="utf-8")
    return f"local-dir:{tmp_path}"


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        ({}, {"quick_gelu": True}),
        ({"pool_type": "avg", "ls_init_value": 0.1}, {}),
        ({"no_ln_pre": True, "final_ln_after_pool": True}, {}),
        ({"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 2.0}, {}),
        ({"image_size": [16, 32], "patch_size": [8, 4]}, {}),
    ],
)
@pytest.mark.parametrize("custom_text", [False, True])
def test_native_towers(options, kwargs, custom_text, tmp_path):
    cfg = {**NATIVE, **options}
    model = fill(make_model(cfg, **kwargs))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    converted = open_clip.create_model(
        folder(tmp_path, cfg, **kwargs), force_naflex_vision=True, force_custom_text=custom_text
    ).eval()
    assert isinstance(converted.visual, NaFlexTower)
    assert converted.visual.takes_packed_patches
    height, width = model.visual.image_size
    image = torch.randn(2, 3, height, width)
    with torch.no_grad():
        torch.testing.assert_close(converted.visual(image), model.visual(image), rtol=1e-5, atol=1e-5)
    assert converted.visual.image_seq_len == model.visual.grid_size[0] * model.visual.grid_size[1]


@pytest.mark.parametrize("variant", TIMM)
def test_towers_of_timm(variant, tmp_path):
    cfg = {"image_size": 64, "timm_model_kwargs": SMALL, **TIMM[variant]}
    model = fill(make_model(cfg))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    converted = open_clip.create_model(folder(tmp_path, cfg), force_naflex_vision=True).eval()
    assert converted.visual.takes_packed_patches
    image = torch.randn(2, 3, *model.visual.image_size)
    with torch.no_grad():
        torch.testing.assert_close(converted.visual(image), model.visual(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cfg", [NATIVE, {**TIMM["siglip"], "timm_model_kwargs": SMALL | {"patch_size": 8}}])
def test_images_that_are_no_multiple_of_the_patch_size(cfg, tmp_path):
    """Convolutions do not read the rest, for example of 384 x 384 pixels in patches of 14 x 14."""
    cfg = {**cfg, "image_size": [38, 35]}
    model = fill(make_model(cfg))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    visual: Any = open_clip.create_model(folder(tmp_path, cfg), force_naflex_vision=True).eval().visual
    image = torch.randn(2, 3, 38, 35)
    with torch.no_grad():
        expected = model.visual(image)
        torch.testing.assert_close(visual(image), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.jit.trace(visual, image)(image), expected, rtol=1e-5, atol=1e-5)
        intermediates = visual.forward_intermediates(image)
        torch.testing.assert_close(intermediates["image_features"], expected, rtol=1e-5, atol=1e-5)
        assert intermediates["image_intermediates"][0].shape[-2:] == (4, 4)
    with pytest.raises(ValueError, match="38 x 34 pixels, which the model cannot divide"):
        visual(torch.randn(2, 3, 38, 34))


def test_new_weights_are_as_large_as_those_of_the_native_tower(tmp_path):
    cfg = {**NATIVE, "width": 128, "head_width": 32}
    native = make_model(cfg).visual
    trunk = open_clip.create_model(folder(tmp_path, cfg), force_naflex_vision=True).visual.trunk
    block, expected = trunk.blocks[0], native.transformer.resblocks[0]
    for weight, reference in (
        (trunk.embeds.cls_token, native.class_embedding),
        (trunk.embeds.pos_embed, native.positional_embedding),
        (trunk.embeds.proj.weight, native.conv1.weight),
        (block.attn.qkv.weight, expected.attn.in_proj_weight),
        (block.mlp.fc2.weight, expected.mlp.c_proj.weight),
    ):
        assert weight.std().item() == pytest.approx(reference.std().item(), rel=0.25)


def test_a_file_with_the_image_tower_alone(tmp_path):
    model = fill(make_model(NATIVE))
    torch.save(model.visual.state_dict(), tmp_path / "tower.pt")
    name = folder(tmp_path, NATIVE)
    (tmp_path / "tower.pt").rename(tmp_path.parent / "tower.pt")
    converted = open_clip.create_model(
        name, force_naflex_vision=True, pretrained_image_path=tmp_path.parent / "tower.pt"
    ).eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(converted.visual(image), model.visual(image), rtol=1e-5, atol=1e-5)


def test_weights_for_another_grid_are_resized(tmp_path):
    model = fill(make_model(NATIVE))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    name = folder(tmp_path, NATIVE)
    larger = open_clip.create_model(name, force_naflex_vision=True, force_image_size=48).eval()
    assert larger.visual.trunk.embeds.pos_embed.shape == (1, 6, 6, 32)
    expected = open_clip.create_model(name, force_image_size=48).eval()
    image = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(larger.visual(image), expected.visual(image), rtol=1e-4, atol=1e-4)


def test_the_weights_of_a_converted_model_load_again(tmp_path):
    name = folder(tmp_path, NATIVE)
    model = fill(open_clip.create_model(name, force_naflex_vision=True))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = open_clip.create_model(name, force_naflex_vision=True)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_the_argument_in_every_function(tmp_path):
    torch.save(make_model(NATIVE).state_dict(), tmp_path / "model.pt")
    name = folder(tmp_path, NATIVE)
    for create in (open_clip.create_model_and_transforms, open_clip.create_model_from_pretrained):
        assert isinstance(create(name, force_naflex_vision=True)[0].visual, NaFlexTower)
        assert not isinstance(create(name, force_naflex_vision=False)[0].visual, NaFlexTower)


def test_timm_weights_are_not_downloaded_for_a_native_tower(tmp_path, caplog):
    open_clip.create_model(folder(tmp_path, NATIVE), force_naflex_vision=True, pretrained_image=True)
    assert "pretrained_image has no effect" in caplog.text


@pytest.mark.parametrize(
    ("vision_cfg", "message"),
    [
        ({"layers": [1, 1, 1, 1]}, "a ResNet has no patches"),
        ({**NATIVE, "attentional_pool": True}, "attentional_pool=True, which NaFlex towers do not have"),
        ({**NATIVE, "output_tokens": True}, "output_tokens=True"),
        ({**NATIVE, "pos_embed_type": "sin_cos_2d"}, "pos_embed_type='sin_cos_2d'"),
        ({**NATIVE, "pool_type": "none"}, "pool_type='none'"),
        ({**NATIVE, "qk_norm": True}, "qk_norm=True"),
        ({**NATIVE, "block_type": "custom"}, "block_type='custom'"),
        ({"timm_model_name": "convnext_tiny"}, r"convnext_tiny of timm is not a ViT .*timm.models.convnext"),
    ],
)
def test_what_cannot_be_converted(vision_cfg, message):
    with pytest.raises(ValueError, match=f"force_naflex_vision: .*{message}"):
        apply_naflex_vision_config({"embed_dim": 32, "vision_cfg": vision_cfg, "text_cfg": TEXT})


def test_a_vit_of_timm_that_naflexvit_cannot_compute(tmp_path):
    cfg = {"timm_model_name": "eva02_enormous_patch14_clip_224", "timm_model_kwargs": SMALL}
    with pytest.raises(ValueError, match=r"use_post_norm.*leave out force_naflex_vision"):
        open_clip.create_model(folder(tmp_path, cfg), force_naflex_vision=True)


def test_coca_cannot_be_converted():
    with pytest.raises(ValueError, match=r"force_naflex_vision: a CoCa's decoder"):
        open_clip.create_model("coca_ViT-B-32", device="meta", force_naflex_vision=True)


def test_a_naflex_model_stays_as_it_is():
    cfg = {"embed_dim": 32, "vision_cfg": {"timm_model_name": "naflexvit_base_patch16_gap"}, "text_cfg": TEXT}
    assert apply_naflex_vision_config(copy.deepcopy(cfg)) == cfg


def test_names_of_the_main_branch():
    assert naflex_convert.apply_naflex_vision_config is apply_naflex_vision_config
    assert naflex_convert.convert_naflex_state_dict is convert_naflex_state_dict


def test_other_weights_are_not_changed():
    model = open_clip.CLIP(32, apply_naflex_vision_config({"vision_cfg": NATIVE})["vision_cfg"], TEXT)
    state_dict = model.state_dict()
    assert convert_naflex_state_dict(state_dict, model) is state_dict


def test_positions_that_are_not_square():
    model = open_clip.CLIP(32, apply_naflex_vision_config({"vision_cfg": NATIVE})["vision_cfg"], TEXT)
    other = build_vision_tower(32, {**NATIVE, "image_size": [16, 32]}).state_dict()
    with pytest.raises(ValueError, match=r"8 patches, which is not a square grid, and the model's grid is 4 x 4"):
        convert_naflex_state_dict({f"visual.{name}": value for name, value in other.items()}, model)


@pytest.mark.parametrize(
    "options",
    [
        {"pretrained_cfg": {"file": "x"}},
        {"checkpoint_path": "x"},
        {"act_layer": "../x"},
        {"block_fn": {"file": "../x"}},
    ],
)
def test_a_configuration_of_the_hub_may_not_name_files(options):
    cfg = {"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_model_kwargs": options}, "text_cfg": {}}
    with pytest.raises(ValueError, match=f"The hub has timm_model_kwargs with '{next(iter(options))}': "):
        open_clip.recipe.check_untrusted(cfg, "The hub")
    cfg["vision_cfg"]["timm_model_kwargs"] = {"pos_embed_grid_size": [4, 4], "mlp_ratio": 2.5, "act_layer": "gelu"}
    open_clip.recipe.check_untrusted(cfg, "The hub")
