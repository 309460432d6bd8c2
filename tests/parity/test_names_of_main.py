"""Public names of open_clip's main branch (4.2.0.dev0) that 3.3.0 lacks: here, or refused with what to use instead."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import open_clip
from open_clip import aliases, layers, task
from training import zero_shot

CHANGES = json.loads(
    (Path(__file__).parent / "fixtures" / "public_api_changes_4.2.0.dev0.json").read_text(encoding="utf-8")
)
NEW = [(module, name) for module, found in CHANGES.items() if module.startswith("open_clip") and "new" in found
       for name in found["new"]]  # fmt: skip
MODERN_TEXT = ("ModernTextAttention", "ModernTextBlock", "ModernTextPool", "ModernTextTransformer", "ReLUSquared",
               "RotaryEmbedding1D", "SwiGLU")  # fmt: skip
NAFLEX = ("NaFlexTransformFactory", "NaFlexEvalTransformFactory", "is_naflex_aug_cfg", "naflex_eval_transform_v2")
HERE = {
    ("open_clip", "get_model_from_task"),
    ("open_clip", "ModernTextTransformer"),
    ("open_clip.tokenizer", "TikTokenTokenizer"),
    *(("open_clip.transformer", name) for name in MODERN_TEXT),
    *(("open_clip.transform", name) for name in NAFLEX),
}


@pytest.mark.parametrize(("module", "name"), NEW)
def test_a_new_name_of_a_module_is_here_or_refused_with_a_sentence(module, name):
    imported = importlib.import_module(module)
    if (module, name) in HERE:
        assert callable(getattr(imported, name))
        return
    with pytest.raises(AttributeError, match=rf"has no attribute '{name}': .*(not supported yet|Use)") as raised:
        getattr(imported, name)
    assert str(raised.value).endswith(".")


def test_refused_names_are_names_of_the_main_branch():
    tasks = {name for module, found in CHANGES.items() if module.startswith("open_clip.task") for name in
             found["new module"]}  # fmt: skip
    for module, names in aliases.REFUSED.items():
        known = tasks if module == "open_clip.task" else {name for where, name in NEW if where == module}
        assert set(names) <= known


def test_layers():
    assert set(CHANGES["open_clip.layers"]["new module"]) == set(layers.__all__)
    assert layers.LayerNorm is open_clip.model.LayerNorm


def test_unwrap_model():
    class Wrapped(DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    model = nn.Linear(2, 2)
    compiled = nn.Module()
    compiled._orig_mod = model
    for wrapped in (model, Wrapped(model), compiled, Wrapped(compiled)):
        assert task.unwrap_model(wrapped) is model
        assert open_clip.get_model_from_task(wrapped) is model


@pytest.mark.parametrize("name", ["audio_aug_cfg", "pretrained_audio_path"])
def test_arguments_of_create_model(name):
    quiet = {"force_naflex_vision": False, "audio_aug_cfg": None, "pretrained_audio_path": None}
    assert open_clip.create_model("RN50", device="meta", **quiet).visual is not None
    with pytest.raises(ValueError, match=f"{name}: .* not supported yet"):
        open_clip.create_model_and_transforms("RN50", device="meta", **{name: True})


def test_run_zero_shot_classifier(monkeypatch):
    monkeypatch.setattr(zero_shot, "run", lambda *args: args)
    args = (nn.Identity(), torch.zeros(1), [], SimpleNamespace())
    assert zero_shot.run_zero_shot_classifier(*args, use_fsdp_eval=True) == args
