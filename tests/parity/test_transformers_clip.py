"""Features equal those of transformers' CLIPModel and SiglipModel, for weights converted in both directions."""

from __future__ import annotations

import json
import logging

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, SiglipConfig, SiglipModel

import open_clip
import tiny_clip
from open_clip import recipe
from open_clip.convert import from_transformers, to_plain_layout, to_transformers, transformers_config
from open_clip.convert.__main__ import main
from open_clip.push_to_hf_hub.for_transformers import save_for_transformers

TOLERANCE = {"rtol": 0, "atol": 2e-5}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 12,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
SIGLIP_TOWER = (64, 2, 4, 256, 32)


def randomise(model):
    """Set weights that all affect the features. Initial weights are often zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if ("norm" in name or "ln_" in name) and name.endswith("weight"):
                parameter.add_(1)
            if name == "logit_scale":
                parameter.fill_(1.3)
    return model.eval()


def clip(text=(), vision=(), eos=63, act="quick_gelu", projection_dim=20):
    common = {"hidden_act": act, "projection_dim": projection_dim}
    text = {**TEXT, **common, "eos_token_id": eos, **dict(text)}
    vision = {**VISION, **common, **dict(vision)}
    return randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim)))


def siglip(act="gelu_pytorch_tanh"):
    width, layers, heads, mlp_width, patch_size = SIGLIP_TOWER
    tower = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": act}
    vision = {**tower, "intermediate_size": mlp_width, "patch_size": patch_size, "image_size": 96}
    text = {**TEXT, "hidden_size": 48, "num_attention_heads": 3, "projection_size": width, "hidden_act": act}
    return randomise(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))


@pytest.fixture
def small_siglip_tower(monkeypatch):
    """Replace timm's SigLIP tower by one with narrow blocks, with the same name."""
    create_model = timm.create_model

    def create(name, **kwargs):
        assert name == "vit_base_patch32_siglip_256"
        return create_model(name, embed_dim=64, depth=2, num_heads=4, **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(transformers_config, "SIGLIP_TOWERS", {SIGLIP_TOWER: "vit_base_patch32_siglip_256"})


def texts(end=63, pad=0):
    """Return ids [2, 12]: a text that is padded, and one that fills the context."""
    return torch.tensor([[60, 4, 9, 11, end, *[pad] * 7], [60, 8, 14, 3, 5, 7, 9, 1, 2, 4, 6, end]])


@torch.no_grad()
def assert_same(ours, theirs, ids):
    ours.eval()
    size = ours.visual.image_size[0]
    images = tiny_clip.inputs(size)[0]
    their_output = theirs(input_ids=ids, pixel_values=images)
    image_features, text_features = ours.encode_image(images, normalize=True), ours.encode_text(ids, normalize=True)
    torch.testing.assert_close(image_features, their_output.image_embeds, **TOLERANCE)
    torch.testing.assert_close(text_features, their_output.text_embeds, **TOLERANCE)
    torch.testing.assert_close(ours.get_logits(images, ids)[0], their_output.logits_per_image, **TOLERANCE)


# From transformers


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("eos", [2, 63, 40])
def test_a_clip_repository(tmp_path, act, eos, custom_text):
    """Old configurations have the wrong eos_token_id 2. Then the highest id ends the text."""
    theirs = clip(eos=eos, act=act)
    theirs.save_pretrained(tmp_path)
    ours = open_clip.create_model(f"local-dir:{tmp_path}", force_custom_text=custom_text)
    assert_same(ours, theirs, texts(40, pad=63) if eos == 40 else texts())
    assert ours.visual.proj.is_contiguous()


@pytest.mark.parametrize("safe", [True, False])
def test_a_repository_on_the_hub(tmp_path, monkeypatch, safe):
    """The repository has no open_clip_config.json, and its weights may be a pickle of tensors."""
    theirs = clip()
    theirs.save_pretrained(tmp_path)
    if not safe:
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "preprocessor_config.json").write_text('{"size": 32, "image_mean": [0.1, 0.2, 0.3]}')

    def fetch(model_id, filename=None, revision=None, cache_dir=None):
        assert (model_id, revision) == ("org/name", "main")
        path = tmp_path / (filename or "open_clip_pytorch_model.bin")
        if not path.is_file():
            raise FileNotFoundError(f"No {filename} of {model_id}")
        return str(path)

    monkeypatch.setattr(recipe, "download_pretrained_from_hf", fetch)
    ours = open_clip.create_model("hf-hub:org/name@main")
    assert_same(ours, theirs, texts())
    assert open_clip.get_model_preprocess_cfg(ours)["mean"] == [0.1, 0.2, 0.3]
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"No open_clip_config.json of org/name"):
        open_clip.create_model("hf-hub:org/name@main")


