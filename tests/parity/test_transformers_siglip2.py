"""Features equal those of transformers' Siglip2Model at native resolution, for weights converted in both directions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model, Siglip2Tokenizer

import main_models
import open_clip
import tiny_clip
from hub_server import use_hub
from open_clip.convert import (
    from_transformers,
    model_cfg_from_transformers,
    model_cfg_to_transformers,
    preprocess_cfg_from_transformers,
    to_plain_layout,
    to_transformers,
)
from open_clip.convert.__main__ import main
from open_clip.push_to_hf_hub.for_transformers import save_for_transformers
from open_clip.transform import naflex


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = use_hub(monkeypatch, tmp_path / "cache")
    yield hub
    hub.close()


TOLERANCE = {"rtol": 0, "atol": 1e-5}
PATCH = 4
GRIDS = [(5, 5), (3, 7), (2, 2), (7, 3), (1, 21)]  # of the images in a batch; the table has 5 x 5 positions
PLACES = 25
TOWER = {"num_hidden_layers": 2, "layer_norm_eps": 1e-6}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_attention_heads": 3,
    "vocab_size": 64,
    "max_position_embeddings": 12,
    "projection_size": 32,
}
VISION = {"hidden_size": 32, "intermediate_size": 75, "num_attention_heads": 4, "patch_size": PATCH, "num_patches": 25}


def siglip2(act: str = "gelu_pytorch_tanh") -> Siglip2Model:
    """Build a small model whose weights all affect the features."""
    common = {**TOWER, "hidden_act": act}
    model = Siglip2Model(Siglip2Config(text_config={**TEXT, **common}, vision_config={**VISION, **common}))
    return randomise(model)


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
            if name == "logit_scale":
                parameter.fill_(1.3)
    return model.eval()


def ragged_batch() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the same images as inputs of transformers and as ours."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(len(GRIDS), PLACES, PATCH * PATCH * 3, generator=generator)
    valid = torch.zeros(len(GRIDS), PLACES, dtype=torch.bool)
    coord = torch.zeros(len(GRIDS), PLACES, 2, dtype=torch.int64)
    for row, (rows, columns) in enumerate(GRIDS):
        count = rows * columns
        valid[row, :count] = True
        pixels[row, count:] = 0
        coord[row, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    theirs = {"pixel_values": pixels, "pixel_attention_mask": valid.int(), "spatial_shapes": torch.tensor(GRIDS)}
    return theirs, {"patches": pixels, "patch_coord": coord, "patch_valid": valid}


def texts() -> torch.Tensor:
    return torch.tensor([[60, 4, 9, 11, 1, 0, 0, 0, 0, 0, 0, 0], [60, 8, 14, 3, 5, 7, 9, 1, 2, 4, 6, 1]])


@torch.no_grad()
def assert_same(ours, theirs) -> None:
    ours.eval()
    their_batch, our_batch = ragged_batch()
    output = theirs(input_ids=texts(), **their_batch)
    image_features = ours.encode_image(our_batch, normalize=True)
    text_features = ours.encode_text(texts(), normalize=True)
    torch.testing.assert_close(image_features, output.image_embeds, **TOLERANCE)
    torch.testing.assert_close(text_features, output.text_embeds, **TOLERANCE)
    torch.testing.assert_close(ours.get_logits(our_batch, texts())[0], output.logits_per_image, rtol=1e-5, atol=1e-4)


# From transformers


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu"])
def test_a_folder_of_transformers(tmp_path, act):
    theirs = siglip2(act)
    theirs.save_pretrained(tmp_path)
    Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=30).save_pretrained(tmp_path)
    ours = open_clip.create_model(f"local-dir:{tmp_path}")
    assert_same(ours, theirs)
    assert type(ours) is open_clip.CustomTextCLIP
    assert ours.logit_bias is not None


def test_ids_of_texts(tmp_path):
    """The tokenizer of transformers' SigLIP 2 keeps punctuation, unlike that of the main branch's models."""
    siglip2().save_pretrained(tmp_path)
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz,!?"]
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    theirs = Siglip2Tokenizer(vocab=ids, merges=[], padding_side="right")
    theirs.save_pretrained(tmp_path)
    texts = ["A dog, no cat!", "two CATS", ""]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt").input_ids
    assert vocabulary.index(",") in expected[0]
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts), expected)


def test_a_repository_on_the_hub(tmp_path, hub):
    theirs = siglip2()
    theirs.save_pretrained(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")}
    processor = {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 36, "patch_size": PATCH}
    hub.put("org/siglip2", {**files, "preprocessor_config.json": json.dumps(processor).encode()})
    ours = open_clip.create_model("hf-hub:org/siglip2")
    assert_same(ours, theirs)
    assert tuple(open_clip.get_model_preprocess_cfg(ours)["mean"]) == (0.5, 0.5, 0.5)


def test_the_configuration_of_the_published_models():
    """Defaults of transformers are those of google/siglip2-base-patch16-naflex, except for the vocabulary."""
    config = {"model_type": "siglip2", "text_config": {"vocab_size": 256000}}
    converted = model_cfg_from_transformers(config, "config.json")
    whole = Siglip2Config(text_config={"vocab_size": 256000}).to_dict()
    assert converted == model_cfg_from_transformers(whole, "config.json")
    bundled = open_clip.get_model_config("ViT-B-16-SigLIP2-naflex")
    assert converted["vision_cfg"] == {
        **bundled["vision_cfg"],
        "act_kwargs": {"approximate": "tanh"},
        "image_size": 256,
        "image_seq_len": 256,
    }
    tokenizer = {key: bundled["text_cfg"][key] for key in ("hf_tokenizer_name", "tokenizer_kwargs")}
    assert converted["text_cfg"] | tokenizer == bundled["text_cfg"] | {"mlp_ratio": 4.0}
    assert converted["text_cfg"]["tokenizer_kwargs"] == {"clean": "lower"}
    assert {key: converted[key] for key in ("embed_dim", "init_logit_bias", "custom_text")} == {
        key: bundled[key] for key in ("embed_dim", "init_logit_bias", "custom_text")
    }


def test_the_tower_of_400_million_parameters():
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    text = {**vision, "vocab_size": 256000}
    cfg = model_cfg_from_transformers({"model_type": "siglip2", "text_config": text, "vision_config": vision}, "c")
    assert cfg["vision_cfg"]["timm_model_name"] == "naflexvit_so400m_patch16_siglip"
    assert "timm_model_kwargs" not in cfg["vision_cfg"]


def test_other_sizes_are_arguments_of_timm():
    cfg = model_cfg_from_transformers(siglip2().config.to_dict(), "config.json")["vision_cfg"]
    kwargs = cfg["timm_model_kwargs"]
    assert int(32 * kwargs.pop("mlp_ratio")) == 75
    assert kwargs == {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "patch_size": PATCH,
        "pos_embed_grid_size": [5, 5],
    }
    assert cfg["image_size"] == 20


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"num_patches": 24}, "num_patches=24, which is not the number of patches of a square grid"),
        ({"vision_use_head": False}, "vision_use_head=False"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05"),
        ({"num_channels": 1}, "1 channels"),
        ({"hidden_size": 384, "intermediate_size": 1536}, "text features have the width 768, image features 384"),
    ],
)
def test_unsupported_configurations_raise(vision, message):
    with pytest.raises(ValueError, match=message):
        model_cfg_from_transformers({"model_type": "siglip2", "vision_config": vision}, "config.json")


def test_preprocessing_of_the_published_models():
    cfg = preprocess_cfg_from_transformers({"image_processor_type": "Siglip2ImageProcessor"}, "the file")
    assert {key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in cfg.items()} == {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }


# To transformers


def test_a_round_trip_of_the_weights_is_bit_identical():
    weights = siglip2().state_dict()
    converted = from_transformers(weights)
    assert converted["visual.trunk.embeds.pos_embed"].shape == (1, 5, 5, 32)
    back = to_transformers(to_plain_layout(converted), siglip=True)
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(back[key], value), key
    tower = "vision_model.embeddings.patch_embedding.weight"
    assert back[tower].data_ptr() == weights[tower].data_ptr()


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP2-naflex", "ViT-SO400M-16-SigLIP2-naflex"])
def test_weights_of_the_bundled_models_fit_transformers(name):
    """Names and shapes, from the recorded state dicts of the main branch."""
    recorded = main_models.state_dicts()[name]
    ours = {key: torch.empty(shape, device="meta") for key, (shape, _) in recorded.items()}
    given = to_transformers(to_plain_layout(ours), siglip=True)
    width = {}
    if "SO400M" in name:
        width = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    with torch.device("meta"):
        theirs = Siglip2Model(Siglip2Config(text_config={**width, "vocab_size": 256000}, vision_config=width))
    assert {key: value.shape for key, value in given.items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP2-naflex", "ViT-SO400M-16-SigLIP2-naflex"])
def test_bundled_models_have_a_transformers_configuration(name):
    config = model_cfg_to_transformers(open_clip.get_model_config(name), name, "tanh")
    assert config["vision_config"]["num_patches"] == 256
    again = model_cfg_from_transformers(Siglip2Config.from_dict(config).to_dict(), "config.json")
    assert again["vision_cfg"]["timm_model_name"] == open_clip.get_model_config(name)["vision_cfg"]["timm_model_name"]
    assert "timm_model_kwargs" not in again["vision_cfg"]


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"timm_model_kwargs": {"swiglu_mlp": True}}, "sets swiglu_mlp of timm's tower"),
        ({"timm_model_kwargs": {"pos_embed_grid_size": [7, 9]}}, r"a grid of \(7, 9\) positions"),
        ({"timm_pool": "avg"}, "timm_pool='avg'"),
    ],
)
def test_towers_without_a_counterpart_raise(vision, message):
    cfg = open_clip.get_model_config("ViT-B-16-SigLIP2-naflex")
    cfg["vision_cfg"] |= vision
    with pytest.raises(ValueError, match=message):
        model_cfg_to_transformers(cfg, "the model")


def test_our_model_in_transformers(tmp_path):
    cfg = model_cfg_from_transformers(siglip2().config.to_dict(), "config.json")
    cfg["vision_cfg"]["image_seq_len"] = 30
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bilinear"}
    ours = randomise(open_clip.create_model(tiny_clip.write_folder(tmp_path / "ours", cfg, preprocess_cfg)))
    save_for_transformers(ours, None, cfg, tmp_path / "theirs")
    assert_same(ours, Siglip2Model.from_pretrained(tmp_path / "theirs").eval())
    processor = Siglip2ImageProcessor.from_pretrained(tmp_path / "theirs")
    assert (processor.patch_size, processor.max_num_patches) == (PATCH, 30)
    again = open_clip.create_model(f"local-dir:{tmp_path / 'theirs'}")
    assert open_clip.get_model_preprocess_cfg(again) == open_clip.get_model_preprocess_cfg(ours)
    for key, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_the_command_in_both_directions(tmp_path):
    theirs = siglip2()
    cfg = model_cfg_from_transformers(theirs.config.to_dict(), "config.json")
    cfg["text_cfg"].pop("tokenizer_kwargs")  # the default tokenizer, which needs no files
    cfg["text_cfg"]["vocab_size"] = 49408
    name = tiny_clip.write_folder(tmp_path / "ours", cfg)
    ours = randomise(open_clip.create_model(name))
    weights = str(tmp_path / "weights.safetensors")
    save_file(ours.state_dict(), weights)
    main(["--model", name, "--pretrained", weights, "--to", "transformers", str(tmp_path / "theirs")])
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert (config["model_type"], config["vision_config"]["num_patches"]) == ("siglip2", 25)
    assert_same(ours, Siglip2Model.from_pretrained(tmp_path / "theirs").eval())
    main(["--model", f"local-dir:{tmp_path / 'theirs'}", "--to", "open_clip", str(tmp_path / "back")])
    written = json.loads((tmp_path / "back/open_clip_config.json").read_text())["model_cfg"]
    assert written["vision_cfg"]["timm_model_name"] == "naflexvit_base_patch16_siglip"
    again = load_file(tmp_path / "back/open_clip_model.safetensors")
    for key, value in ours.state_dict().items():
        assert torch.equal(again[key], value), key


# Images


def picture(height: int, width: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 7 + k) * np.cos(columns / (5 + k)) for k in range(3)]
    return Image.fromarray(((np.stack(waves, -1) + 1) * 127).astype(np.uint8))


@pytest.mark.parametrize(
    "size", [(60, 80), (480, 640), (33, 1000), (1000, 33), (7, 5), (256, 256), (1, 900), (113, 77)]
)
@pytest.mark.parametrize("max_num_patches", [64, 256, 576])
def test_the_grid_of_an_image(size, max_num_patches):
    """Both search the scale in the same way."""
    batch = Siglip2ImageProcessor(max_num_patches=max_num_patches)(picture(*size), return_tensors="pt")
    assert batch["spatial_shapes"].tolist() == [list(naflex.patch_grid(*size, (16, 16), max_num_patches))]


@pytest.mark.parametrize("size", [(60, 80), (480, 640), (33, 1000), (113, 77)])
def test_pixels_differ_by_one_level_at_most(size):
    """Values are in the order (row, column, channel) in both. transformers resizes in torch, open_clip in PIL."""
    preprocess = preprocess_cfg_from_transformers({"image_processor_type": "Siglip2ImageProcessor"}, "the file")
    factory = naflex.naflex_eval_transform_v2(open_clip.transform.PreprocessCfg(**preprocess), max_seq_len=256)
    ours = factory(picture(*size))
    theirs = Siglip2ImageProcessor()(picture(*size), return_tensors="pt")
    rows, columns = theirs["spatial_shapes"][0].tolist()
    assert ours["patches"].shape == (rows * columns, 768)
    assert (ours["patch_coord"].amax(0) + 1).tolist() == [rows, columns]
    assert int(theirs["pixel_attention_mask"].sum()) == rows * columns
    difference = (ours["patches"] - theirs["pixel_values"][0, : rows * columns]).abs() * 127.5
    assert difference.max() < 1.01
    assert difference.mean() < 0.1
