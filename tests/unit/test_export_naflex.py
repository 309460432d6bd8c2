"""Graphs of NaFlex image towers: for images of one size, or for patches of one grid."""

from __future__ import annotations

import json

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

import open_clip
import tiny_clip
import tiny_naflex
from open_clip.export import command as export


def make(tmp_path, **vision):
    name = tiny_clip.write_folder(tmp_path / "model", tiny_naflex.config(vision))
    return tiny_naflex.randomise(open_clip.create_model(name))


def run(path, inputs: torch.Tensor) -> torch.Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(inputs).detach()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": inputs.numpy()})[0])


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("format", export.FORMATS)
@pytest.mark.parametrize("size", [(20, 20), (28, 12), (22, 15)])
@torch.no_grad()
def test_a_graph_for_images_of_one_size(tmp_path, format, size):
    model = make(tmp_path)
    model.visual.image_size = size
    told = export.export_model(model, tmp_path / "out", format)
    assert told["image"]["input"]["shape"] == ["batch", 3, *size]
    images = torch.randn(3, 3, *size)
    found = run(tmp_path / "out" / told["image"]["file"], images)
    assert_near(found, model.encode_image(images))
    whole = images[..., : size[0] // 4 * 4, : size[1] // 4 * 4]
    assert_near(found, model.encode_image(tiny_naflex.to_patches(whole, places=30)))


@pytest.mark.parametrize("format", export.FORMATS)
@torch.no_grad()
def test_a_graph_for_patches_of_one_grid(tmp_path, format):
    model = make(tmp_path)
    told = export.export_model(model, tmp_path / "out", format, patch_grid=(3, 7))
    assert told["image"]["input"]["shape"] == ["batch", 21, 48]
    assert told["patch_grid"] == [3, 7]
    batch = tiny_naflex.to_patches(torch.randn(2, 3, 12, 28))
    assert_near(run(tmp_path / "out" / told["image"]["file"], batch["patches"]), model.encode_image(batch))


def test_position_embeddings_are_constants(tmp_path):
    """Also those of a wide tower, which the exporter would not compute in advance. ATC has no antialiased Resize."""
    sizes = {"embed_dim": 512, "depth": 1, "num_heads": 4, "mlp_ratio": 0.25, "patch_size": 4}
    cfg = tiny_naflex.config({"timm_model_kwargs": {**sizes, "pos_embed_grid_size": [5, 5]}}, embed_dim=512)
    model = open_clip.create_model(tiny_clip.write_folder(tmp_path / "model", cfg))
    export.export_model(model, tmp_path / "out", batch_size=2, patch_grid=(3, 7))
    nodes = {node.op_type for node in onnx.load(str(tmp_path / "out/image.onnx")).graph.node}
    assert not nodes & {"Resize", "Upsample", "Shape", "Range", "Gelu", "Attention", "IsNaN"}


def test_the_model_is_unchanged(tmp_path):
    model = make(tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export.export_model(model, tmp_path / "out", "torch-export", patch_grid=(3, 7))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_the_command(tmp_path):
    name = tiny_clip.write_folder(tmp_path / "model", tiny_naflex.config())
    save_file(make(tmp_path).state_dict(), tmp_path / "model/open_clip_model.safetensors")
    options = ["--model", name, "--output", str(tmp_path / "out"), "--format", "torch-export"]
    assert export.main([*options, "--patch-grid", "2", "6"]) == 0
    told = json.loads((tmp_path / "out/export.pt2.json").read_text())
    assert told["image"]["input"]["shape"] == ["batch", 12, 48]
    assert export.main([*options, "--image-size", "12", "24"]) == 0
    told = json.loads((tmp_path / "out/export.pt2.json").read_text())
    assert told["image"]["input"]["shape"] == ["batch", 3, 12, 24]
    assert "patch_grid" not in told


def test_a_size_below_the_patch_size_raises(tmp_path):
    model = make(tmp_path)
    model.visual.image_size = (20, 3)
    with pytest.raises(ValueError, match=r"20 x 3 pixels are smaller than patches of 4 x 4. .*--image-size"):
        export.export_model(model, tmp_path / "out", "torch-export")


def test_a_grid_for_another_tower_raises(tmp_path):
    model = open_clip.create_model(tiny_clip.folder(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"--patch-grid 3 4 needs a NaFlex image tower. .* VisionTransformer"):
        export.export_model(model, tmp_path / "out", "torch-export", patch_grid=(3, 4))


def test_a_grid_without_rows_raises(tmp_path, capsys):
    with pytest.raises(SystemExit):
        export.main(["--model", "ViT-B-32", "--output", str(tmp_path), "--patch-grid", "0", "4"])
    assert "at least one row and one column" in capsys.readouterr().err


@torch.no_grad()
def test_trace_model(tmp_path):
    model = make(tmp_path)
    traced = open_clip.trace_model(model, batch_size=2)
    images = torch.randn(2, 3, 20, 20)
    assert_near(traced.encode_image(images), model.encode_image(images))
