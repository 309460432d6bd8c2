"""A factor of the loss that comes with a batch: it multiplies the gradient, and not the loss that is logged."""

from __future__ import annotations

import copy

import torch

from towers import FP32, Towers, batches_of
from training.batches import LOSS_SCALE
from training.objective import ContrastiveObjective
from training.trainer import Trainer


def test_a_factor_multiplies_the_gradient_and_not_the_logged_loss():
    model = Towers()
    (batch,) = batches_of(1)
    results = []
    for factor in (None, 0.25):
        copied = copy.deepcopy(model)
        trainer = Trainer(copied, ContrastiveObjective(), torch.optim.SGD(copied.parameters(), lr=0.1), FP32)
        losses = trainer.backward([batch if factor is None else {**batch, LOSS_SCALE: factor}])
        results.append((losses["loss"], [parameter.grad for parameter in copied.parameters()]))
    (loss, gradients), (same_loss, smaller) = results
    assert same_loss == loss
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    for gradient, part in zip(gradients, smaller, strict=True):
        torch.testing.assert_close(part, 0.25 * gradient)