def test_epsilon_and_sizes(tmp_path):
    theirs = clip({"layer_norm_eps": 1e-2}, {"layer_norm_eps": 1e-3, "intermediate_size": 173}, act="gelu")
    theirs.save_pretrained(tmp_path)
    assert_same(open_clip.create_model(f"local-dir:{tmp_path}"), theirs, texts())


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_a_siglip_repository(tmp_path, small_siglip_tower, act):
    theirs = siglip(act)
    theirs.save_pretrained(tmp_path)
    ours = open_clip.create_model(f"local-dir:{tmp_path}")
    assert_same(ours, theirs, texts())
    assert type(ours) is open_clip.CustomTextCLIP


def test_a_transformers_file_for_a_named_model(tmp_path):
    """Also with the position_ids that releases before 4.31 stored."""
    theirs = clip(act="gelu")
    theirs.save_pretrained(tmp_path / "theirs")
    cfg = transformers_config.model_cfg_from_transformers(theirs.config.to_dict(), "config.json")
    name = tiny_clip.write_folder(tmp_path / "ours", cfg)
    assert_same(open_clip.create_model(name, pretrained=str(tmp_path / "theirs/model.safetensors")), theirs, texts())
    weights = {**theirs.state_dict(), "text_model.embeddings.position_ids": torch.arange(12)[None]}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert_same(open_clip.create_model(name, pretrained=str(tmp_path / "pytorch_model.bin")), theirs, texts())
    for tower in ("image", "text"):
        model = open_clip.create_model(name, **{f"pretrained_{tower}_path": str(tmp_path / "pytorch_model.bin")})
        encode = getattr(model.eval(), f"encode_{tower}")
        given = tiny_clip.inputs()[0] if tower == "image" else texts()
        their_encode = theirs.get_image_features if tower == "image" else theirs.get_text_features
        with torch.no_grad():
            torch.testing.assert_close(encode(given), their_encode(given).pooler_output, **TOLERANCE)


def test_the_activation_in_the_configuration_next_to_the_file_is_compared(tmp_path):
    clip(act="quick_gelu").save_pretrained(tmp_path)
    cfg = transformers_config.model_cfg_from_transformers(clip(act="gelu").config.to_dict(), "config.json")
    with pytest.warns(UserWarning, match="QuickGELU mismatch: .* were trained with quick_gelu=True"):
        open_clip.create_model(
            tiny_clip.write_folder(tmp_path / "ours", cfg), pretrained=str(tmp_path / "model.safetensors")
        )


def test_old_configurations(tmp_path):
    """Defaults are omitted, and `text_config_dict` takes precedence over `text_config`, as in transformers."""
    config = {
        "model_type": "clip",
        "projection_dim": 20,
        "text_config": {"hidden_size": 999},
        "text_config_dict": {**TEXT, "projection_dim": 20},
        "vision_config": {**VISION, "projection_dim": 20},
    }
    theirs = CLIPConfig.from_dict(config)
    ours = transformers_config.model_cfg_from_transformers(config, "config.json")
    assert ours == transformers_config.model_cfg_from_transformers(theirs.to_dict(), "config.json")
    assert ours["text_cfg"]["width"] == 32
    assert ours["quick_gelu"] is True
    empty = transformers_config.model_cfg_from_transformers({"model_type": "clip"}, "config.json")
    assert empty == transformers_config.model_cfg_from_transformers(CLIPConfig().to_dict(), "config.json")
    empty = transformers_config.model_cfg_from_transformers({"model_type": "siglip"}, "config.json")
    assert empty == transformers_config.model_cfg_from_transformers(SiglipConfig().to_dict(), "config.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "has the model_type 'bert'"),
        ({"model_type": "clip", "text_config": {"hidden_act": "gelu"}}, "QuickGELU in one tower only"),
        ({"model_type": "clip", "text_config": {"hidden_act": "relu"}}, "relu"),
        ({"model_type": "clip", "vision_config": {"num_channels": 4}}, "4 channels"),
        ({"model_type": "siglip", "vision_config": {"hidden_size": 777}}, "an image tower that is not in timm"),
        ({"model_type": "siglip", "text_config": {"projection_size": 7}}, "text features have the width 7, image"),
    ],
)
def test_unsupported_configurations_raise(config, message):
    if "relu" in message:
        config = {**config, "vision_config": {"hidden_act": "relu"}}
    with pytest.raises(ValueError, match=message):
        transformers_config.model_cfg_from_transformers(config, "config.json")


