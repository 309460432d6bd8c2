"""Tests of training.precision: precisions by device."""

from __future__ import annotations

import contextlib

import pytest
import torch

from open_clip import device as devices
from training import precision


def without_bf16(monkeypatch):
    monkeypatch.setattr(devices.CudaDevice, "supports", lambda self, dtype: dtype in (torch.float32, torch.float16))


def test_default_is_the_devices_own():
    assert precision.create(None, "cpu").name == "fp32"
    assert precision.create(None, torch.device("cuda", 1)).name == "amp"
    assert devices.NpuDevice.default_precision == "amp"


def test_asked_for_is_kept():
    assert [precision.create(name, "cpu").name for name in precision.PRECISIONS] == list(precision.PRECISIONS)


def test_a_precision_the_device_lacks_names_those_it_has(monkeypatch):
    without_bf16(monkeypatch)
    for name in ("amp_bf16", "amp_bfloat16", "bf16", "pure_bf16"):
        with pytest.raises(ValueError, match=rf"'{name}' needs torch.bfloat16.*Use one of amp, fp16, pure_fp16, fp32"):
            precision.create(name, "cuda:0")
    assert precision.create("amp", "cuda:0").name == "amp"


@pytest.mark.parametrize("call", [precision.create, precision.get_autocast, precision.dtype_of])
def test_an_unknown_precision_names_the_known(call):
    with pytest.raises(ValueError, match=r"'int8'.*amp_bf16"):
        call("int8", "cpu")


def autocasts_of(name: str) -> list:
    """Return what makes autocast contexts: of a run, and of scripts."""
    return [precision.create(name, "cpu").autocast, precision.get_autocast(name, "cpu")]


def test_amp_on_the_cpu_is_bfloat16_without_a_scaler():
    for autocast in autocasts_of("amp"):
        with autocast():
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert not precision.create("amp", "cpu").grad_scaler().is_enabled()


@pytest.mark.parametrize("name", ["amp_bf16", "amp_bfloat16"])
def test_autocast_contexts_can_be_made_again_and_again(name):
    for autocast in 2 * autocasts_of(name):
        with autocast():
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "pure_fp16", "pure_bf16"])
def test_other_precisions_change_nothing(name):
    for autocast in autocasts_of(name):
        assert isinstance(autocast(), contextlib.nullcontext)
    scaler = precision.create(name, "cpu").grad_scaler()
    assert (scaler.is_enabled(), scaler.state_dict()) == (False, {})


def test_the_scaler_is_the_devices_and_for_amp_alone(monkeypatch):
    monkeypatch.setattr(devices.CudaDevice, "grad_scaler", lambda self, **kwargs: ("scaler", kwargs))
    monkeypatch.setattr(devices.CudaDevice, "supports", lambda self, dtype: True)
    assert precision.create("amp", "cuda:0").grad_scaler(init_scale=2.0) == ("scaler", {"init_scale": 2.0})
    others = [precision.create(name, "cuda").grad_scaler() for name in precision.PRECISIONS[1:]]
    assert [scaler.is_enabled() for scaler in others] == [False] * 7


@pytest.mark.parametrize(
    ("name", "weights", "inputs", "computed"),
    [
        ("amp", torch.float32, None, torch.float16),
        ("amp_bf16", torch.float32, None, torch.bfloat16),
        ("bf16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("pure_fp16", torch.float16, torch.float16, torch.float16),
        ("fp32", torch.float32, None, torch.float32),
    ],
)
def test_dtypes_of_a_precision(monkeypatch, name, weights, inputs, computed):
    monkeypatch.setattr(devices.CudaDevice, "supports", lambda self, dtype: True)
    chosen = precision.create(name, "cuda")
    assert (chosen.weights_dtype, chosen.input_dtype, chosen.compute_dtype) == (weights, inputs, computed)


@pytest.mark.parametrize(("name", "converts"), [("amp", True), ("amp_bf16", True), ("bf16", False), ("fp32", False)])
def test_weights_are_converted_once_with_autocast_if_the_device_benefits(monkeypatch, name, converts):
    assert not precision.create(name, "cpu").converts_weights_once
    monkeypatch.setattr(devices.CpuDevice, "converts_weights_once", True)
    assert precision.create(name, "cpu").converts_weights_once == converts


def test_dtypes():
    assert precision.dtype_of("amp", "cuda") == precision.dtype_of("pure_fp16", "cpu") == torch.float16
    assert precision.dtype_of("amp", "cpu") == precision.dtype_of("amp_bfloat16", "cuda") == torch.bfloat16
    assert precision.dtype_of("fp32", "npu") == torch.float32
