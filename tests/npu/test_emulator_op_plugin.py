"""The emulator does what op-plugin's kernels do, where these differ from torch's: see the table in README.md."""
from __future__ import annotations

import pytest
import torch
from npu_training import NPU


def step_with_found_inf(optimizer: type[torch.optim.Optimizer], gradient: float, **options: object) -> torch.Tensor:
    """A weight of 1 after a step with `found_inf` set, as a gradient scaler or the guard sets it."""
    weight = torch.nn.Parameter(torch.ones(4, device=NPU))
    built = optimizer([weight], **{"lr": 0.1, "fused": True, **options})
    weight.grad = torch.full_like(weight, gradient)
    built.found_inf = torch.ones((), device=NPU)
    built.grad_scale = torch.full((), 1024.0, device=NPU)
    built.step()
    return weight.detach().cpu()


def test_fused_adamw_ignores_found_inf() -> None:
    assert not step_with_found_inf(torch.optim.AdamW, float("nan")).isfinite().any()
    moved = step_with_found_inf(torch.optim.AdamW, 1.0)
    assert torch.equal(moved, step_with_found_inf(torch.optim.AdamW, 1.0))
    assert (moved < 0.95).all(), "the step is made"


def test_fused_adamw_ignores_grad_scale() -> None:
    """Adam's step does not depend on a gradient's scale, its moments do."""
    weight = torch.nn.Parameter(torch.ones(4, device=NPU))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.full_like(weight, 1024.0)
    optimizer.grad_scale = torch.full((), 1024.0, device=NPU)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([102.4] * 4)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.Adam, {}), (torch.optim.AdamW, {"lr": torch.tensor(0.1)}), (torch.optim.SGD, {})],
)
def test_the_other_fused_optimizers_look_at_found_inf(optimizer: type, options: dict) -> None:
    assert step_with_found_inf(optimizer, float("nan"), **options).tolist() == [1.0] * 4
