"""Commands that read a checkpoint of a run with --use-naflex, whose model is a converted ViT."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import open_clip
import tiny_clip
import tiny_naflex
from open_clip import export, interpolate, push_pretrained_to_hf_hub
from open_clip.convert import model_cfg_to_transformers
from open_clip.convert.__main__ import main as convert

FORCE = "--force-naflex-vision"


@pytest.fixture
def run(tmp_path: Path) -> tuple[str, str, torch.nn.Module]:
    """Return the name of the model of a run, its checkpoint, and the model."""
    name = tiny_clip.folder(tmp_path / "model", text={"vocab_size": 49408})
    model = tiny_naflex.randomise(open_clip.create_model(name, force_naflex_vision=True))
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, path)
    return name, str(path), model


def test_conversion(run, tmp_path: Path) -> None:
    name, path, model = run
    convert(["--model", name, "--pretrained", path, "--to", "open_clip", FORCE, str(tmp_path / "new")])
    again = open_clip.create_model(f"local-dir:{tmp_path / 'new'}")
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    with pytest.raises(ValueError, match=r"naflexvit_base_patch16_gap of timm\. transformers supports only"):
        convert(["--model", name, "--pretrained", path, "--to", "transformers", FORCE, str(tmp_path / "theirs")])


def test_export(run, tmp_path: Path, caplog) -> None:
    name, path, _ = run
    options = ["--model", name, "--pretrained", path, "--output", str(tmp_path / "out"), "--format", "torch-export"]
    assert export.main(options) == 1
    assert FORCE in caplog.text
    assert export.main([*options, FORCE]) == 0
    told = json.loads((tmp_path / "out/export.pt2.json").read_text())
    assert told["image"]["input"]["shape"] == ["batch", 3, 32, 32]


def test_upload(run, monkeypatch) -> None:
    name, path, _ = run
    uploaded = []
    functions = push_pretrained_to_hf_hub.__globals__
    monkeypatch.setitem(functions, "_check_hub_access", lambda *args: None)
    monkeypatch.setitem(functions, "push_to_hf_hub", lambda *args, **kwargs: uploaded.append(args))
    monkeypatch.setattr("sys.argv", ["push", "--model", name, "--pretrained", path, "--repo-id", "org/name", FORCE])
    runpy.run_module("open_clip.push_to_hf_hub", run_name="__main__")
    ((model, _, model_config, _),) = uploaded
    assert isinstance(model.visual, open_clip.naflex.NaFlexTower)
    assert model_config["vision_cfg"]["timm_model_name"] == "naflexvit_base_patch16_gap"


def test_average_with_the_weights_before_the_conversion(run, tmp_path: Path, capsys) -> None:
    name, path, model = run
    native = tiny_naflex.randomise(open_clip.create_model(name))
    before, output = str(tmp_path / "native.pt"), str(tmp_path / "mean.safetensors")
    torch.save(native.state_dict(), before)
    interpolate.main([before, path, output, "--model", name, FORCE])
    weights, theirs = load_file(output), open_clip.create_model(name, before, force_naflex_vision=True).state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(weights[key], (value + theirs[key]) / 2)
    with pytest.raises(SystemExit):
        interpolate.main([before, path, output, FORCE])
    assert f"{FORCE} needs --model NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_naflex": True}, "converted to NaFlex, which resizes its positions"),
        ({"depth": 2}, "sets depth of timm's"),
        ({"dynamic_img_size": True, "img_size": 192}, "sets img_size of timm's"),
    ],
)
def test_towers_of_siglip_that_transformers_does_not_have(options, message) -> None:
    cfg = open_clip.get_model_config("ViT-B-16-SigLIP")
    cfg["vision_cfg"]["timm_model_kwargs"] = options
    with pytest.raises(ValueError, match=message):
        model_cfg_to_transformers(cfg, "The model")


def test_options_of_timm_that_change_no_features_have_a_configuration_of_transformers() -> None:
    cfg = open_clip.get_model_config("ViT-B-16-SigLIP")
    expected = model_cfg_to_transformers(cfg, "The model")
    cfg["vision_cfg"]["timm_model_kwargs"] = {"use_naflex": False, "img_size": 224, "dynamic_img_size": True}
    assert model_cfg_to_transformers(cfg, "The model") == expected
