"""Native models against open_clip_torch 3.3.0's recorded answers, and against transformers' CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import native_cases
from open_clip import model, pos_embed

FIXTURES = Path(__file__).parent / "fixtures"
LOCKS = json.loads((FIXTURES / "native_locks.json").read_text())
INIT = json.loads((FIXTURES / "native_init.json").read_text())


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    return torch.load(FIXTURES / "native_features.pt", weights_only=True)


def assert_same(ours: Any, theirs: Any, where: str, tolerance: float = 2e-5) -> None:
    """Equal structure and, relative to the largest value, equal numbers."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where} {key}", tolerance)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where} [{index}]", tolerance)
    elif theirs is None:
        assert ours is None, where
    else:
        assert ours.shape == theirs.shape, where
        assert ours.dtype == theirs.dtype, where
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < tolerance, f"{where}: {error:.1e} relative"


@pytest.mark.parametrize("case", native_cases.CASES)
def test_features_and_logits_are_open_clips(case: str, answers: dict[str, Any]) -> None:
    ours = native_cases.set_weights(native_cases.build(model, case))
    image, text = native_cases.inputs(case)
    with torch.no_grad():
        got = {"encode_image": ours.encode_image(image), "encode_text": ours.encode_text(text)}
        if "forward" in answers["models"][case]:
            got |= {"forward": ours(image, text), "logits": ours.get_logits(image, text)}
    assert_same(got, answers["models"][case], case)


@pytest.mark.parametrize("options", native_cases.INTERMEDIATES)
@pytest.mark.parametrize("case", native_cases.INTERMEDIATES_MODELS)
def test_intermediates_are_open_clips(case: str, options: str, answers: dict[str, Any]) -> None:
    ours = native_cases.set_weights(native_cases.build(model, case))
    with torch.no_grad():
        got = ours.forward_intermediates(*native_cases.inputs(case), **native_cases.INTERMEDIATES[options])
    assert_same(got, answers["intermediates"][f"{case}: {options}"], options)


@pytest.mark.parametrize("case", native_cases.LOCK_MODELS)
def test_locking_leaves_trainable_what_open_clip_does(case: str) -> None:
    for tower in ("image", "text"):
        for unlocked in range(6):
            ours = native_cases.build(model, case)
            getattr(ours, f"lock_{tower}_tower")(unlocked)
            trainable = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
            assert trainable == LOCKS[case][f"{tower} {unlocked}"], f"{tower} {unlocked}"


@pytest.mark.parametrize("case", native_cases.LOCK_MODELS)
def test_no_weight_decay_is_open_clips(case: str) -> None:
    assert sorted(native_cases.build(model, case).no_weight_decay()) == LOCKS[case]["no_weight_decay"]


@pytest.mark.parametrize("case", INIT)
def test_a_seed_gives_open_clips_initial_weights(case: str) -> None:
    torch.manual_seed(0)
    ours = native_cases.build(model, case).state_dict()
    assert list(ours) == list(INIT[case])
    for name, value in ours.items():
        recorded = INIT[case][name]
        assert float(value.std(correction=0)) == pytest.approx(recorded["std"], abs=1e-6), name
        assert value.flatten()[:3].tolist() == pytest.approx(recorded["first"], abs=1e-6), name


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("grid", [2, 7])
def test_resized_image_embeddings_are_open_clips(grid: int, antialias: bool, answers: dict[str, Any]) -> None:
    target = torch.nn.Module()
    target.visual = torch.nn.Module()
    target.visual.grid_size = (grid, grid)
    state_dict = {"visual.positional_embedding": native_cases.formula("grid", (26, 6))}
    model.resize_pos_embed(state_dict, target, antialias=antialias)
    expected = answers["resized"][f"image {grid} {antialias}"]
    assert_same(state_dict["visual.positional_embedding"], expected, f"{grid}", 1e-6)


