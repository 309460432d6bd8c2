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
MODULES = {name: names for name, names in API.items() if not name.startswith("methods.")}
NAMES = [(module, name, parameters) for module, names in MODULES.items() for name, parameters in names.items()]
METHODS = [
    (model, name, parameters)
    for model in ("CLIP", "CustomTextCLIP", "CoCa")
    for name, parameters in API[f"methods.{model}"].items()
]


def check_parameters(function: object, expected: list[str]) -> None:
    """The same names in the same places; what is ours alone stands behind them and may be left out."""
    found = inspect.signature(function).parameters
    assert list(found)[: len(expected)] == expected
    for name in list(found)[len(expected) :]:
        assert found[name].default is not inspect.Parameter.empty, name


@pytest.mark.parametrize("module", MODULES)
def test_modules_need_no_import_of_their_own(module):
    found = eval(module, {"open_clip": open_clip})
    if module == "open_clip.push_to_hf_hub":  # as in open_clip, the function of that name is in front of the module
        found = sys.modules[found.__module__]
    assert importlib.import_module(module) is found


@pytest.mark.parametrize(("module", "name", "parameters"), NAMES, ids=[f"{module}.{name}" for module, name, _ in NAMES])
def test_names_and_parameters(module, name, parameters):
    found = getattr(importlib.import_module(module), name)
    if parameters is not None:
        check_parameters(found, parameters)


@pytest.mark.parametrize(
    ("model", "name", "parameters"), METHODS, ids=[f"{model}.{name}" for model, name, _ in METHODS]
)
def test_methods(model, name, parameters):
    check_parameters(getattr(getattr(open_clip, model), name), parameters)


def test_the_private_tokenizer_that_clip_benchmark_imports():
    from open_clip.tokenizer import _tokenizer

    assert _tokenizer.encode("a cat") == [320, 2368]


def test_all_is_complete():
    assert set(API["open_clip"]) <= set(open_clip.__all__)
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
