"""Models on the CPU and the meta device, and functions that save weights in each format."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from torch import nn

import tiny_clip
from open_clip.checkpoint.meta import NoInitialization
from open_clip.model import CLIP


def clip(seed: int = 0, model_class: type[nn.Module] = CLIP, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return model_class(**tiny_clip.config(**changes))


def meta_clip(model_class: type[nn.Module] = CLIP, **changes) -> nn.Module:
    with torch.device("meta"), NoInitialization():
        return clip(0, model_class, **changes)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    weights, others = a.state_dict(), b.state_dict()
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        assert torch.equal(value, others[key]), key


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_bare(weights, path):
    torch.save(weights, path)


def save_legacy(weights, path):
    torch.save(weights, path, _use_new_zipfile_serialization=False)


def save_training(weights, path):
    weights = {f"module.{key}": value for key, value in weights.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": optimizer, "scaler": {}}, path)


def save_compiled(weights, path):
    torch.save({"state_dict": {f"_orig_mod.module.{key}": value for key, value in weights.items()}}, path)


def save_safetensors(weights, path):
    save_file(weights, path)


def save_npz(weights, path):
    with path.open("wb") as file:
        numpy.savez(file, **{key: value.numpy() for key, value in weights.items()})


def save_lightning(weights, path):
    weights = {f"model.{key}": value for key, value in weights.items()}
    torch.save({"epoch": 3, "global_step": 9, "hyper_parameters": {"lr": 0.1}, "state_dict": weights}, path)


def save_averaged(weights, path):
    weights = {f"module.module._orig_mod.{key}": value for key, value in weights.items()}
    torch.save({"model_ema": {"n_averaged": torch.tensor(5), **weights}, "step": torch.tensor(3)}, path)


def save_nested(weights, path):
    """Save averaged weights as well. The trained weights are used."""
    average = {key: value + 1 for key, value in weights.items()}
    torch.save({"model": {"state_dict": weights}, "state_dict_ema": average, "epoch": torch.tensor(1)}, path)


def save_model_state_dict(weights, path):
    torch.save({"model_state_dict": {f"_orig_mod.{key}": value for key, value in weights.items()}}, path)


SAVERS = [
    *(save_bare, save_legacy, save_training, save_compiled, save_safetensors, save_npz),
    *(save_lightning, save_averaged, save_nested, save_model_state_dict),
]
