"""Programs that import helpers, private ones included, from where open_clip 3.3.0 has them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import open_clip
import open_clip.factory

RECORDED = json.loads(Path(__file__).with_name("names_3.3.0.json").read_text(encoding="utf-8"))
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
}


@pytest.mark.parametrize("module", RECORDED)
def test_every_name_is_there(module):
    found = importlib.import_module(module)
    assert [name for name in RECORDED[module] if not hasattr(found, name)] == []


def test_a_wrong_name_is_an_import_error():
    with pytest.raises(ImportError, match="no_such_name"):
        from open_clip.transformer import no_such_name  # noqa: F401
    with pytest.raises(AttributeError, match=r"open_clip\.factory.*no_such_name"):
        _ = open_clip.factory.no_such_name


def test_layers_are_the_same_classes_everywhere():
    from open_clip import model, modified_resnet, transformer

    for name in ("LayerNorm", "LayerNormFp32", "QuickGELU", "text_global_pool", "lock_text_tower"):
        assert getattr(model, name) is getattr(transformer, name)
    assert model.ModifiedResNet is modified_resnet.ModifiedResNet
    assert model.CLIP is importlib.import_module("open_clip.convert").CLIP


def test_torchvisions_classes_from_transform():
    import torchvision.transforms as T

    from open_clip.transform import Compose, InterpolationMode, Normalize, RandomResizedCrop, Resize, ToTensor

    assert (Compose, Normalize, Resize, ToTensor) == (T.Compose, T.Normalize, T.Resize, T.ToTensor)
    assert (InterpolationMode, RandomResizedCrop) == (T.InterpolationMode, T.RandomResizedCrop)


# ------------------------------------------------------------------------------------------- registry of architectures


@pytest.fixture
def registry():
    """`_MODEL_CONFIGS`; what a test writes to it is removed afterwards."""
    configs = open_clip.factory._MODEL_CONFIGS
    before = dict(configs)
    paths = list(open_clip.factory._MODEL_CONFIG_PATHS)
    yield configs
    configs.clear()
    configs.update(before)
    open_clip.factory._MODEL_CONFIG_PATHS[:] = paths


def test_writing_to_the_registry_registers_a_model(registry):
    """The recipe of BiomedCLIP's card."""
    from open_clip.factory import _MODEL_CONFIGS, HF_HUB_PREFIX

    name = "biomedclip_local"
    if not name.startswith(HF_HUB_PREFIX) and name not in _MODEL_CONFIGS and CONFIG is not None:
        _MODEL_CONFIGS[name] = CONFIG
    assert name in open_clip.list_models()
    assert open_clip.get_model_config(name) == CONFIG
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    assert model.visual.image_size in (32, (32, 32))
    assert preprocess(Image.new("RGB", (40, 50))).shape == (3, 32, 32)
    assert open_clip.get_tokenizer(name)(["a"]).shape == (1, 16)
    _MODEL_CONFIGS[name]["embed_dim"] = 64
    try:
        assert open_clip.create_model(name).text_projection.shape == (32, 64)
    finally:
        CONFIG["embed_dim"] = 32
    del _MODEL_CONFIGS[name]
    assert name not in open_clip.list_models()
    assert open_clip.get_model_config(name) is None


def test_a_copied_configuration_does_not_change_the_registry(registry):
    open_clip.get_model_config("ViT-B-32")["embed_dim"] = 1
    assert registry["ViT-B-32"]["embed_dim"] == 512


def test_paths_are_read_again(registry, tmp_path):
    from open_clip.factory import _MODEL_CONFIG_PATHS, _rescan_model_configs

    (tmp_path / "names-from-a-folder.json").write_text(json.dumps(CONFIG))
    _MODEL_CONFIG_PATHS.append(tmp_path)
    _rescan_model_configs()
    assert "names-from-a-folder" in open_clip.list_models()
    (tmp_path / "file.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "file.json")
    assert tmp_path / "file.json" in _MODEL_CONFIG_PATHS
    names = open_clip.list_models()
    assert names.index("EVA02-L-14") < names.index("file") < names.index("ViT-B-32")
    del open_clip.factory._MODEL_CONFIGS["file"], open_clip.factory._MODEL_CONFIGS["names-from-a-folder"]


def test_natural_key():
    from open_clip.factory import _natural_key

    assert _natural_key("ViT-B-16") == ["vit-b-", 16, ""]
    assert sorted(["b16", "b8", "B2"], key=_natural_key) == ["B2", "b8", "b16"]


def test_prefixes():
    from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX

    assert (HF_HUB_PREFIX, LOCAL_DIR_PREFIX) == ("hf-hub:", "local-dir:")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], "open_clip_model.safetensors"),
        (["a.safetensors", "open_clip_pytorch_model.bin"], "open_clip_pytorch_model.bin"),
        (["model.safetensors"], "model.safetensors"),
        (["pytorch_model.bin", "a.pth"], "pytorch_model.bin"),
        (["b.safetensors", "a.safetensors"], "a.safetensors"),
        (["a.pth"], "a.pth"),
        (["notes.txt"], None),
        ([], None),
    ],
)
def test_find_checkpoint_in_dir(tmp_path, files, expected):
    from open_clip.factory import _find_checkpoint_in_dir

    for name in files:
        (tmp_path / name).touch()
    assert _find_checkpoint_in_dir(tmp_path) == (str(tmp_path / expected) if expected else None)


