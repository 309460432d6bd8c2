"""Commands check the path of their result before they build a model, count FLOPs or export."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

import tiny_clip
from open_clip.convert import __main__ as convert
from open_clip.export import command as export
from open_clip.push_to_hf_hub import push_pretrained_to_hf_hub, push_to_hf_hub
from open_clip.utils import check_folder
from training import profiler


@pytest.fixture
def file(tmp_path) -> Path:
    """A file, which cannot be used as a folder."""
    path = tmp_path / "file"
    path.write_text("mine")
    return path


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    # (open_clip.push_to_hf_hub is the function)
    for module in (export, convert, sys.modules["open_clip.push_to_hf_hub"]):
        for name in ("create_model", "create_model_from_pretrained"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a model was built"))
    monkeypatch.setattr(profiler, "profile_model", lambda *_, **__: pytest.fail("a model was counted"))


@pytest.mark.parametrize("inside", ["", "/folder", "/folder/in/it"])
def test_a_folder_that_cannot_be_written(file, inside):
    with pytest.raises(OSError, match=f"--output {file}{inside} cannot be written .*Choose another folder"):
        check_folder(f"{file}{inside}", "--output")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("inside", ["", "new", "new/er"])
def test_trying_a_folder_leaves_nothing(tmp_path, inside):
    check_folder(tmp_path / inside, "--output")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_on_a_full_disk(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"cannot be written .*No space left on device"):
        check_folder(tmp_path, "--output")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", export.FORMATS)
def test_export(tmp_path, file, caplog, format):
    name = tiny_clip.folder(tmp_path / "tiny")
    assert export.main(["--model", name, "--format", format, "--output", str(file / "out")]) == 1
    expected = "needs onnx" if format == "onnx" and not importlib.util.find_spec("onnx") else "cannot be written"
    assert expected in caplog.text


def test_export_without_its_packages(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export.main(["--model", tiny_clip.folder(tmp_path / "tiny"), "--output", str(tmp_path / "out")]) == 1
    assert "pip install onnx onnxscript onnxruntime" in caplog.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["transformers", "open_clip"])
def test_convert(tmp_path, file, to):
    with pytest.raises(OSError, match=r"The folder .* cannot be written"):
        convert.main([str(file / "out"), "--to", to, "--model", tiny_clip.folder(tmp_path / "tiny")])


def test_convert_of_what_transformers_has_not(tmp_path):
    with pytest.raises(ValueError, match="is a CoCa"):
        convert.main([str(tmp_path / "out"), "--to", "transformers", "--model", "coca_ViT-B-32"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "value", "error", "words"),
    [
        ("HF_HUB_OFFLINE", True, RuntimeError, "HF_HUB_OFFLINE is set"),
        ("ENDPOINT", "https://huggingface.co", RuntimeError, "there is no token"),
    ],
)
def test_push(monkeypatch, tmp_path, setting, value, error, words):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, setting, value)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(error, match=words):
        push_pretrained_to_hf_hub("ViT-B-32", "openai", "org/name")
    with pytest.raises(error, match=words):
        push_to_hf_hub(None, None, None, "org/name")


def test_push_to_what_is_no_repository():
    with pytest.raises(ValueError, match="a/b/c"):
        push_pretrained_to_hf_hub("ViT-B-32", "openai", "a/b/c")


def test_profiler(tmp_path, file, capsys):
    for path, words in ((file / "r.csv", "cannot be written"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit, match="2"):
            profiler.main(["--model", "ViT-B-32", "--results-file", str(path)])
        assert words in capsys.readouterr().err
