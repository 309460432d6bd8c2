"""Loading of checkpoints into models: layouts, prefixes, sizes, towers, and the errors."""

from __future__ import annotations

import logging

import pytest
import torch

import tiny_clip
from checkpoint_cases import (
    assert_same_weights,
    clip,
)
from open_clip.checkpoint.fit import _select_tower, load_checkpoint, load_tower_checkpoint, put_weights
from open_clip.checkpoint.key_prefixes import strip_prefixes
from open_clip.checkpoint.meta import NoInitialization
from open_clip.model import CLIP, CustomTextCLIP


def test_prefixes():
    value = torch.ones(1)
    assert list(strip_prefixes({"module._orig_mod.a.b": value})) == ["a.b"]
    assert list(strip_prefixes({"visual._orig_mod.proj": value, "module.a": value})) == ["visual.proj", "module.a"]


# Models


@pytest.mark.parametrize("from_class", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("to_class", [CLIP, CustomTextCLIP])
def test_layouts_of_the_text_tower(tmp_path, from_class, to_class):
    torch.save(clip(0, from_class).state_dict(), tmp_path / "file.pt")
    model, expected = clip(1, to_class), clip(0, to_class)
    assert load_checkpoint(model, tmp_path / "file.pt") == ([], [])
    assert_same_weights(model, expected)


@pytest.mark.parametrize("text", [{"embed_cls": True, "pool_type": "last"}, {"proj_type": "none"}])
def test_layouts_with_every_text_parameter(text):
    text = {**text, "width": 16} if "proj_type" in text else text
    plain, custom = clip(0, text=text), clip(1, CustomTextCLIP, text=text)
    put_weights(custom, plain.state_dict())
    put_weights(other := clip(2, text=text), custom.state_dict())
    assert_same_weights(plain, other)


def test_strict_loading_raises_and_leaves_the_model_unchanged(tmp_path):
    weights = clip(1).state_dict()
    weights["surplus"] = weights.pop("ln_final.bias")
    torch.save(weights, tmp_path / "file.pt")
    model = clip(0)
    with pytest.raises(
        RuntimeError, match=r"file.pt does not fit CLIP: 1 missing: ln_final.bias. 1 unexpected: surplus."
    ):
        load_checkpoint(model, tmp_path / "file.pt")
    assert_same_weights(model, clip(0))


def test_not_strict_loads_the_rest_and_returns_the_keys(tmp_path, caplog):
    weights = clip(1).state_dict()
    weights["surplus"] = weights.pop("ln_final.bias")
    torch.save(weights, tmp_path / "file.pt")
    model = clip(0)
    incompatible = load_checkpoint(model, tmp_path / "file.pt", strict=False)
    assert (incompatible.missing_keys, incompatible.unexpected_keys) == (["ln_final.bias"], ["surplus"])
    assert torch.equal(model.visual.proj, weights["visual.proj"])
    assert "in part: 1 missing: ln_final.bias. 1 unexpected: surplus." in caplog.text


@pytest.mark.parametrize("strict", [True, False])
def test_a_wrong_shape_is_always_an_error(strict):
    model = clip(0)
    with pytest.raises(RuntimeError, match=r"visual.proj is \[32, 8\] instead of \[32, 16\]"):
        put_weights(model, clip(1, embed_dim=8).state_dict(), strict=strict)
    assert_same_weights(model, clip(0))


def test_many_names_are_shortened():
    with pytest.raises(RuntimeError, match=r"\d+ missing: .* and \d+ more\.") as error:
        put_weights(clip(0), {"something": torch.ones(3)})
    assert len(str(error.value)) < 500


def test_logit_bias():
    """A bias that the file lacks becomes zero, which has no effect. A bias that the model lacks is an error."""
    with_bias = clip(0, init_logit_bias=-10.0)
    put_weights(with_bias, clip(1).state_dict())
    assert with_bias.logit_bias.item() == 0
    with pytest.raises(RuntimeError, match="init_logit_bias=-10"):
        put_weights(clip(1), with_bias.state_dict())


@pytest.mark.parametrize("nonscalar", [True, False])
def test_scalars_of_both_shapes(nonscalar):
    model = clip(0, nonscalar_logit_scale=nonscalar, init_logit_bias=-10.0)
    source = clip(0, nonscalar_logit_scale=not nonscalar, init_logit_bias=-5.0, init_logit_scale=1.5)
    put_weights(model, source.state_dict())
    assert (model.logit_scale.item(), model.logit_bias.item()) == (1.5, -5.0)
    assert model.logit_scale.ndim == int(nonscalar)


def test_position_embeddings_are_resized():
    model = clip(0, vision={"image_size": 48}, text={"context_length": 20})
    weights = clip(1).state_dict()
    put_weights(model, weights)
    assert model.visual.positional_embedding.shape == (37, 32)
    assert torch.equal(model.visual.positional_embedding[0], weights["visual.positional_embedding"][0])
    assert model.positional_embedding.shape == (20, 32)
    assert weights["positional_embedding"].shape == (12, 32), "the caller's state dict is its own"


# Prefixes and extra entries

PREFIXES = ["clip.", "clip_model.", "net.", "backbone.", "student.", "_forward_module.", "_fsdp_wrapped_module."]
PREFIXES += ["cond_stage_model.model.", "base_model.model.", "module.clip.", "clip.module."]


@pytest.mark.parametrize("model_class", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_common_prefix_is_removed(prefix, model_class, caplog):
    caplog.set_level(logging.INFO)
    model = clip(0, model_class)
    put_weights(model, {prefix + key: value for key, value in clip(1).state_dict().items()})
    assert_same_weights(model, clip(1, model_class))
    assert "of all names" in caplog.text


@pytest.mark.parametrize("model_class", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("prefix", ["model.", "clip."])
def test_entries_without_the_prefix_are_ignored_with_a_warning(prefix, model_class, caplog):
    model = clip(0, model_class)
    weights = {prefix + key: value for key, value in clip(1, model_class).state_dict().items()}
    put_weights(model, {"loss.weight": torch.ones(1), **weights})
    assert_same_weights(model, clip(1, model_class))
    assert f"start with {prefix!r} and ignoring loss.weight." in caplog.text


def test_a_prefix_that_does_not_help_is_named():
    weights = {f"clip.{key}": value for key, value in clip(1).state_dict().items() if "ln_final" not in key}
    with pytest.raises(RuntimeError, match=r"All names start with 'clip\.'"):
        put_weights(clip(0), weights)


def test_two_models_in_a_file_raise():
    weights = clip(1).state_dict()
    both = {f"{prefix}.{key}": value for prefix in ("student", "teacher") for key, value in weights.items()}
    with pytest.raises(RuntimeError, match="does not fit"):
        put_weights(clip(0), both)
    with pytest.raises(RuntimeError, match="does not fit"):
        put_weights(clip(0), {**weights, "extra": torch.ones(1)})


def test_masks_and_openai_sizes_are_ignored():
    extras = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size", "attn_mask")}
    extras |= {"text.attn_mask": torch.zeros(3, 3), "text_decoder.attn_mask": torch.zeros(3, 3)}
    model = clip(0)
    assert put_weights(model, {**clip(1).state_dict(), **extras}) == ([], [])
    assert_same_weights(model, clip(1))


@pytest.mark.parametrize("prefix", ["backbone.", "clip.visual."])
def test_the_prefix_of_a_tower_is_removed(tmp_path, prefix):
    weights = {prefix + key: value for key, value in clip(1).visual.state_dict().items()}
    torch.save(weights, tmp_path / "file.pt")
    model = clip(0)
    assert load_tower_checkpoint(model, "visual", tmp_path / "file.pt") == ([], [])
    assert torch.equal(model.visual.proj, clip(1).visual.proj)


# Towers


@pytest.mark.parametrize("to_class", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("source", ["tower", "plain", "custom"])
@pytest.mark.parametrize("tower", ["visual", "text"])
def test_one_tower(tmp_path, tower, source, to_class):
    """From a file of the tower or of a whole model, into either layout. The other tower is unchanged."""
    custom = clip(1, CustomTextCLIP)
    weights = {"tower": getattr(custom, tower), "plain": clip(1), "custom": custom}[source].state_dict()
    torch.save(weights, tmp_path / "file.pt")
    model = clip(0, to_class)
    assert load_tower_checkpoint(model, tower, tmp_path / "file.pt") == ([], [])
    from_file, before = clip(1, to_class).state_dict(), clip(0, to_class).state_dict()
    for key, value in model.state_dict().items():
        of_visual = key.startswith("visual.")
        changed = key != "logit_scale" and of_visual == (tower == "visual")
        assert torch.equal(value, (from_file if changed else before)[key]), key


def test_a_partly_loaded_tower_is_a_warning(tmp_path, caplog):
    weights = clip(1).visual.state_dict()
    weights["surplus"] = weights.pop("proj")
    torch.save(weights, tmp_path / "file.pt")
    incompatible = load_tower_checkpoint(clip(0), "visual", tmp_path / "file.pt")
    assert (incompatible.missing_keys, incompatible.unexpected_keys) == (["visual.proj"], ["visual.surplus"])
    assert "in part: 1 missing: visual.proj." in caplog.text


def test_a_file_with_timm_names(tmp_path):
    vision = {"timm_model_name": "test_vit", "timm_proj": "linear", "timm_pool": "", "image_size": 160}
    cfg = {**tiny_clip.config(), "vision_cfg": vision}
    torch.manual_seed(0)
    source, model = CustomTextCLIP(**cfg), CustomTextCLIP(**cfg)
    torch.save(source.visual.trunk.state_dict(), tmp_path / "file.pt")
    assert load_tower_checkpoint(model, "visual", tmp_path / "file.pt") == (["visual.head.proj.weight"], [])
    assert torch.equal(model.visual.trunk.pos_embed, source.visual.trunk.pos_embed)


@pytest.mark.parametrize("prefix", ["text.transformer.", "transformer.", ""])
def test_a_file_with_hugging_face_names(prefix):
    expected = {f"text.transformer.{name}": torch.ones(1) for name in ("embeddings.weight", "encoder.weight")}
    given = {f"{prefix}{name}": torch.ones(1) for name in ("embeddings.weight", "encoder.weight", "pooler.weight")}
    found = _select_tower(given, "text", expected)
    assert found.keys() == {*expected, "text.transformer.pooler.weight"}


def test_a_tower_of_another_model_raises(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "file.pt")
    with pytest.raises(RuntimeError, match="no weights of this text tower"):
        load_tower_checkpoint(clip(0), "text", tmp_path / "file.pt")
    torch.save(clip(1, embed_dim=8).state_dict(), tmp_path / "file.pt")
    with pytest.raises(RuntimeError, match=r"visual.proj is \[32, 8\]"):
        load_tower_checkpoint(clip(0), "visual", tmp_path / "file.pt")


def test_the_position_embedding_of_a_tower_is_resized(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    torch.save(clip(1).visual.state_dict(), tmp_path / "file.pt")
    model = clip(0, vision={"image_size": 48})
    load_tower_checkpoint(model, "visual", tmp_path / "file.pt")
    assert torch.equal(model.visual.proj, clip(1).visual.proj)
    assert "resized from 4x4 to 6x6" in caplog.text


# Explanations of mismatches


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": {"width": 48}}, r"text width 48 \(the model's: 32\)"),
        ({"text": {"layers": 2}}, r"text layers 2 \(the model's: 1\)"),
        ({"text": {"vocab_size": 99}}, r"vocabulary 99 \(the model's: 64\)"),
        ({"vision": {"layers": 3}}, r"image layers 3 \(the model's: 1\)"),
        ({"vision": {"patch_size": 16}}, r"patch size 16 \(the model's: 8\)"),
    ],
)
@pytest.mark.parametrize("model_class", [CLIP, CustomTextCLIP])
def test_differences_from_another_model_are_named(model_class, changes, words):
    with pytest.raises(RuntimeError, match=words) as error:
        put_weights(clip(0), clip(1, model_class, **changes).state_dict())
    assert "configuration that it was trained with" in str(error.value)


@pytest.mark.parametrize(
    ("foreign", "words"),
    [
        ({"visual.trunk.stem.0.weight": torch.ones(2)}, r"image tower timm's \(the model's: a native ViT\)"),
        ({"visual.layer1.0.conv1.weight": torch.ones(2)}, r"image tower a ResNet \(the model's: a native ViT\)"),
        ({"text.transformer.embeddings.x": torch.ones(2)}, r"text tower Hugging Face's \(the model's: native\)"),
        ({"visual.class_embedding": torch.ones(2)}, r"text tower absent \(the model's: native\)"),
        ({**clip().state_dict(), "text_decoder.x": torch.ones(2)}, r"captioning decoder present \(the model"),
    ],
)
def test_other_kinds_of_towers_are_named(foreign, words):
    with pytest.raises(RuntimeError, match=words):
        put_weights(clip(0), foreign)


def test_the_architecture_of_a_checkpoint_is_suggested(tmp_path):
    from open_clip.config import get_model_config

    with torch.device("meta"), NoInitialization():
        weights = CLIP(**get_model_config("ViT-B-16")).state_dict()
        model = CLIP(**get_model_config("ViT-L-14"))
    with pytest.raises(RuntimeError, match=r"these have such towers: .*ViT-B-16, "):
        put_weights(model, weights)