@pytest.mark.parametrize("length", [4, 15])
def test_resized_text_embeddings_are_open_clips(length: int, answers: dict[str, Any]) -> None:
    text_cfg = native_cases.TEXT | {"context_length": length}
    for cls, key in ((model.CLIP, "positional_embedding"), (model.CustomTextCLIP, "text.positional_embedding")):
        target = cls(native_cases.EMBED_DIM, native_cases.VISION, text_cfg)
        state_dict = {key: native_cases.formula("text", (6, 16))}
        model.resize_text_pos_embed(state_dict, target)
        assert_same(state_dict[key], answers["resized"][f"text {length}"], key, 1e-6)


def test_interpolated_mae_embeddings_are_open_clips(answers: dict[str, Any]) -> None:
    class Mae:
        patch_embed = type("PatchEmbed", (), {"num_patches": 9})
        pos_embed = torch.zeros(1, 10, 4)

    checkpoint = {"pos_embed": native_cases.formula("mae", (1, 17, 4))}
    pos_embed.interpolate_pos_embed(Mae, checkpoint)
    assert_same(checkpoint["pos_embed"], answers["resized"]["mae"], "mae", 1e-6)


@pytest.mark.parametrize("cls_token", [False, True])
def test_sine_cosine_tables_are_open_clips(cls_token: bool, answers: dict[str, Any]) -> None:
    table = torch.from_numpy(pos_embed.get_2d_sincos_pos_embed(8, 3, cls_token))
    torch.testing.assert_close(table, answers["resized"][f"sincos {cls_token}"], rtol=0, atol=1e-12)


# ---- transformers ----


def from_transformers(theirs: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of transformers' CLIPModel under the names of CLIP."""
    source = dict(theirs.state_dict())
    found = {
        "logit_scale": source["logit_scale"],
        "text_projection": source["text_projection.weight"].T,
        "visual.proj": source["visual_projection.weight"].T,
        "token_embedding.weight": source["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": source["text_model.embeddings.position_embedding.weight"],
        "visual.class_embedding": source["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": source["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": source["vision_model.embeddings.position_embedding.weight"],
    }
    for ours, theirs_name in (
        ("ln_final", "text_model.final_layer_norm"),
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
    ):
        found |= {f"{ours}.{kind}": source[f"{theirs_name}.{kind}"] for kind in ("weight", "bias")}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    parts["attn.out_proj"] = "self_attn.out_proj"
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for layer in range(2):
            ours, block = f"{prefix}transformer.resblocks.{layer}", f"{tower}.encoder.layers.{layer}"
            for kind in ("weight", "bias"):
                found |= {f"{ours}.{a}.{kind}": source[f"{block}.{b}.{kind}"] for a, b in parts.items()}
                qkv = [source[f"{block}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                found[f"{ours}.attn.in_proj_{kind}"] = torch.cat(qkv)
    return found


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_features_are_those_of_transformers(activation: str) -> None:
    transformers = pytest.importorskip("transformers")
    common = {"hidden_act": activation, "num_hidden_layers": 2, "num_attention_heads": 2, "layer_norm_eps": 1e-5}
    text_cfg = {"hidden_size": 32, "intermediate_size": 128, "vocab_size": 50, "max_position_embeddings": 9}
    vision_cfg = {"hidden_size": 48, "intermediate_size": 192, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**common, **text_cfg, "eos_token_id": 49}, vision_config=common | vision_cfg, projection_dim=24
        )
    ).eval()
    ours = model.CLIP(
        24,
        {"layers": 2, "width": 48, "head_width": 24, "patch_size": 8, "image_size": 32},
        {"layers": 2, "width": 32, "heads": 2, "context_length": 9, "vocab_size": 50},
        quick_gelu=activation == "quick_gelu",
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # its own initialisation is so small that blocks would hardly matter
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours.load_state_dict(from_transformers(theirs))
    image = torch.randn(3, 3, 32, 32)
    text = torch.tensor([[48, 3, 49, 0, 0, 0, 0, 0, 0], [48, 1, 2, 3, 4, 5, 6, 7, 49], [48, 49, 0, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = theirs(pixel_values=image, input_ids=text)
        image_features, text_features, _ = ours(image, text)
        logits = ours.get_logits(image, text)[0]
    torch.testing.assert_close(image_features, expected.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(text_features, expected.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=1e-5, atol=1e-5)
