"""Tests of training.flops: the FLOPs of a training step against sums computed by hand."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import open_clip
import tiny_clip
from open_clip import device as devices
from training import flops
from training.precision import create

CPU = torch.device("cpu")
PATCHES, WIDTH = 16, 32  # of tiny_clip: 32 / 8 squared
PATCH_EMBEDDING = 2 * 3 * 8 * 8 * WIDTH * PATCHES


@pytest.fixture
def model(tmp_path):
    return open_clip.create_model(tiny_clip.folder(tmp_path / "model"), output_dict=True).train()


def forward(model: nn.Module) -> float:
    image_size, text_size = flops.input_sizes(model)
    return flops.profile_torch(model, text_size, image_size)


def test_training_is_three_forward_passes_less_the_gradient_of_the_images(model):
    assert PATCH_EMBEDDING > 0
    assert flops.training_flops(model) == 3 * forward(model) - PATCH_EMBEDDING


def test_a_locked_tower_counts_its_forward_pass_only(model):
    image_size, _ = flops.input_sizes(model)
    image = flops.profile_torch_image(model, image_size)
    model.lock_image_tower()
    assert flops.training_flops(model) == image + 3 * (forward(model) - image)


def test_repeated_computation_counts_once(model):
    expected = flops.training_flops(model)
    model.set_grad_checkpointing()
    assert flops.training_flops(model) == expected
    assert model.visual.transformer.grad_checkpointing, "it is switched on again"


def test_dropped_patches_do_not_count(tmp_path):
    dropping = open_clip.create_model(tiny_clip.folder(tmp_path / "m", vision={"patch_dropout": 0.5}), output_dict=True)
    assert flops.training_flops(dropping.train()) < flops.training_flops(dropping.eval())


def test_a_teacher_s_forward_pass_is_added(model, tmp_path):
    teacher = open_clip.create_model(tiny_clip.folder(tmp_path / "teacher"), output_dict=True).eval()
    assert flops.training_flops(model, teacher) == flops.training_flops(model) + forward(teacher)


def test_counting_does_not_change_the_model_or_the_generators(model):
    state, before = torch.get_rng_state(), {name: p.clone() for name, p in model.named_parameters()}
    flops.training_flops(model)
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in model.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])


@pytest.mark.parametrize(
    ("precision", "fp32_matmul", "asked"),
    [("amp_bf16", "high", torch.bfloat16), ("fp32", "highest", torch.float32), ("fp32", "high", None)],
)
def test_pairs_at_the_peak_of_the_dtype_of_the_matrix_products(model, monkeypatch, precision, fp32_matmul, asked):
    seen = []
    monkeypatch.setattr(devices.CpuDevice, "peak_flops", lambda self, dtype, index: seen.append(dtype) or 1e12)
    found = flops.pairs_at_peak(model, None, create(precision, CPU), fp32_matmul)
    if asked is None:
        assert (found, seen) == (None, []), "the table has no peak of TF32 and HF32"
    else:
        assert (found, seen) == (1e12 / flops.training_flops(model), [asked])


def test_nothing_is_counted_if_the_peak_is_unknown(model, monkeypatch):
    monkeypatch.setattr(flops, "training_flops", lambda *_: pytest.fail("counted"))
    assert flops.pairs_at_peak(model, None, create("amp_bf16", CPU), "high") is None


def test_a_model_that_cannot_be_counted_trains_without_mfu(model, monkeypatch, caplog):
    monkeypatch.setattr(devices.CpuDevice, "peak_flops", lambda self, dtype, index: 1e12)
    monkeypatch.setattr(type(model), "forward", lambda self, image, text: {"image_features": image.sum().item()})
    with caplog.at_level(logging.INFO):
        assert flops.pairs_at_peak(model, None, create("amp_bf16", CPU), "high") is None
    assert "no MFU" in caplog.text
