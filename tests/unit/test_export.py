"""open_clip.export: graphs compute the same features as the model, and are moved to the folder only when checked."""

from __future__ import annotations

import importlib.util
import json
import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

import native_cases
import open_clip
import tiny_clip
from open_clip import model as models
from open_clip.export import command as export
from open_clip.export import formats, graphs
from versions import require


def make(case: str) -> torch.nn.Module:
    return native_cases.set_weights(native_cases.build(models, case))


def run_onnx(path, **inputs) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def names_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def operators(path) -> set[str]:
    return {node.op_type for node in onnx.load(str(path)).graph.node}


def assert_near(found, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(np.asarray(found), expected.detach().numpy(), atol=2e-5, rtol=0)


def test_onnx_for_any_batch(tmp_path):
    model = make("CLIP bias")
    (tmp_path / "image.onnx.data").touch()  # from an earlier export
    told = export.export_model(model, tmp_path, description={"model": "mine"})
    assert names_in(tmp_path) == {"image.onnx", "text.onnx", "export.onnx.json"}
    image, text = native_cases.inputs("CLIP bias")
    for count in (1, 3):
        images, texts = image[:1].repeat(count, 1, 1, 1), text[1:].repeat(count, 1)
        assert_near(run_onnx(tmp_path / "image.onnx", image=images), model.encode_image(images))
        assert_near(run_onnx(tmp_path / "text.onnx", text=texts), model.encode_text(texts))
    assert json.loads((tmp_path / "export.onnx.json").read_text()) == json.loads(json.dumps(told))
    assert told["model"] == "mine"
    assert told["text"]["input"] == {"name": "text", "shape": ["batch", 6], "dtype": "int64"}
    assert told["image"]["output"] == {"name": "image_features", "shape": ["batch", 12], "dtype": "float32"}
    assert told["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
    assert told["logit_bias"] == pytest.approx(model.logit_bias.item())


def test_graphs_contain_only_operators_of_atc(tmp_path):
    """With a fixed batch, shapes are constants, and all operators of opset 18 are supported by CANN 8."""
    told = export.export_model(make("CustomTextCLIP quick_gelu"), tmp_path, batch_size=3, normalize=True)
    assert told["image"]["input"]["shape"] == [3, 3, 16, 16]
    for name in ("image.onnx", "text.onnx"):
        written = onnx.load(str(tmp_path / name))
        assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", 18)]
        assert written.ir_version == 8  # of ONNX 1.13, which introduced opset 18
        assert not written.functions
        assert not any(node.metadata_props for node in written.graph.node)
        assert not operators(tmp_path / name) & {"Shape", "Range", "Trilu", "IsNaN", "ReduceL2", "Gelu", "Attention"}


@pytest.mark.parametrize("format", export.FORMATS)
def test_normalized_features_and_a_tower_with_a_class_token(tmp_path, format):
    model = make("CustomTextCLIP embed_cls")
    told = export.export_model(model, tmp_path, format, normalize=True)
    assert told["normalized"]
    _, text = native_cases.inputs("CustomTextCLIP embed_cls")
    expected = F.normalize(model.encode_text(text), dim=-1)
    if format == "onnx":
        found = run_onnx(tmp_path / "text.onnx", text=text)
        assert "IsNaN" not in operators(tmp_path / "text.onnx")  # a mask, which this tower has, could cause it
    else:
        found = torch.export.load(tmp_path / "text.pt2").module()(text).detach()
    assert_near(found, expected)


TEXT = {"context_length": 6, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1}
VISION = {"layers": 1, "width": 24, "head_width": 12, "patch_size": 8, "image_size": 16}


def resnet(folder):
    return models.CLIP(12, {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "image_size": 64}, TEXT)


def timm(folder):
    vision = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "map", "timm_proj": "none"}
    return models.CustomTextCLIP(64, vision, TEXT)


def hugging_face(folder):
    from transformers import AutoConfig

    AutoConfig.for_model(
        "roberta", vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=90, type_vocab_size=1,
    ).save_pretrained(folder / "roberta")  # fmt: skip
    text = {"hf_model_name": str(folder / "roberta"), "hf_model_pretrained": False, "hf_proj_type": "linear"}
    return models.CustomTextCLIP(12, VISION, text)


def coca(folder):
    if not hasattr(open_clip, "CoCa"):
        raise NotImplementedError("CoCa")
    vision = VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5}
    text = TEXT | {"width": 12, "embed_cls": True}
    return open_clip.CoCa(12, TEXT | {"width": 12}, text | {"output_tokens": True}, vision | {"output_tokens": True})


@pytest.mark.parametrize(
    ("build", "format"), [(resnet, "onnx"), (timm, "torch-export"), (hugging_face, "onnx"), (coca, "torch-export")]
)
def test_other_families(tmp_path, build, format):
    if (build, format) == (resnet, "onnx"):
        require("torch", "2.7", "the exporter of torch 2.6 does not translate batch norms")
    torch.manual_seed(0)
    try:
        model = build(tmp_path)
    except NotImplementedError as error:
        pytest.skip(f"not built yet: {error}")
    told = export.export_model(model, tmp_path / "out", format)
    assert told["image"]["output"]["shape"] == ["batch", 64 if build is timm else 12]
    assert told["context_length"] == (77 if build is hugging_face else 6)
    assert max(told[tower]["largest_difference"] for tower in ("image", "text")) < 1e-5
    if format == "torch-export":
        held = torch.export.load(tmp_path / "out/text.pt2").state_dict
        assert not any(name.startswith("model.text_decoder") for name in held)


