"""Fine-tuning scripts: load, train, save to the same path; files that change or vanish while a model is in use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import open_clip

SAFETENSORS = pytest.importorskip("safetensors.torch")


def save(model: torch.nn.Module, path: Path) -> None:
    state_dict = model.state_dict()
    if path.suffix == ".safetensors":
        SAFETENSORS.save_file(state_dict, str(path))
    else:
        torch.save(state_dict, path, _use_new_zipfile_serialization=path.name != "legacy.pt")


@pytest.fixture(params=["w.pt", "legacy.pt", "w.safetensors"])
def file(request: pytest.FixtureRequest, model: torch.nn.Module, tmp_path: Path) -> Path:
    """Save the weights of `model` in one of the formats."""
    path = tmp_path / request.param
    save(model, path)
    return path


@pytest.fixture
def other_file(file: Path, tiny_name: str) -> Path:
    """Save the weights of another model in the same format and size."""
    torch.manual_seed(9)
    path = file.with_name("new" + file.suffix) if file.name != "legacy.pt" else file.with_name("other") / "legacy.pt"
    path.parent.mkdir(exist_ok=True)
    save(open_clip.create_model(tiny_name), path)
    return path


def test_fine_tuned_weights_are_saved_over_the_file_they_came_from(file, tiny_name, images, texts):
    """In a separate process, because memory-mapping would end it with a bus error and lose the file."""
    script = f"""
import torch, open_clip, sys
from pathlib import Path
open_clip.add_model_config(sys.argv[2])
path = Path(sys.argv[1])
model = open_clip.create_model({tiny_name!r}, pretrained=str(path)).train()
for name, parameter in model.named_parameters():
    parameter.requires_grad = name == "visual.proj"
image_features, text_features, scale = model(torch.ones(2, 3, 64, 64), torch.ones(2, 77, dtype=torch.long))
(image_features.sum() + text_features.sum() + scale).backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
if path.suffix == ".safetensors":
    from safetensors.torch import save_file
    save_file(model.state_dict(), str(path))
else:
    torch.save(model.state_dict(), path)
again = open_clip.create_model({tiny_name!r}, pretrained=str(path))
assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
"""
    config = file.with_name(f"{tiny_name}.json")
    config.write_text(json.dumps(open_clip.get_model_config(tiny_name)), encoding="utf-8")
    subprocess.run([sys.executable, "-c", script, str(file), str(config)], check=True, timeout=300)


def overwrite(file: Path, other: Path) -> None:
    with open(other, "rb") as source, open(file, "r+b") as target:
        shutil.copyfileobj(source, target)


HARM = {
    "copied over": lambda file, other: shutil.copyfile(other, file),
    "written in place": overwrite,
    "truncated": lambda file, other: file.write_bytes(file.read_bytes()[:1000]),
    "emptied": lambda file, other: file.write_bytes(b""),
    "deleted": lambda file, other: file.unlink(),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_model_in_use_does_not_change_with_its_file(file, other_file, harm, tiny_name, texts):
    loaded = open_clip.create_model(tiny_name, pretrained=str(file)).eval()
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    HARM[harm](file, other_file)
    loaded.encode_text(texts)
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("harm", HARM)
def test_a_state_dict_does_not_change_with_its_file(file, other_file, harm):
    from open_clip.factory import load_state_dict

    if file.suffix == ".safetensors" and "npu" not in open_clip.__version__:
        pytest.skip("open_clip_torch 3.3.0 maps the file: a bus error")
    weights = load_state_dict(str(file))
    before = {key: value.clone() for key, value in weights.items()}
    HARM[harm](file, other_file)
    assert all(torch.equal(value, before[key]) for key, value in weights.items())


def test_load_checkpoint_then_save(file, tiny_name, model):
    fresh = open_clip.create_model(tiny_name)
    open_clip.load_checkpoint(fresh, str(file))
    save(fresh, file)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in fresh.state_dict().items())


def test_one_tensor_under_two_names_trains_as_two(tiny_name, model, tmp_path):
    """3.3.0 copies into the parameters of the model, where tensors never share memory."""
    weights = dict(model.state_dict())
    first, second = (f"visual.transformer.resblocks.{n}.mlp.c_fc.weight" for n in (0, 1))
    weights[second] = weights[first]
    torch.save(weights, tmp_path / "tied.pt")
    loaded = open_clip.create_model(tiny_name, pretrained=str(tmp_path / "tied.pt"))
    parameters = dict(loaded.named_parameters())
    with torch.no_grad():
        parameters[first].add_(1)
    assert torch.equal(parameters[second], weights[second])


def test_paths_need_not_be_text(weights, tiny_name, model):
    for build in (
        lambda: open_clip.create_model(tiny_name, pretrained=weights),
        lambda: open_clip.create_model_and_transforms(tiny_name, weights, cache_dir=weights.parent)[0],
        lambda: open_clip.create_model_from_pretrained(tiny_name, weights, return_transform=False),
        lambda: open_clip.load_openai_model(weights, precision="fp32", device="cpu"),
    ):
        # 3.3.0 rounds OpenAI's weights to float16 on their way to float32.
        torch.testing.assert_close(build().visual.proj, model.visual.proj, atol=1e-3, rtol=1e-3)
    assert open_clip.get_tokenizer(tiny_name, cache_dir=weights.parent)(["a"]).shape == (1, 77)


@pytest.mark.parametrize("nothing", [None, "", False])
def test_no_weights(nothing, tiny_name):
    assert open_clip.create_model(tiny_name, pretrained=nothing) is not None


@pytest.mark.ours_only("open_clip_torch 3.3.0 fails, too, sometimes with pathlib's error, which does not say where")
@pytest.mark.parametrize("value", [True, 3])
def test_a_value_that_is_not_a_path_is_named(value, tiny_name):
    with pytest.raises(RuntimeError, match=str(value)):
        open_clip.create_model(tiny_name, pretrained=value)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_an_index_means_an_accelerator(tiny_name):
    with pytest.raises(RuntimeError):
        open_clip.create_model(tiny_name, device=0)


@pytest.mark.ours_only("open_clip_torch 3.3.0 needs weights_only=False for these, and then runs what is in the file")
def test_objects_beside_the_weights(tiny_name, model, tmp_path):
    import argparse

    import numpy

    extras = {"lr": numpy.float64(0.3), "args": argparse.Namespace(lr=1), "folder": tmp_path}
    torch.save({"epoch": 3, **extras, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    loaded = open_clip.create_model(tiny_name, pretrained=str(tmp_path / "c.pt"))
    assert torch.equal(loaded.visual.proj, model.visual.proj)


@pytest.mark.ours_only("open_clip_torch 3.3.0 knows the prefix module. only")
@pytest.mark.parametrize("prefix", ["clip.", "base_model.model."])
def test_a_prefix_of_all_names(prefix, tiny_name, model, tmp_path):
    torch.save({prefix + key: value for key, value in model.state_dict().items()}, tmp_path / "p.pt")
    loaded = open_clip.create_model(tiny_name, pretrained=str(tmp_path / "p.pt"))
    assert torch.equal(loaded.visual.proj, model.visual.proj)
