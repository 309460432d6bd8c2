"""Image towers of timm: options, errors, and towers loaded from a file."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import open_clip
import tower_cases as cases
from open_clip import config as registry
from open_clip.timm_model import TimmModel
from open_clip.transformer.layers import GELU, QuickGELU
from training import build
from versions import is_older, require_timm_model

timm = pytest.importorskip("timm")

# Towers with non-persistent buffers: rotary positions, relative position indices and biases, masks of shifted windows
WITH_TABLES = (
    "eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384", "swin_tiny_patch4_window7_224", "test_vit_relpos"
)  # fmt: skip


def config(model_name: str, image_size: int, **timm_options: object) -> dict:
    vision = {"timm_model_name": model_name, "image_size": image_size, "timm_pool": ""} | timm_options
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": dict(cases.TEXT)}


def create(tmp_path: Path, cfg: dict, **kwargs: Any) -> Any:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    return open_clip.create_model(f"local-dir:{tmp_path}", **kwargs)


# Loading from a file


@pytest.mark.parametrize("name", WITH_TABLES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tower_loaded_from_a_file_equals_one_built_on_the_cpu(name: str, precision: str, tmp_path) -> None:
    require_timm_model(name)
    cfg = config(name, 56 if "14" in name else 64)
    plain = create(tmp_path, cfg, precision=precision).eval()
    torch.save(plain.state_dict(), tmp_path / "weights")
    loaded = create(tmp_path, cfg, precision=precision, pretrained=str(tmp_path / "weights")).eval()
    tables, found = dict(plain.named_buffers()), dict(loaded.named_buffers())
    assert tables.keys() - plain.state_dict().keys(), "it has some"
    assert list(found) == list(tables)
    for key, value in tables.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key
    image = cases.images(cfg["vision_cfg"]["image_size"]).to(plain.visual.head.proj.weight.dtype)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(image), plain.encode_image(image))


def test_an_old_timm_builds_on_the_cpu_instead_of_the_meta_device(monkeypatch) -> None:
    require_timm_model("test_vit_relpos")
    monkeypatch.setattr(timm, "__version__", "1.0.17")
    with torch.device("meta"):
        tower = TimmModel("test_vit_relpos", 24, 160)
    assert not next(tower.trunk.parameters()).is_meta
    assert tower.head.proj.weight.is_meta
    monkeypatch.setattr(timm, "__version__", "1.1.0.dev0")
    with torch.device("meta"):
        assert next(TimmModel("test_vit_relpos", 24, 160).trunk.parameters()).is_meta


@pytest.mark.parametrize("options", [{}, {"force_naflex_vision": True}])
def test_an_old_timm_has_no_towers_for_any_size(monkeypatch, options: dict) -> None:
    monkeypatch.setattr(timm, "__version__", "1.0.30")
    name = "ViT-B-32" if options else "ViT-B-16-SigLIP2-naflex"
    with pytest.raises(RuntimeError, match=r"NaFlex.*timm 1.0.31 or newer.*timm 1.0.30: pip install --upgrade timm"):
        open_clip.create_model(name, **options)


def test_the_version_is_checked_before_a_model_of_timm_is_built(monkeypatch) -> None:
    """The conversion builds one on the meta device to read its pooling. Versions before 1.0.23 cannot."""
    monkeypatch.setattr(timm, "__version__", "1.0.18")
    monkeypatch.setattr(timm, "create_model", None)
    vision = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": ""}
    with pytest.raises(RuntimeError, match=r"timm 1.0.31 or newer.*timm 1.0.18"):
        open_clip.convert.apply_naflex_vision_config({"vision_cfg": vision})


def test_without_timm_the_conversion_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RuntimeError, match="not installed: pip install timm"):
        open_clip.convert.apply_naflex_vision_config({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224"}})


# Image sizes


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "mixer_s32_224", "swin_tiny_patch4_window7_224"])
def test_image_sizes_that_the_trunk_supports(name: str) -> None:
    tower = TimmModel(name, 24, (64, 96)).eval()
    assert tower.image_size == (64, 96)
    assert tower(cases.images((64, 96))).shape == (2, 24)


def test_set_input_size_interpolates_position_embeddings() -> None:
    tower = TimmModel("test_vit", 24, 160)
    tower.load_state_dict(cases.weights(tower.state_dict()))
    state_dict = dict(tower.state_dict())
    tower.set_input_size(64)
    assert tower.eval()(cases.images(64)).shape == (2, 24)
    TimmModel("test_vit", 24, 64).resize_pos_embed(state_dict)
    torch.testing.assert_close(state_dict["trunk.pos_embed"], tower.trunk.pos_embed.detach())
    with pytest.raises(ValueError, match="MlpMixer of timm cannot change its image size"):
        TimmModel("mixer_s32_224", 24).set_input_size(64)


# Dropout


def test_patches_are_dropped_in_training_only() -> None:
    tower = TimmModel("test_vit", 24, 160, patch_drop=0.75)
    seen = []
    tower.trunk.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    tower(cases.images(160))
    tower.eval()(cases.images(160))
    assert seen == [1 + 25, 1 + 100]


def test_drop_rates_are_set_in_trunk_and_head() -> None:
    tower = TimmModel("test_vit", 24, 160, drop=0.3, drop_path=0.2)
    assert tower.head.drop.p == 0.3
    assert tower.trunk.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


def test_patch_dropout_raises_for_trunks_without_patches(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"test_convnext of timm .*patch_drop_rate=0.5.*no patches to drop"):
        create(tmp_path, config("test_convnext", 160), force_patch_dropout=0.5)


# Activations


@pytest.mark.parametrize(
    ("name", "kind", "approximate"),
    [
        ("test_vit", GELU, "none"),
        ("vit_base_patch16_siglip_224", GELU, "none"),
        ("vit_so400m_patch16_siglip_256", GELU, "tanh"),
        ("vit_base_patch32_clip_quickgelu_224", QuickGELU, None),
        ("convnext_atto", GELU, "none"),
    ],
)
def test_activations_are_replaced_by_those_of_the_package(name: str, kind: type, approximate: str | None) -> None:
    with torch.device("meta"):
        tower = TimmModel(name, 24, pool="", proj="none")
    acts = [module for module in tower.modules() if "gelu" in type(module).__name__.lower()]
    assert acts
    assert {type(module) for module in acts} == {kind}
    assert {getattr(module, "approximate", None) for module in acts} == {approximate}


def test_replaced_activations_do_not_change_features() -> None:
    tower = TimmModel("test_vit", 24, 160, proj="none").eval()
    trunk = timm.create_model("test_vit", num_classes=0, global_pool="avg").eval()
    trunk.load_state_dict(tower.trunk.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(tower(cases.images(160)), trunk(cases.images(160)))


# Training


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_recomputing_gives_the_same_gradients(name: str) -> None:
    gradients = []
    for enable in (False, True):
        tower = TimmModel(name, 24, 160)
        tower.load_state_dict(cases.weights(tower.state_dict()))
        tower.set_grad_checkpointing(enable)
        tower(cases.images(160)).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in tower.parameters()]))
    torch.testing.assert_close(*gradients)


def test_a_trunk_without_gradient_checkpointing_warns(caplog) -> None:
    tower = TimmModel("test_vit", 24, 160)
    tower.trunk = nn.Sequential()
    with caplog.at_level(logging.WARNING):
        tower.set_grad_checkpointing()
    assert "Sequential of timm has no gradient checkpointing" in caplog.text


def test_frozen_batch_norms_keep_their_activation() -> None:
    """timm fuses some batch norms with an activation."""
    tower = TimmModel("test_efficientnet", 24, 160)
    tower.load_state_dict(cases.weights(tower.state_dict()))
    with torch.no_grad():
        before = tower.eval()(cases.images(160))
        tower.lock(freeze_bn_stats=True)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in tower.modules())
        torch.testing.assert_close(tower.train()(cases.images(160)), before)


def test_synchronized_batch_norms_keep_their_activation(tmp_path: Path) -> None:
    model = create(tmp_path, config("test_efficientnet", 160, timm_proj="linear"))
    model.load_state_dict(cases.weights(model.state_dict()))
    with torch.no_grad():
        before = model.eval().encode_image(cases.images(160))
        model = build.synchronize_batch_norms(model)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
        torch.testing.assert_close(model.encode_image(cases.images(160)), before)


def test_unlocking_too_many_groups_warns(caplog) -> None:
    tower = TimmModel("test_vit", 24, 160)
    with caplog.at_level(logging.WARNING):
        tower.lock(99)
    assert "has 7 groups: unlocking 99 locks nothing" in caplog.text
    assert all(parameter.requires_grad for parameter in tower.parameters())


def test_parameters_without_weight_decay(tmp_path) -> None:
    model = create(tmp_path, config("test_vit", 160))
    assert {"visual.trunk.pos_embed", "visual.trunk.cls_token", "positional_embedding"} <= model.no_weight_decay()
    assert TimmModel("test_convnext", 24, 160, pool="abs_attn").no_weight_decay() >= {"head.pool.pos_embed"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_casts_the_whole_tower(precision: str, tmp_path) -> None:
    model = create(tmp_path, config("test_efficientnet", 160), precision=precision)
    dtype = open_clip.get_cast_dtype(precision)
    assert {x.dtype for x in model.visual.state_dict().values() if x.is_floating_point()} == {dtype}
    assert (model.logit_scale.dtype, model.ln_final.weight.dtype) == (torch.float32, torch.float32)
    with torch.no_grad():
        assert model.eval().encode_image(cases.images(160).to(dtype)).dtype == dtype


# Errors


def test_an_unknown_model_raises_with_similar_names() -> None:
    with pytest.raises(RuntimeError, match=rf"timm {timm.__version__} has no model 'convnext_bass'.*convnext_base"):
        TimmModel("convnext_bass", 24)


def test_timm_not_installed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RuntimeError, match="timm, which is not installed: pip install timm"):
        TimmModel("test_vit", 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "map"}, "test_vit of timm cannot change its pooling to pool='map'"),
        ({"pool": "abs_attn"}, "'abs_attn' needs a feature map, and VisionTransformer of timm has none"),
        ({"pool": "unknown", "proj": "none"}, "test_vit of timm .* cannot be built with .*global_pool='unknown'"),
        ({"proj": "conv"}, "proj is one of 'linear', 'mlp', 'none', '', None, got 'conv'"),
    ],
)
def test_invalid_heads_raise(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmModel("test_vit", 24, 160, **options)


def test_intermediates_of_a_trunk_without_them_raise() -> None:
    tower = TimmModel("test_vit", 24, 160)
    tower.trunk = nn.Sequential()
    with pytest.raises(ValueError, match="does not give its intermediate features"):
        tower.forward_intermediates(cases.images(160))


def test_every_architecture_of_timm_is_known() -> None:
    towers = [(registry.get_model_config(name) or {})["vision_cfg"] for name in open_clip.list_models()]
    names = {tower["timm_model_name"] for tower in towers if "timm_model_name" in tower}
    assert len(names) > 40
    added = {"fastvit_mci3", "fastvit_mci4", "vit_pe_core_small_patch16_384", "vit_pe_core_tiny_patch16_384"}
    assert {name for name in names if not timm.is_model(name)} <= (added if is_older("timm", "1.0.23") else set())