@pytest.mark.parametrize(
    ("preprocessor", "expected"),
    [
        ({"size": 224, "do_center_crop": True, "crop_size": 224}, ("bicubic", "shortest")),
        ({"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}, ("bicubic", "shortest")),
        ({"size": {"height": 384, "width": 384}, "resample": 2}, ("bilinear", "squash")),
    ],
)
def test_preprocessing(preprocessor, expected):
    cfg = transformers_config.preprocess_cfg_from_transformers(preprocessor, "preprocessor_config.json")
    assert (cfg["interpolation"], cfg["resize_mode"]) == expected


# To transformers


def test_a_round_trip_is_bit_identical(small_siglip_tower):
    for theirs, is_siglip in ((clip(), False), (siglip(), True)):
        weights = theirs.state_dict()
        back = to_transformers(to_plain_layout(from_transformers(weights)), is_siglip)
        assert back.keys() == weights.keys()
        for key, value in weights.items():
            assert torch.equal(back[key], value), key


def test_unchanged_tensors_are_shared():
    weights = clip().state_dict()
    converted = from_transformers(weights)
    ours, theirs = converted["transformer.resblocks.0.mlp.c_fc.weight"], "text_model.encoder.layers.0.mlp.fc1.weight"
    assert ours.data_ptr() == weights[theirs].data_ptr()
    back = to_transformers(converted, siglip=False)
    assert back[theirs].data_ptr() == weights[theirs].data_ptr()
    fused = converted["visual.transformer.resblocks.0.attn.in_proj_weight"]
    assert back["vision_model.encoder.layers.0.self_attn.q_proj.weight"].data_ptr() == fused.data_ptr()


CLIP_CONFIGS = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "tanh": {"text": {"act_kwargs": {"approximate": "tanh"}}},
    "epsilon": {"vision": {"norm_kwargs": {"eps": 1e-3}}},
    "eos": {"text": {"pool_type": "eos", "eos_id": 40}},
    "custom text": {"custom_text": True},
    "nonscalar": {"nonscalar_logit_scale": True},
}


@pytest.mark.parametrize("case", CLIP_CONFIGS)
def test_our_clip_in_transformers(tmp_path, case):
    changes = CLIP_CONFIGS[case]
    name = tiny_clip.folder(tmp_path / "ours", **changes)
    ours = randomise(open_clip.create_model(name))
    save_for_transformers(ours, None, tiny_clip.config(**changes), tmp_path / "theirs")
    theirs = CLIPModel.from_pretrained(tmp_path / "theirs").eval()
    assert_same(ours, theirs, texts(40, pad=63) if case == "eos" else texts())
    again = open_clip.create_model(f"local-dir:{tmp_path / 'theirs'}")
    for key, value in to_plain_layout(ours.state_dict()).items():
        assert torch.equal(again.state_dict()[key], value.reshape(again.state_dict()[key].shape)), key


def test_our_siglip_in_transformers(tmp_path, small_siglip_tower):
    cfg = transformers_config.model_cfg_from_transformers(siglip().config.to_dict(), "config.json")
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    ours = randomise(open_clip.create_model(tiny_clip.write_folder(tmp_path / "ours", cfg, preprocess_cfg)))
    save_for_transformers(ours, None, cfg, tmp_path / "theirs")
    assert_same(ours, SiglipModel.from_pretrained(tmp_path / "theirs").eval(), texts())
    again = open_clip.create_model(f"local-dir:{tmp_path / 'theirs'}")
    assert open_clip.get_model_preprocess_cfg(again) == open_clip.get_model_preprocess_cfg(ours)
    for key, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ("coca_ViT-B-32", "is a CoCa"),
        ("convnext_base", "the image tower convnext_base of timm"),
        ("RN50", "the image tower ModifiedResNet"),
        ("roberta-ViT-B-32", "text tower roberta-base"),
        ("ViT-L-14-CLIPA", "the image tower has no_ln_pre=True"),
        (tiny_clip.config(init_logit_bias=-10.0), "a logit bias"),
        (tiny_clip.config(text={"pool_type": "last"}), "pools text by 'last'"),
        (tiny_clip.config(text={"pool_type": "eos"}), "if its id is not 2"),
        (tiny_clip.config(text={"no_causal_mask": True}), "no_causal_mask=True"),
        (tiny_clip.config(vision={"image_size": (32, 64)}), "support only squares"),
    ],
)
def test_models_without_a_counterpart_raise(cfg, message):
    cfg = open_clip.get_model_config(cfg) if isinstance(cfg, str) else cfg
    with pytest.raises(ValueError, match=message):
        transformers_config.model_cfg_to_transformers(cfg, "the model")


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-H-14-378-quickgelu", "ViT-bigG-14"])
def test_bundled_models_have_a_transformers_configuration(name):
    config = transformers_config.model_cfg_to_transformers(open_clip.get_model_config(name), name)
    with torch.device("meta"):
        theirs = CLIPModel(CLIPConfig(**config))
        ours = open_clip.create_model(name, device="meta")
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in to_transformers(ours.state_dict(), siglip=False).items()} == expected


