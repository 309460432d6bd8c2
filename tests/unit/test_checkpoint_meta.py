"""Models built on the meta device: initialization is skipped, and they take the tensors of a checkpoint."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

import tiny_clip
from checkpoint_cases import (
    assert_same_weights,
    clip,
    digest,
    meta_clip,
)
from open_clip.checkpoint import fit
from open_clip.checkpoint.fit import load_checkpoint, put_weights
from open_clip.checkpoint.meta import NoInitialization, check_nothing_on_meta
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.precision import set_precision


@pytest.mark.parametrize("model_class", [CLIP, CustomTextCLIP])
def test_a_meta_model_takes_the_tensors_of_the_file(tmp_path, model_class):
    source = clip(1, init_logit_bias=-3.0)
    torch.save(source.state_dict(), tmp_path / "file.pt")
    model = meta_clip(model_class, init_logit_bias=-10.0)
    assert all(value.is_meta for value in model.state_dict().values())
    assert load_checkpoint(model, tmp_path / "file.pt") == ([], [])
    check_nothing_on_meta(model, "file.pt")
    assert all(parameter.requires_grad for parameter in model.parameters())
    images, texts = tiny_clip.inputs()
    for a, b in zip(model(images, texts), source(images, texts), strict=True):
        assert torch.equal(a, b)


def test_training_a_loaded_model_does_not_change_the_file(tmp_path):
    path = tmp_path / "file.pt"
    torch.save(clip(1).state_dict(), path)
    before = digest(path)
    model = meta_clip()
    load_checkpoint(model, path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, texts = tiny_clip.inputs()
    image_features, text_features, scale = model(images, texts)
    (image_features.sum(0) @ text_features.sum(0) * scale).backward()
    optimizer.step()
    assert not torch.equal(model.visual.proj, clip(1).visual.proj)
    assert digest(path) == before


def test_frozen_parameters_stay_frozen(tmp_path):
    torch.save(clip(1, vision={"pos_embed_type": "sin_cos_2d"}).state_dict(), tmp_path / "file.pt")
    model = meta_clip(vision={"pos_embed_type": "sin_cos_2d"})
    model.visual.requires_grad_(False)
    load_checkpoint(model, tmp_path / "file.pt")
    assert not any(parameter.requires_grad for parameter in model.visual.parameters())
    assert model.text_projection.requires_grad


def test_a_missing_bias_is_filled_on_a_meta_model():
    model = meta_clip(init_logit_bias=-10.0)
    put_weights(model, clip(1).state_dict())
    assert model.logit_bias.item() == 0
    assert isinstance(model.logit_bias, nn.Parameter)


def test_parameters_left_on_meta_raise():
    weights = clip(1).state_dict()
    del weights["ln_final.bias"]
    with pytest.raises(RuntimeError, match=r"the state dict has no ln_final.bias"):
        put_weights(meta_clip(), weights, strict=False)


def test_dtypes_are_those_of_the_model():
    """The dtypes of the file do not matter, and float32 parameters of the model stay float32."""
    half = {key: value.half() for key, value in clip(1).state_dict().items()}
    model = meta_clip()
    put_weights(model, half)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model = meta_clip()
    set_precision(model, "bf16")
    put_weights(model, clip(1).state_dict())
    assert model.visual.proj.dtype == torch.bfloat16
    assert model.visual.ln_post.weight.dtype == torch.float32
    reference = clip(1)
    set_precision(reference, "bf16")
    assert_same_weights(model, reference)


@pytest.mark.parametrize("precision", ["pure_fp16", "pure_bf16"])
def test_casting_does_not_duplicate_all_tensors(tmp_path, precision, monkeypatch):
    torch.save(clip().state_dict(), tmp_path / "file.pt")
    model = meta_clip()
    set_precision(model, precision)
    alive = []
    to = torch.Tensor.to

    def counted(self, *args, **kwargs):
        alive.append(sum(reference() is not None for reference in read))
        return to(self, *args, **kwargs)

    read = []
    load = fit.read_state_dict

    def remembered(*args):
        found = load(*args)
        read.extend(weakref.ref(value) for value in found.values())
        return found

    monkeypatch.setattr(fit, "read_state_dict", remembered)
    monkeypatch.setattr(torch.Tensor, "to", counted)
    load_checkpoint(model, tmp_path / "file.pt")
    assert alive[-1] < alive[0] / 2


def test_tied_parameters_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.first, self.second = nn.Identity(), nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

    torch.save(Tied().state_dict(), tmp_path / "file.pt")
    with torch.device("meta"):
        model = Tied()
    load_checkpoint(model, tmp_path / "file.pt")
    assert model.second.weight is model.first.weight


def test_initialization_is_skipped_for_meta_tensors_and_not_for_real_ones():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    with NoInitialization(), torch.device("meta"):
        nn.Embedding(4, 4)
        scaled = 0.5 * torch.randn(4)
    assert scaled.is_meta
    assert scaled.shape == (4,)
    assert torch.equal(torch.randn(3), expected), "the generator moved"
    with NoInitialization():
        assert torch.equal(torch.ones(2).mul_(3) * 2, torch.full((2,), 6.0))
        assert torch.equal(nn.init.constant_(torch.empty(2), 5.0), torch.full((2,), 5.0))


class Computing(nn.Module):
    """A tower whose `__init__` computes with values of tensors, in all ways that skipping operators could change."""

    def __init__(self, is_table_stored: bool = True) -> None:
        super().__init__()
        self.visual = nn.Identity()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3, device="cpu") * 0.5]
        self.weight = nn.Parameter(torch.randn(3))
        self.scaled = nn.Parameter(self.weight * 2.0)
        self.complex = nn.Parameter(torch.randn(3) * 1j)
        self.positions = nn.Parameter(torch.arange(3) * 0.5)
        self.register_buffer("table", torch.linspace(0, 1, 3) * 2.0, persistent=is_table_stored)


def test_a_tower_that_computes_with_values_is_the_same_when_it_is_built_on_the_meta_device():
    expected = Computing()
    with NoInitialization(), torch.device("meta"):
        model = Computing()
    assert model.rates == expected.rates == [0.0, 0.25, 0.5]
    assert model.scaled is not model.weight
    assert all(value.is_meta for value in model.state_dict().values())
    assert [value.dtype for value in model.state_dict().values()] == [
        value.dtype for value in expected.state_dict().values()
    ]
    put_weights(model, expected.state_dict())
    assert_same_weights(model, expected)
    assert model.scaled.data_ptr() != model.weight.data_ptr()


def test_values_that_no_file_has_raise_instead_of_being_changed():
    with NoInitialization(), torch.device("meta"):
        model = Computing(is_table_stored=False)
    with pytest.raises(RuntimeError, match="the state dict has no table, which the model needs"):
        put_weights(model, Computing(is_table_stored=False).state_dict())
    with NoInitialization(), torch.device("meta"), pytest.raises(RuntimeError, match="meta"):
        (torch.ones(3) * 2.0).tolist()