def test_torch_export_contains_only_the_tower(tmp_path):
    model = make("CLIP plain")
    export.export_model(model, tmp_path, "torch-export")
    image = torch.export.load(tmp_path / "image.pt2")
    text = torch.export.load(tmp_path / "text.pt2")
    visual = {f"model.visual.{name}" for name in model.visual.state_dict()}
    assert set(image.state_dict) == visual
    others = {f"model.{name}" for name in model.state_dict()} - visual - {"model.logit_scale"}
    assert set(text.state_dict) == others
    images, texts = native_cases.inputs("CLIP plain")
    assert torch.equal(image.module()(images), model.encode_image(images))
    assert torch.equal(text.module()(texts[:1]), model.encode_text(texts[:1]))


def test_half_precision(tmp_path):
    require("torch", "2.7", "torch 2.6 writes the batch size of its example into graphs in half precision")
    model = open_clip.create_model(tiny_clip.folder(tmp_path / "tiny"), precision="fp16")
    told = export.export_model(model, tmp_path / "out", normalize=True)
    assert told["image"]["input"]["dtype"] == told["text"]["output"]["dtype"] == "float16"
    assert 0 < told["image"]["largest_difference"] < 5e-3
    assert told["preprocess"]["size"] == (32, 32)
    assert told["preprocess"]["interpolation"] == "bicubic"


def test_large_weights_are_in_a_separate_file(tmp_path, monkeypatch):
    model = make("CLIP plain")
    monkeypatch.setattr(formats, "LARGEST_PROTOBUF", 1000)
    export.export_model(model, tmp_path, batch_size=2)
    assert {"image.onnx.data", "text.onnx.data"} < names_in(tmp_path)
    image, _ = native_cases.inputs("CLIP plain")
    assert_near(run_onnx(tmp_path / "image.onnx", image=image), model.encode_image(image))


@pytest.mark.parametrize("fault", ["other weights", "NaN", "one batch size"])
def test_a_wrong_graph_is_not_moved_to_the_folder(tmp_path, monkeypatch, fault):
    model = make("CLIP plain")
    (tmp_path / "text.pt2").write_bytes(b"earlier")
    load = formats.TorchExport.load

    def faulty(self, path):
        run = load(self, path)
        if path.name == "image.pt2":
            return run
        if fault == "one batch size":
            return lambda x: run(x) + (0.01 if len(x) == 5 else 0)
        return lambda x: run(x) * (float("nan") if fault == "NaN" else 1.001)

    monkeypatch.setattr(formats.TorchExport, "load", faulty)
    with pytest.raises(export.ExportError, match=r"text tower: largest difference .* is above 1.0e-04"):
        export.export_model(model, tmp_path, "torch-export")
    assert names_in(tmp_path) == {"text.pt2"}
    assert (tmp_path / "text.pt2").read_bytes() == b"earlier"


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(ImportError, match="pip install onnxscript"):
        export.export_model(make("CLIP plain"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"format": "tflite"}, "format is one of 'onnx', 'torch-export', got 'tflite'"),
        ({"batch_size": 0}, "batch_size=0 is not valid"),
        ({"opset": 17}, "cannot write opset 17. Use 18"),
    ],
)
def test_invalid_arguments_raise(tmp_path, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        export.export_model(make("CLIP plain"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_bfloat16_weights_raise_for_onnx(tmp_path):
    with pytest.raises(ValueError, match="Use fp32 or fp16"):
        export.export_model(make("CLIP plain").bfloat16(), tmp_path / "out")


def test_the_command(tmp_path, caplog):
    name = tiny_clip.folder(tmp_path / "tiny", {"mean": [0.5] * 3, "std": [0.25] * 3}, text={"hf_tokenizer_name": None})
    model = open_clip.create_model(name, force_image_size=16)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    weights = ["--model", name, "--pretrained", str(tmp_path / "weights.pt"), "--output", str(tmp_path / "out")]
    options = ["--format", "torch-export", "--batch-size", "2", "--image-size", "16"]
    with caplog.at_level(logging.INFO):
        assert export.main([*weights, *options]) == 0
    assert "text tower: largest difference" in caplog.text
    told = json.loads((tmp_path / "out/export.pt2.json").read_text())
    assert (told["model"], told["precision"], told["tokenizer"]) == (name, "fp32", "clip")
    assert told["preprocess"]["mean"] == [0.5] * 3
    assert told["image"]["input"]["shape"] == [2, 3, 16, 16]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "ViT-B-33"], "There is no model 'ViT-B-33'"),
        (["--model", "ViT-B-32"], "has no weights, and the caller requires them"),
        (["--model", "ViT-B-32", "--pretrained", "laion"], "neither a tag"),
    ],
)
def test_the_command_names_what_is_missing(tmp_path, caplog, options, reason):
    assert export.main([*options, "--output", str(tmp_path / "out")]) == 1
    assert reason in caplog.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "expected"), [("gte-modernbert-base-ViT-B-32-256", 256), ("roberta-ViT-B-32", 77), ("ViT-B-32", 77)]
)
def test_the_default_context_length_is_that_of_the_configuration(name, expected):
    pytest.importorskip("transformers")
    model = open_clip.create_model(name, device="meta", load_weights=False)
    assert graphs.default_context_length(model) == expected
