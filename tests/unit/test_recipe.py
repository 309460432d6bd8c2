"""Which weights are loaded into which tower, and folders with the layout of hub repositories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import open_clip
import tiny_clip
from open_clip import factory
from open_clip.recipe import read_recipe

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"timm_model_name": "resnet18", "image_size": 32, "timm_model_pretrained": True},
    "text_cfg": {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"},
}


class Built(Exception):
    """Replaces a model; stores the configuration that would be built."""


@pytest.fixture
def towers(monkeypatch, tmp_path):
    """Return a function: arguments of create_model -> whether image and text tower start from library weights."""

    def build(model_cfg, cast_dtype, output_dict):
        raise Built(model_cfg["vision_cfg"]["timm_model_pretrained"], model_cfg["text_cfg"]["hf_model_pretrained"])

    monkeypatch.setattr(factory, "_instantiate", build)
    for folder in ("bare", "filled"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    torch.save({"a": torch.zeros(1)}, tmp_path / "filled/open_clip_pytorch_model.bin")

    def ask(folder: str, **kwargs):
        kwargs = {k: str(tmp_path / v) if k.endswith(("path", "pretrained")) else v for k, v in kwargs.items()}
        with pytest.raises(Built) as built:
            open_clip.create_model(f"local-dir:{tmp_path / folder}", **kwargs)
        return built.value.args

    return ask


FILE = "filled/open_clip_pytorch_model.bin"


@pytest.mark.parametrize(
    ("folder", "kwargs", "image", "text"),
    [
        ("bare", {}, False, True),
        ("bare", {"load_weights": False}, False, True),
        ("bare", {"pretrained_image": True}, True, True),
        ("bare", {"pretrained_text": False}, False, False),
        ("bare", {"pretrained_image": True, "load_weights": False}, True, True),
        ("bare", {"pretrained_image": True, "pretrained_image_path": FILE}, False, True),
        ("bare", {"pretrained_image": True, "pretrained_text_path": FILE}, True, False),
        ("bare", {"pretrained": FILE, "pretrained_image": True}, False, False),
        ("bare", {"pretrained_image": True, "device": "meta"}, False, False),
        ("filled", {"pretrained_image": True}, False, False),
        ("filled", {"pretrained_image": True, "load_weights": False}, True, True),
    ],
    ids=str,
)
def test_towers_start_from_library_weights_if_no_others_are_loaded(towers, folder, kwargs, image, text):
    """As open_clip_torch 3.3.0 answered, but on the meta device (where it downloads), and for `pretrained=` of a folder
    that has no weights (where it downloads what the file then replaces).
    """
    assert towers(folder, **kwargs) == (image, text)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "any.pt"])
def test_a_folder_needs_no_preprocessing(tmp_path, name):
    """Older folders have only "model_cfg"."""
    origin = open_clip.create_model(tiny_clip.folder(tmp_path / "origin"))
    (tmp_path / "older").mkdir()
    (tmp_path / "older/open_clip_config.json").write_text(json.dumps({"model_cfg": tiny_clip.config()}))
    if name.endswith("safetensors"):
        from safetensors.torch import save_file

        save_file(origin.state_dict(), tmp_path / "older" / name)
    else:
        torch.save(origin.state_dict(), tmp_path / "older" / name)
    found = open_clip.create_model(f"local-dir:{tmp_path / 'older'}")
    assert all(map(torch.equal, found.state_dict().values(), origin.state_dict().values()))
    assert found.visual.preprocess_cfg["mean"] == open_clip.OPENAI_DATASET_MEAN


def test_the_configuration_of_a_local_folder_may_contain_paths(tmp_path):
    """Local folders are trusted: users without a network store the Hugging Face tokenizer there."""
    name = tiny_clip.folder(tmp_path, text={"hf_tokenizer_name": str(Path(tmp_path) / "tokenizer")})
    assert open_clip.create_model(name) is not None


# Hints about what to type instead


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Create a model folder in the working directory and return its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    content = {"model_cfg": tiny_clip.config(), "preprocess_cfg": {}}
    (tmp_path / "folder/open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
    return "folder"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("folder", "'local-dir:folder'"),
        ("./folder", "There is no model './folder'.* 'local-dir:./folder'"),
        ("org/name", "There is no model 'org/name'.* 'hf-hub:org/name'"),
        ("https://hub.example/org/name", "'hf-hub:org/name'"),
        ("https://hub.example/org/name/tree/main", "'hf-hub:org/name'"),
        ("hf-hub: org/name", "Write 'hf-hub:org/name'"),
        ("hf-hub:folder", "'local-dir:folder'"),
        ("hf-hub:/no/folder", "'local-dir:/no/folder'"),
        ("hf-hub:https://hub.example/org/name", "'hf-hub:org/name'"),
        ("local-dir: folder", "Write 'local-dir:folder'"),
        ("ViT-B/33", "ViT-B-32"),
    ],
)
def test_a_path_or_repository_as_the_model_name_gets_a_hint(folder, name, hint):
    with pytest.raises((RuntimeError, ValueError, FileNotFoundError), match=hint):
        read_recipe(name, None, None)


@pytest.mark.parametrize(
    ("pretrained", "hint"),
    [
        ("folder", r"is a folder.*create_model\('local-dir:folder'\)"),
        ("hf-hub:org/name", r"create_model\('hf-hub:org/name'\)"),
        ("org/name", "'hf-hub:org/name'"),
        (True, "pretrained=True is a bool"),
        (["w.pt"], "is a list"),
        (b"w.pt", "is a bytes"),
    ],
)
def test_pretrained_that_is_not_a_file_gets_a_hint(folder, pretrained, hint):
    with pytest.raises(RuntimeError, match=hint):
        read_recipe("ViT-B-32", pretrained, None)


def test_a_folder_as_pretrained_gets_a_hint_to_its_file(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"pretrained='.*w\.pt'"):
        read_recipe("ViT-B-32", tmp_path, None)


def test_only_downloads_are_mapped(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"x")
    assert read_recipe("ViT-B-32", "openai", None).is_download
    assert not read_recipe("ViT-B-32", str(tmp_path / "w.pt"), None).is_download
