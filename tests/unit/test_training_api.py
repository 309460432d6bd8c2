"""The names that scripts use of open_clip_train 3.3.0 are here: tests/parity/fixtures/training_api_3.3.0.json."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest
import torch

API = json.loads((Path(__file__).parents[1] / "parity/fixtures/training_api_3.3.0.json").read_text(encoding="utf-8"))
NAMES = [(module, name, parameters) for module, names in API.items() for name, parameters in names.items()]

# Names that exist only to be refused: their arguments, and the advice in the error.
REFUSED = {
    "training.profiler.profile_fvcore": ({"model": None}, "not count attention. Use torch"),
    "training.profiler.profile_fvcore_image": ({"model": None}, "not count attention. Use torch"),
    "training.profiler.profile_fvcore_text": ({"model": None}, "not count attention. Use torch"),
    "training.profiler.profile_model": ({"model_name": "RN50", "profiler": "fvcore"}, "not count attention. Use torch"),
    "training.distributed.init_distributed_device_so": ({"horovod": True}, "Start the processes with torchrun"),
}


@pytest.mark.parametrize(("module", "name", "parameters"), NAMES, ids=[f"{module}.{name}" for module, name, _ in NAMES])
def test_names_and_parameters(module, name, parameters):
    """Both packages have the name, with the same parameters in the same order. Our own parameters come last."""
    found = getattr(importlib.import_module(module), name)
    assert getattr(importlib.import_module(module.replace("training", "open_clip_train", 1)), name) is found
    signature = inspect.signature(found).parameters
    assert list(signature)[: len(parameters)] == parameters
    for extra in list(signature)[len(parameters) :]:
        assert signature[extra].default is not inspect.Parameter.empty, extra


@pytest.mark.parametrize("name", REFUSED)
def test_refused_names_say_what_to_use_instead(name):
    module, _, function = name.rpartition(".")
    arguments, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        getattr(importlib.import_module(module), function)(**arguments)


@pytest.mark.parametrize("names", [("image", "text"), ("image", "label")])
def test_batches_of_scripts_are_tuples(names):
    from training.batches import to_device

    members = torch.ones(2, 3), torch.tensor([1, 2])
    moved = to_device(members, torch.device("cpu"), torch.bfloat16, names)
    assert list(moved) == list(names)
    assert (moved["image"].dtype, moved[names[1]].dtype) == (torch.bfloat16, torch.int64)
    unchanged = to_device({"text": members[1], "weight": members[0]}, torch.device("cpu"))
    assert torch.equal(unchanged["weight"], members[0])


def test_weights_of_a_list_of_shards_are_a_list():
    from training.data import expand_urls

    with pytest.raises(ValueError, match="need shards as text"):
        expand_urls(["a.tar"], "1")
    with pytest.raises(ValueError, match="Join the weights by '::'"):
        expand_urls("a.tar::b.tar", [1, 2])


def test_force_cpu_moves_the_model():
    from training.flops import profile_torch_image

    model = torch.nn.Linear(2, 2)
    model.encode_image = lambda image: torch.ones(1, 2) @ model.weight
    assert profile_torch_image(model, (3, 4, 4), force_cpu=True) == 8