# The command


def test_the_command_in_both_directions(tmp_path, caplog):
    """CLIPProcessor on the written folder gives the ids and pixels of open_clip."""
    caplog.set_level(logging.INFO)
    vocabulary = {"vocab_size": 49408, "context_length": 16}
    name = tiny_clip.folder(tmp_path / "ours", {"interpolation": "bicubic"}, text=vocabulary)
    ours = randomise(open_clip.create_model(name))
    save_file(ours.state_dict(), tmp_path / "weights.safetensors")
    weights = str(tmp_path / "weights.safetensors")
    main(["--model", name, "--pretrained", weights, "--to", "transformers", str(tmp_path / "theirs")])
    processor = CLIPProcessor.from_pretrained(tmp_path / "theirs")
    theirs = CLIPModel.from_pretrained(tmp_path / "theirs").eval()

    captions = ["A photo of a cat.", "It's 12 dogs,   not cats!"]
    image = Image.effect_mandelbrot((50, 70), (-2, -1, 1, 1), 20).convert("RGB")
    batch = processor(text=captions, images=image, return_tensors="pt", padding="max_length", truncation=True)
    ids = open_clip.get_tokenizer(name)(captions)
    ends = ids.argmax(-1)
    for row, (found, end) in enumerate(zip(batch["input_ids"], ends, strict=True)):
        assert found[: end + 1].tolist() == ids[row, : end + 1].tolist()
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(ours)), is_train=False
    )
    with torch.no_grad():
        served = theirs(**batch).logits_per_text
        expected = ours.get_logits(preprocess(image)[None], ids)[1]
    # transformers resizes in torch, open_clip in PIL: pixels differ by one or two levels
    torch.testing.assert_close(served, expected, rtol=0, atol=2e-2)

    main(["--model", f"local-dir:{tmp_path / 'theirs'}", "--to", "open_clip", str(tmp_path / "back")])
    assert json.loads((tmp_path / "back/open_clip_config.json").read_text())["model_cfg"]["text_cfg"]["width"] == 32
    again = load_file(tmp_path / "back/open_clip_model.safetensors")
    for key, value in ours.state_dict().items():
        assert torch.equal(again[key], value), key
    assert "for transformers." in caplog.text
