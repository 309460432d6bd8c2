"""Models built without memory get the weights of a normal construction with the same seed, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import coca_cases
import hf_cases
import open_clip
import tiny_clip
from open_clip import coca_model
from open_clip.deferred_init import DeferredInit
from open_clip.model import CLIP, CustomTextCLIP

RESNET = {"layers": [1, 2, 1, 1], "width": 16, "head_width": 16}
TIMM = {"timm_pool": "", "timm_proj": "linear"}
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: CLIP(**tiny_clip.config({"layers": 2}, {"layers": 2})),
    "resnet": lambda: CLIP(**tiny_clip.config(RESNET)),
    "coca": lambda: coca_cases.build(coca_model),
    "vit": lambda: CustomTextCLIP(**tiny_clip.config({"timm_model_name": "vit_tiny_patch16_224", **TIMM})),
    "convnext": lambda: CustomTextCLIP(**tiny_clip.config({"timm_model_name": "convnext_atto", **TIMM})),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_weights_and_generator_are_those_of_a_normal_construction(name):
    torch.manual_seed(3)
    expected = BUILDERS[name]()
    generator = torch.get_rng_state()
    torch.manual_seed(3)
    deferred = DeferredInit(smallest=64)
    with deferred.recording():
        model = BUILDERS[name]()
    assert torch.equal(torch.get_rng_state(), generator)
    whole = dict([*expected.named_parameters(), *expected.named_buffers()])
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert list(tensors) == list(whole)
    assert sum(tensor.is_meta for tensor in tensors.values()) > len(tensors) / 3
    for key, tensor in tensors.items():
        assert torch.equal(deferred.compute(tensor) if tensor.is_meta else tensor, whole[key]), key
    assert torch.equal(torch.get_rng_state(), generator), "computing draws no number of the run"


def test_create_model_defers_random_weights_only_while_they_are_offered(tmp_path):
    pytest.importorskip("transformers")
    name = hf_cases.write_clip(tmp_path, "roberta")
    deferred = DeferredInit(smallest=64)
    torch.manual_seed(0)
    with deferred.offered():
        model = open_clip.create_model(name, pretrained_text=False, precision="pure_bf16")
    torch.manual_seed(0)
    expected = open_clip.create_model(name, pretrained_text=False, precision="pure_bf16")
    assert not any(p.is_meta for p in expected.parameters())
    for (key, p), value in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(deferred.compute(p) if p.is_meta else p, value), key


def test_a_checkpoint_is_read_and_not_deferred(tmp_path):
    name = tiny_clip.folder(tmp_path / "model")
    expected = open_clip.create_model(name)
    torch.save(expected.state_dict(), tmp_path / "weights.pt")
    with DeferredInit(smallest=1).offered():
        model = open_clip.create_model(name, str(tmp_path / "weights.pt"))
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_tensor_that_was_not_recorded_is_an_error():
    with pytest.raises(RuntimeError, match="its creation was not recorded"):
        DeferredInit().compute(torch.empty(3, device="meta"))
