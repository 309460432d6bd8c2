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
    assert precision.resolve(None, "cpu") == "fp32"
    assert precision.resolve(None, torch.device("cuda", 1)) == "amp"
    assert precision.resolve(None, "npu:0") == "amp"


def test_asked_for_is_kept():
    assert [precision.resolve(name, "cpu") for name in precision.PRECISIONS] == list(precision.PRECISIONS)


def test_a_precision_the_device_lacks_names_those_it_has(monkeypatch):
    without_bf16(monkeypatch)
    for name in ("amp_bf16", "amp_bfloat16", "bf16", "pure_bf16"):
        with pytest.raises(ValueError, match=rf"'{name}' needs torch.bfloat16.*Use one of amp, fp16, pure_fp16, fp32"):
            precision.resolve(name, "cuda:0")
    assert precision.resolve("amp", "cuda:0") == "amp"


@pytest.mark.parametrize("call", [precision.resolve, precision.get_autocast, precision.dtype_of])
def test_an_unknown_precision_names_the_known(call):
    with pytest.raises(ValueError, match=r"'int8'.*amp_bf16"):
        call("int8", "cpu")


def test_amp_on_the_cpu_is_bfloat16_without_a_scaler():
    with precision.get_autocast("amp", "cpu")():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert precision.grad_scaler("amp", "cpu") is None


@pytest.mark.parametrize("name", ["amp_bf16", "amp_bfloat16"])
def test_autocast_contexts_can_be_made_again_and_again(name):
    autocast = precision.get_autocast(name, "cpu")
    for _ in range(2):
        with autocast():
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "pure_fp16", "pure_bf16"])
def test_other_precisions_change_nothing(name):
    context = precision.get_autocast(name, "cpu")()
    assert isinstance(context, contextlib.nullcontext)
    assert precision.grad_scaler(name, "cpu") is None


def test_the_scaler_is_the_devices_and_for_amp_alone(monkeypatch):
    monkeypatch.setattr(devices.NpuDevice, "grad_scaler", lambda self, **kwargs: ("scaler", kwargs))
    assert precision.grad_scaler("amp", "npu:0", init_scale=2.0) == ("scaler", {"init_scale": 2.0})
    assert [precision.grad_scaler(name, "npu") for name in precision.PRECISIONS[1:]] == [None] * 7


def test_dtypes():
    assert precision.dtype_of("amp", "cuda") == precision.dtype_of("pure_fp16", "cpu") == torch.float16
    assert precision.dtype_of("amp", "cpu") == precision.dtype_of("amp_bfloat16", "cuda") == torch.bfloat16
    assert precision.dtype_of("fp32", "npu") == torch.float32
