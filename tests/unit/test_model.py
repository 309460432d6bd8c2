"""CLIP and CustomTextCLIP: inputs and outputs, building, casting, locking and compiling."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from open_clip import model as models
from open_clip.config import CLIPTextCfg, CLIPVisionCfg
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer.layers import GELU, LayerNorm, LayerNormFp32, QuickGELU

VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 6, "vocab_size": 30, "width": 16, "heads": 2, "layers": 2}
BOTH = pytest.mark.parametrize("cls", [CLIP, CustomTextCLIP])


def build(cls: type = CLIP, vision: dict | None = None, text: dict | None = None, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return cls(12, VISION | (vision or {}), TEXT | (text or {}), **kwargs).eval()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.tensor([[20, 4, 9, 11, 13, 29], [20, 8, 14, 29, 0, 0], [20, 29, 0, 0, 0, 0]])
    return torch.randn(3, 3, 16, 16, generator=generator), text


# Inputs and outputs


@BOTH
def test_forward_returns_normalized_features_and_the_scale(cls: type, batch: tuple) -> None:
    model = build(cls)
    image_features, text_features, scale = model(*batch)
    torch.testing.assert_close(image_features, F.normalize(model.encode_image(batch[0]), dim=-1))
    torch.testing.assert_close(text_features, model.encode_text(batch[1], normalize=True))
    torch.testing.assert_close(image_features.norm(dim=-1), torch.ones(3))
    assert float(scale.detach()) == pytest.approx(1 / 0.07)


@BOTH
def test_forward_accepts_only_images_or_only_texts(cls: type, batch: tuple) -> None:
    model = build(cls)
    image_features, nothing, _ = model(batch[0])
    assert image_features.shape == (3, 12)
    assert nothing is None
    nothing, text_features, _ = model(text=batch[1])
    assert nothing is None
    assert text_features.shape == (3, 12)


@BOTH
def test_bias_and_dictionary(cls: type, batch: tuple) -> None:
    model = build(cls, init_logit_bias=-10.0, nonscalar_logit_scale=True)
    assert len(model(*batch)) == 4
    assert model.logit_scale.shape == model.logit_bias.shape == (1,)
    model.output_dict = True
    output = model(*batch)
    assert list(output) == ["image_features", "text_features", "logit_scale", "logit_bias"]
    image_logits, text_logits = model.get_logits(*batch)
    expected = output["logit_scale"] * output["image_features"] @ output["text_features"].T - 10.0
    torch.testing.assert_close(image_logits, expected)
    assert torch.equal(text_logits, image_logits.T)
    assert list(build(cls, output_dict=True)(*batch)) == ["image_features", "text_features", "logit_scale"]


def test_both_classes_give_the_same_features(batch: tuple) -> None:
    clip, custom = build(CLIP), build(CustomTextCLIP)
    custom.load_state_dict(models.convert_to_custom_text_state_dict(clip.state_dict()))
    for a, b in zip(clip(*batch), custom(*batch), strict=True):
        assert torch.equal(a, b)
    assert not isinstance(custom, CLIP)
    assert "forward" not in vars(CLIP)
    assert "forward" not in vars(CustomTextCLIP)
    assert not hasattr(clip, "text")


def test_converting_a_custom_state_dict_changes_nothing() -> None:
    state_dict = build(CustomTextCLIP).state_dict()
    assert models.convert_to_custom_text_state_dict(state_dict) is state_dict


@BOTH
def test_features_of_towers_with_output_tokens(cls: type, batch: tuple) -> None:
    model = build(cls, {"output_tokens": True}, {"output_tokens": True})
    features, tokens = model.encode_image(batch[0], normalize=True)
    assert tokens.shape == (3, 4, 32)
    image_features, text_features, _ = model(*batch)
    assert torch.equal(image_features, features)
    assert text_features.shape == (3, 12)
    assert model.get_logits(*batch)[0].shape == (3, 3)


def test_logits_of_intermediates_need_both_inputs(batch: tuple) -> None:
    with pytest.raises(ValueError, match="give both"):
        build().forward_intermediates(image=batch[0], output_logits=True)


@BOTH
def test_every_parameter_gets_a_gradient(cls: type, batch: tuple) -> None:
    model = build(cls, init_logit_bias=0.0).train()
    image_features, text_features, scale, bias = model(*batch)
    (scale * image_features @ text_features.T + bias).logsumexp(0).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@BOTH
def test_checkpointing_is_set_in_both_towers(cls: type) -> None:
    model = build(cls)
    model.set_grad_checkpointing()
    stacks = [module for module in model.modules() if hasattr(module, "grad_checkpointing")]
    assert len(stacks) == 2
    assert all(stack.grad_checkpointing for stack in stacks)
    model.set_grad_checkpointing(False)
    assert not any(stack.grad_checkpointing for stack in stacks)


# Building


@BOTH
def test_attributes_of_a_model(cls: type) -> None:
    model = build(cls)
    assert (model.context_length, model.vocab_size) == (6, 30)
    assert model.visual.image_size == (16, 16)
    assert model.logit_bias is None
    assert model.output_dict is False


def test_configurations_may_be_dataclasses(batch: tuple) -> None:
    torch.manual_seed(0)
    model = CLIP(12, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT)).eval()
    assert torch.equal(model(*batch)[0], build()(*batch)[0])


def test_a_typo_in_a_configuration_raises() -> None:
    with pytest.raises(ValueError, match="did you mean 'pool_type'"):
        build(text={"pool_typ": "eos"})


def test_activations_and_norms_follow_the_arguments() -> None:
    def kinds(**kwargs: Any) -> set[type]:
        found = {type(module) for module in build(**kwargs).modules()}
        return found & {GELU, QuickGELU, LayerNorm, LayerNormFp32}

    assert kinds() == {GELU, LayerNorm}
    assert kinds(quick_gelu=True) == {QuickGELU, LayerNorm}
    assert kinds(cast_dtype=torch.bfloat16) == {GELU, LayerNormFp32}
    assert kinds(cast_dtype=torch.float32) == {GELU, LayerNorm}
    with pytest.raises(ValueError, match="no effect on QuickGELU"):
        build(vision={"act_kwargs": {"approximate": "tanh"}}, quick_gelu=True)


@BOTH
def test_a_model_on_the_meta_device_is_filled_by_assignment(cls: type, batch: tuple) -> None:
    real = build(cls, {"pos_embed_type": "sin_cos_2d"})
    state = torch.get_rng_state()
    with torch.device("meta"):
        empty = cls(12, VISION | {"pos_embed_type": "sin_cos_2d"}, TEXT)
    assert torch.equal(torch.get_rng_state(), state), "nothing may be drawn for weights that are not there"
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(real.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    for a, b in zip(empty.eval()(*batch), real(*batch), strict=True):
        assert torch.equal(a, b)
    trained = [name for name, parameter in real.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in empty.named_parameters() if parameter.requires_grad] == trained


def test_forward_on_meta(batch: tuple) -> None:
    with torch.device("meta"):
        model = CLIP(12, VISION, TEXT, quick_gelu=True)
    features = model(batch[0].to("meta"), batch[1].to("meta"))[0]
    assert features.is_meta
    assert features.shape == (3, 12)


@BOTH
def test_copies_are_independent(cls: type, batch: tuple) -> None:
    model = build(cls)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert model.encode_text(batch[1]).abs().sum() > 0
    assert twin.encode_text(batch[1]).abs().sum() == 0


@BOTH
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_in_one_graph(cls: type, checkpointing: bool, batch: tuple) -> None:
    torch._dynamo.reset()
    model = build(cls, {"patch_dropout": 0.5}, quick_gelu=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for a, b in zip(compiled(*batch), model(*batch), strict=True):
        torch.testing.assert_close(a, b)
    model.train().set_grad_checkpointing(checkpointing)
    compiled(*batch)[0].sum().backward()
    assert model.visual.conv1.weight.grad is not None


# Precision


@pytest.mark.parametrize(
    ("precision", "cast", "given"),
    [
        ("fp32", None, None),
        ("amp", None, None),
        ("amp_bf16", None, None),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16, torch.float16),
        ("pure_bf16", None, torch.bfloat16),
        ("pure_fp16", None, torch.float16),
    ],
)
def test_dtypes_of_a_precision(precision: str, cast: torch.dtype | None, given: torch.dtype | None) -> None:
    assert models.get_cast_dtype(precision) == cast
    assert models.get_input_dtype(precision) == given


@BOTH
@pytest.mark.parametrize("text", [{}, {"proj_bias": True}])
def test_low_precision_does_not_cast_norms_and_embeddings(cls: type, text: dict, batch: tuple) -> None:
    vision = {"ls_init_value": 0.1, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 2}
    model = build(cls, vision, {**text, "qk_norm": True}, cast_dtype=torch.bfloat16)
    expected = model(*batch)
    models.convert_weights_to_lp(model, torch.bfloat16)
    full = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    for name in full:
        assert any(part in name for part in ("ln_", "embedding", "logit_scale", "gamma", "query")), name
    half = {name.removeprefix("text.") for name, _ in model.named_parameters() if name not in full}
    assert {"visual.proj", "visual.conv1.weight", "visual.attn_pool.attn.k_proj_weight"} <= half
    assert {"transformer.resblocks.0.attn.in_proj_bias", "transformer.resblocks.1.mlp.c_fc.weight"} <= half
    assert not any("ln_" in name for name in half)
    got = model(batch[0].bfloat16(), batch[1])
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=0, atol=0.03)


@BOTH
def test_pure_low_precision(cls: type, batch: tuple) -> None:
    model = build(cls)
    expected = model(*batch)
    got = model.to(torch.bfloat16)(batch[0].bfloat16(), batch[1])
    torch.testing.assert_close(got[1].float(), expected[1], rtol=0, atol=0.03)


# OpenAI's archives


@pytest.mark.parametrize("cast_dtype", [torch.float16, torch.bfloat16, None])
def test_the_configuration_is_inferred_from_an_openai_state_dict(cast_dtype: torch.dtype | None, batch: tuple) -> None:
    vision, text = {"width": 64, "head_width": 64, "layers": 3}, {"width": 64, "heads": 1}
    original = build(vision=vision, text=text, quick_gelu=True)
    models.convert_weights_to_fp16(original)
    archive = original.state_dict() | {
        key: torch.tensor(0) for key in ("input_resolution", "context_length", "vocab_size")
    }
    model = models.build_model_from_openai_state_dict(archive, cast_dtype=cast_dtype)
    assert not model.training
    assert (model.visual.image_size, model.context_length, model.vocab_size) == ((16, 16), 6, 30)
    assert len(model.visual.transformer.resblocks) == 3
    assert len(model.transformer.resblocks) == 2
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.visual.conv1.weight.dtype == (cast_dtype or torch.float32)
    assert model.positional_embedding.dtype == torch.float32
    got = model.float()(*batch)
    for a, b in zip(got, original.float()(*batch), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.03 if cast_dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("cast_dtype", [torch.float16, None])
def test_training_does_not_change_the_state_dict_the_model_was_built_from(cast_dtype: torch.dtype | None) -> None:
    archive = build(vision={"width": 64, "head_width": 64}, text={"width": 64, "heads": 1}).state_dict()
    before = {key: value.clone() for key, value in archive.items()}
    model = models.build_model_from_openai_state_dict(archive, cast_dtype=cast_dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)
    assert all(torch.equal(archive[key], value) for key, value in before.items())


# Preprocessing and tokenization


@BOTH
@pytest.mark.parametrize("output_dict", [False, True])
def test_trace_has_the_three_methods(cls: type, output_dict: bool, batch: tuple, tmp_path: Path) -> None:
    """A saved trace can be loaded without this package."""
    model = build(cls, init_logit_bias=-10.0, output_dict=output_dict)
    traced = models.trace_model(model, batch_size=3)
    assert traced.visual.image_size == (16, 16)
    torch.jit.save(traced, tmp_path / "traced.pt")
    for one in (traced, torch.jit.load(tmp_path / "traced.pt")):
        torch.testing.assert_close(one(*batch), model(*batch))
        torch.testing.assert_close(one.encode_image(batch[0]), model.encode_image(batch[0]))
        torch.testing.assert_close(one.encode_text(batch[1]), model.encode_text(batch[1]))


@BOTH
def test_the_preprocessing_configuration_is_stored_in_the_model(cls: type) -> None:
    model = build(cls)
    assert models.get_model_preprocess_cfg(model) == {"size": (16, 16)}
    cfg = {"size": 16, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "resize_mode": "squash"}
    models.set_model_preprocess_cfg(model, cfg)
    assert models.get_model_preprocess_cfg(model) == cfg
    assert model.visual.image_mean == (0.1, 0.2, 0.3)
    assert model.visual.preprocess_cfg is not cfg


@BOTH
def test_the_tokenization_configuration_is_read_from_the_model(cls: type) -> None:
    assert models.get_model_tokenize_cfg(build(cls)) == {"context_length": 6, "vocab_size": 30}
    assert models.get_model_tokenize_cfg(nn.Linear(1, 1)) == {}
