"""Tests of training.flat_tensors: views of one buffer."""

from __future__ import annotations

import torch

from training.flat_tensors import FlatTensors, flatten_parameters


def test_parameters_keep_values_shapes_and_identity():
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (), (200,))]
    before = [p.detach().clone() for p in parameters]
    flat = flatten_parameters(parameters)
    assert all(torch.equal(p, value) for p, value in zip(parameters, before, strict=True))
    flat.buffer.mul_(2)
    assert all(torch.equal(p, 2 * value) for p, value in zip(parameters, before, strict=True))
    assert all(p.is_leaf and p.requires_grad for p in parameters)


def test_fill_casts_and_writes_zeros_for_none():
    like = [torch.ones(3), torch.ones(2, 2)]
    flat = FlatTensors(like, dtype=torch.bfloat16)
    flat.fill([torch.full((3,), 1.5), torch.ones(2, 2)])
    assert flat.buffer.dtype == torch.bfloat16
    assert flat.views[0].tolist() == [1.5] * 3
    flat.fill([None, torch.full((2, 2), 4.0)])
    assert flat.views[0].tolist() == [0.0] * 3
    assert flat.buffer.sum() == 16