@pytest.mark.parametrize(
    ("precision", "weights", "norms"),
    [
        ("fp32", torch.float32, torch.float32),
        ("fp16", torch.float16, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("pure_fp16", torch.float16, torch.float16),
        ("pure_bf16", torch.bfloat16, torch.bfloat16),
        ("amp", torch.float32, torch.float32),
    ],
)
def test_set_model_device_and_precision(model, precision, weights, norms):
    from open_clip.factory import _set_model_device_and_precision

    _set_model_device_and_precision(model, torch.device("cpu"), precision)
    assert model.visual.conv1.weight.dtype == weights
    assert model.ln_final.weight.dtype == norms


# --------------------------------------------------------------------------------------------------------------- towers


def test_towers_are_built_from_configurations():
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower

    vision = _build_vision_tower(embed_dim=32, vision_cfg=CONFIG["vision_cfg"], quick_gelu=True)
    assert vision(torch.zeros(2, 3, 32, 32)).shape == (2, 32)
    assert type(vision.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    half = _build_vision_tower(32, CLIPVisionCfg(**CONFIG["vision_cfg"]), False, torch.float16)
    assert type(half.ln_pre).__name__ == "LayerNormFp32"
    resnet = _build_vision_tower(32, {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "head_width": 32})
    assert type(resnet).__name__ == "ModifiedResNet"
    for cfg in (CONFIG["text_cfg"], CLIPTextCfg(**CONFIG["text_cfg"])):
        text = _build_text_tower(32, cfg, cast_dtype=torch.bfloat16)
        assert type(text.ln_final).__name__ == "LayerNormFp32"
    assert _build_text_tower(32, CONFIG["text_cfg"])(torch.ones(2, 16, dtype=torch.long)).shape == (2, 32)


def test_a_convnext_tower_as_vision_language_models_build_it():
    pytest.importorskip("timm")
    from open_clip.model import _build_vision_tower

    cfg = {"timm_model_name": "convnext_atto", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear",
           "timm_drop": 0.0, "timm_drop_path": 0.1, "image_size": 64}  # fmt: skip
    tower = _build_vision_tower(32, cfg, False).eval()
    x = tower.trunk.stem(torch.zeros(1, 3, 64, 64))
    for stage in tower.trunk.stages:
        x = stage(x)
    assert x.shape == (1, 320, 2, 2)


def test_a_text_decoder_tower():
    from open_clip.coca_model import _build_text_decoder_tower

    cfg = {"width": 64, "heads": 2, "layers": 2, "context_length": 20, "vocab_size": 100, "mlp_ratio": 4}
    decoder = _build_text_decoder_tower(128, cfg)
    assert decoder.text_projection.shape == (64, 128)
    assert decoder(torch.zeros(2, 5, 64), torch.zeros(2, 7, 64)).shape == (2, 7, 128)


def test_a_tower_is_replaced_when_models_are_built(monkeypatch, registry):
    """Forks put their own tower into the module."""
    import open_clip.model

    def build(embed_dim, vision_cfg, quick_gelu=False, cast_dtype=None):
        tower = torch.nn.Linear(3, embed_dim)
        tower.image_size = 32
        return tower

    registry["names-own-tower"] = CONFIG
    monkeypatch.setattr(open_clip.model, "_build_vision_tower", build)
    assert isinstance(open_clip.create_model("names-own-tower").visual, torch.nn.Linear)


# -------------------------------------------------------------------------------------------------------- small helpers


def test_expand_token():
    from open_clip.transformer import _expand_token

    token = torch.arange(4.0)
    expanded = _expand_token(token, 3)
    assert torch.equal(expanded, token.expand(3, 1, 4))
    assert expanded.data_ptr() == token.data_ptr()


def test_helpers():
    from open_clip.coca_model import _token_to_tensor
    from open_clip.hf_model import _camel2snake
    from open_clip.utils import _out_indices_as_tuple

    assert _token_to_tensor(3).tolist() == [3]
    assert _token_to_tensor([3, 4]).tolist() == [3, 4]
    assert _token_to_tensor(torch.tensor(3)).tolist() == 3
    for name, expected in (("BaseModelOutput", "base_model_output"), ("ABC", "a_b_c"), ("abcDef", "abc_def")):
        assert _camel2snake(name) == expected
    assert _out_indices_as_tuple(3) == (-3, -2, -1)
    assert _out_indices_as_tuple([1, 2]) == (1, 2)


def test_helpers_of_transform():
    from open_clip.transform import _convert_to_rgb, _setup_size, to_2tuple

    assert _convert_to_rgb(Image.new("L", (2, 3))).mode == "RGB"
    assert _setup_size(3, "wrong") == (3, 3)
    assert _setup_size(np.int64(3), "wrong") == (3, 3)
    assert _setup_size([3], "wrong") == (3, 3)
    assert tuple(_setup_size([3, 4], "wrong")) == (3, 4)
    with pytest.raises(ValueError, match="wrong"):
        _setup_size((1, 2, 3), "wrong")
    assert to_2tuple(3) == (3, 3)


def test_helpers_of_the_tokenizer():
    from open_clip.tokenizer import _clean_canonicalize, _clean_lower, _clean_whitespace

    assert _clean_lower("  A &amp; B ") == "a & b"
    assert _clean_whitespace("  A \n B ") == "A B"
    assert _clean_canonicalize("A_b, c.") == "a b c"


def test_horovod_is_not_there():
    from open_clip.loss import has_distributed, hvd

    assert hvd is None
    assert has_distributed is True


# --------------------------------------------------------------------------------------------------- published weights


def test_table_of_published_weights():
    from open_clip.pretrained import _PRETRAINED, _RN50, _VITB32, _PRETRAINED_quickgelu

    assert _VITB32 is _PRETRAINED["ViT-B-32"]
    assert _RN50 is _PRETRAINED["RN50"]
    assert "openai" in _VITB32
    assert _VITB32["openai"]["url"].startswith("https://")
    assert set(_PRETRAINED_quickgelu) == {name for name in _PRETRAINED if name.endswith("-quickgelu")}
    pairs = [(name, tag) for name, tags in _PRETRAINED.items() for tag in tags]
    assert pairs == open_clip.list_pretrained()


def test_weights_are_added_to_the_table(monkeypatch):
    from open_clip.pretrained import _PRETRAINED, _apcfg, _mccfg, _pcfg, _slpcfg

    row = _pcfg("https://example.org/w.pt")
    monkeypatch.setitem(_PRETRAINED, "names-added", {"tag": row})
    assert open_clip.list_pretrained_tags_by_model("names-added") == ["tag"]
    assert open_clip.get_pretrained_cfg("names-added", "tag") == row
    assert open_clip.get_pretrained_url("names-added", "tag") == "https://example.org/w.pt"
    assert row == {
        "url": "https://example.org/w.pt", "hf_hub": "", "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD, "interpolation": "bicubic", "resize_mode": "shortest",
    }  # fmt: skip
    siglip = _slpcfg(hf_hub="a/b/", quick_gelu=True)
    assert (siglip["mean"], siglip["resize_mode"], siglip["quick_gelu"]) == ((0.5, 0.5, 0.5), "squash", True)
    assert (_apcfg()["mean"], _apcfg()["interpolation"]) == ((0.485, 0.456, 0.406), "bilinear")
    assert (_mccfg()["std"], _mccfg(mean=(1, 1, 1))["mean"]) == ((1.0, 1.0, 1.0), (1, 1, 1))


def test_constants_of_published_weights():
    from open_clip import pretrained

    assert pretrained.IMAGENET_MEAN == (0.485, 0.456, 0.406)
    assert pretrained.INCEPTION_STD == (0.5, 0.5, 0.5)
    assert pretrained.OPENAI_DATASET_MEAN == open_clip.OPENAI_DATASET_MEAN
    assert list(pretrained._get_safe_alternatives("open_clip_pytorch_model.bin")) == ["open_clip_model.safetensors"]
    assert list(pretrained._get_safe_alternatives("a.bin")) == ["a.safetensors"]
    assert list(pretrained._get_safe_alternatives("a.pt")) == []
