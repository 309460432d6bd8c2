"""Loading of OpenAI's archives. The archive here is small and traced like the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import open_clip
import tiny_clip
from open_clip import openai

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore::torch.jit.TracerWarning")

WIDE = {"width": 64}  # OpenAI's heads have the width 64, and the archive does not contain their number


def source() -> torch.nn.Module:
    torch.manual_seed(0)
    cfg = tiny_clip.config({**WIDE, "head_width": 64}, {**WIDE, "heads": 1}, quick_gelu=True)
    return open_clip.CLIP(**cfg).eval()


def write_archive(model: torch.nn.Module, image_size: int, path: Path) -> Path:
    for name, number in (("input_resolution", image_size), ("context_length", 12), ("vocab_size", 64)):
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(number))
    images, texts = tiny_clip.inputs(image_size)
    inputs = {"forward": (images, texts), "encode_image": images, "encode_text": texts}
    torch.jit.save(torch.jit.trace_module(model, inputs, check_trace=False), str(path))
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return write_archive(source(), 32, tmp_path_factory.mktemp("openai") / "archive.pt")


def resnet_source() -> torch.nn.Module:
    torch.manual_seed(0)
    vision = {"layers": [1, 2, 1, 1], "width": 8, "head_width": 64, "image_size": 64}
    model = open_clip.CLIP(**tiny_clip.config(vision, {**WIDE, "heads": 1}, quick_gelu=True))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def resnet_archive(tmp_path_factory) -> Path:
    return write_archive(resnet_source(), 64, tmp_path_factory.mktemp("openai") / "RN.pt")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_resnet_archive(resnet_archive, precision):
    model = open_clip.load_openai_model(str(resnet_archive), precision=precision, device="cpu")
    visual = model.visual
    assert [len(stage) for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4)] == [1, 2, 1, 1]
    assert open_clip.get_model_preprocess_cfg(model)["size"] in (64, (64, 64))
    assert visual.attnpool.q_proj.weight.dtype == (open_clip.get_cast_dtype(precision) or torch.float32)
    assert (visual.bn1.weight.dtype, visual.bn1.running_mean.dtype) == (torch.float32, torch.float32)
    inputs = tiny_clip.inputs(64)
    with torch.no_grad():
        for found, expected in zip(model.float()(*inputs), resnet_source()(*inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if precision == "fp32" else 0.02)


def test_features_equal_those_of_the_archive(archive):
    model = open_clip.load_openai_model(str(archive), device="cpu")
    assert type(model) is open_clip.CLIP
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for found, expected in zip(model(*tiny_clip.inputs()), source()(*tiny_clip.inputs()), strict=True):
            torch.testing.assert_close(found, expected)


def test_preprocessing(archive):
    cfg = open_clip.get_model_preprocess_cfg(openai.load_openai_model(str(archive), device="cpu"))
    assert tuple(cfg["size"]) == (32, 32)
    assert (cfg["mean"], cfg["std"]) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert (cfg["interpolation"], cfg["resize_mode"]) == ("bicubic", "shortest")


@pytest.mark.parametrize(
    ("precision", "proj", "norm"),
    [
        (None, torch.float32, torch.float32),
        ("amp", torch.float32, torch.float32),
        ("fp16", torch.float16, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("pure_bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_precisions(archive, precision, proj, norm):
    """The default on the CPU is fp32."""
    model = open_clip.load_openai_model(str(archive), precision=precision, device="cpu")
    assert (model.visual.proj.dtype, model.visual.ln_post.weight.dtype) == (proj, norm)


def test_an_archive_in_create_model(archive, tmp_path):
    """All OpenAI archives use QuickGELU, whatever the file name."""
    name = tiny_clip.folder(tmp_path, vision={**WIDE, "head_width": 64}, text={**WIDE, "heads": 1})
    with pytest.warns(UserWarning, match=r"QuickGELU mismatch.*force_quick_gelu=True"):
        open_clip.create_model(name, pretrained=str(archive))
    model = open_clip.create_model(name, pretrained=str(archive), force_quick_gelu=True).eval()
    with torch.no_grad():
        for found, expected in zip(model(*tiny_clip.inputs()), source()(*tiny_clip.inputs()), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B/32", "ViT-B-32-quickgelu"])
def test_a_name_is_downloaded(archive, tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr(openai, "download_pretrained_from_url", lambda *args: asked.append(args) or str(archive))
    open_clip.load_openai_model(name, device="cpu", cache_dir=str(tmp_path))
    [(url, cache_dir)] = asked
    assert url.endswith("/ViT-B-32.pt")
    assert cache_dir == str(tmp_path)


def test_an_unknown_name_raises():
    with pytest.raises(RuntimeError, match=r"'ViT-X' is neither an OpenAI model nor a file.* ViT-L-14-336,"):
        open_clip.load_openai_model("ViT-X", device="cpu")


def test_an_unknown_precision_raises(archive):
    with pytest.raises(ValueError, match="'fp8' is unknown"):
        open_clip.load_openai_model(str(archive), precision="fp8", device="cpu")


def test_a_missing_device_raises(archive):
    with pytest.raises(RuntimeError, match="is not available"):
        open_clip.load_openai_model(str(archive), device="xpu")


def test_a_file_of_another_model_raises(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt does not have the weights of an OpenAI CLIP. Missing: visual"):
        open_clip.load_openai_model(tmp_path / "w.pt", device="cpu")
