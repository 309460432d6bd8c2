"""What open_clip 3.3.0 offers, by name and parameters, is here: tests/parity/fixtures/public_api_3.3.0.json."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import open_clip

API = json.loads((Path(__file__).parents[1] / "parity/fixtures/public_api_3.3.0.json").read_text(encoding="utf-8"))

# Not here yet: the other towers, CoCa, Hugging Face's tokenizers, foreign formats, and publishing on the hub.
TO_COME = {
    "open_clip.CoCa",
    "open_clip.coca_model",
    "open_clip.convert.convert_mobile_clip_state_dict",
    "open_clip.convert.load_big_vision_weights",
    "open_clip.hf_configs",
    "open_clip.hf_model",
    "open_clip.push_pretrained_to_hf_hub",
    "open_clip.push_to_hf_hub",
    "open_clip.tokenizer.HFTokenizer",
    "open_clip.tokenizer.SigLipTokenizer",
    "open_clip.transformer.MultimodalTransformer",
}
MODULES = {name: names for name, names in API.items() if not name.startswith("methods.")}
NAMES = [
    (module, name, parameters)
    for module, names in MODULES.items()
    if module not in TO_COME
    for name, parameters in names.items()
    if f"{module}.{name}" not in TO_COME
]
METHODS = [
    (model, name, parameters)
    for model in ("CLIP", "CustomTextCLIP")
    for name, parameters in API[f"methods.{model}"].items()
]


def check_parameters(function: object, expected: list[str]) -> None:
    """The same names in the same places; what is ours alone stands behind them and may be left out."""
    found = inspect.signature(function).parameters
    assert list(found)[: len(expected)] == expected
    for name in list(found)[len(expected) :]:
        assert found[name].default is not inspect.Parameter.empty, name


@pytest.mark.parametrize("module", [name for name in MODULES if name not in TO_COME])
def test_modules_need_no_import_of_their_own(module):
    assert importlib.import_module(module) is eval(module, {"open_clip": open_clip})


@pytest.mark.parametrize(("module", "name", "parameters"), NAMES, ids=[f"{module}.{name}" for module, name, _ in NAMES])
def test_names_and_parameters(module, name, parameters):
    found = getattr(importlib.import_module(module), name)
    if parameters is not None:
        check_parameters(found, parameters)


@pytest.mark.parametrize(
    ("model", "name", "parameters"), METHODS, ids=[f"{model}.{name}" for model, name, _ in METHODS]
)
def test_methods(model, name, parameters):
    found = list(inspect.signature(getattr(getattr(open_clip, model), name)).parameters)
    assert [p for p in found if p != "self"][: len(parameters)] == [p for p in parameters if p != "self"]


@pytest.mark.parametrize("name", sorted(TO_COME))
def test_what_is_to_come_is_not_here(name):
    """Else it is checked like the rest: take it off the list."""
    module, _, attribute = name.rpartition(".")
    assert not hasattr(importlib.import_module(module), attribute)


def test_the_private_tokenizer_that_clip_benchmark_imports():
    from open_clip.tokenizer import _tokenizer

    assert _tokenizer.encode("a cat") == [320, 2368]


def test_all_is_complete():
    names = {name for name in API["open_clip"] if f"open_clip.{name}" not in TO_COME}
    assert names <= set(open_clip.__all__)
    assert all(hasattr(open_clip, name) for name in open_clip.__all__)
    assert "device" not in open_clip.__all__, "a star import would put it over a variable of that name"


def test_importing_is_light():
    """What only some functions need is imported there."""
    heavy = (
        "torchvision timm transformers huggingface_hub webdataset pandas tensorboard ftfy regex PIL safetensors sympy"
    )
    new = "set(sys.modules) - before"
    code = f"import sys, torch; before = set(sys.modules); import open_clip; print(set({heavy.split()}) & ({new}))"
    environment = {
        "PYTHONPATH": str(Path(open_clip.__file__).parents[1]),
        "PATH": "",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "set()"
