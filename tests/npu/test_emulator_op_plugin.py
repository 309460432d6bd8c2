"""The emulator computes what op-plugin's kernels compute where they differ from torch's. See the table in README.md."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from emulated import run_script
from npu_training import NPU, Calls


def step_with_found_inf(optimizer: type[torch.optim.Optimizer], gradient: float, **options: object) -> torch.Tensor:
    """Return a weight that was 1 before a step with `found_inf` set, as a gradient scaler or the guard sets it."""
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
    """The moments show it: Adam's step itself does not depend on the scale of the gradient."""
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
def test_other_fused_optimizers_obey_found_inf(optimizer: type, options: dict) -> None:
    assert step_with_found_inf(optimizer, float("nan"), **options).tolist() == [1.0] * 4


def test_gelu_is_always_the_tanh_form() -> None:
    x = torch.linspace(-4, 4, 64, requires_grad=True)
    there = x.detach().to(NPU).requires_grad_()
    for approximate in ("none", "tanh"):
        F.gelu(there, approximate=approximate).sum().backward()
        F.gelu(x, approximate="tanh").sum().backward()
        torch.testing.assert_close(F.gelu(there, approximate=approximate).cpu(), F.gelu(x, approximate="tanh"))
        torch.testing.assert_close(there.grad.cpu(), x.grad)
    assert (F.gelu(there).cpu() - F.gelu(x)).abs().max() > 1e-4


def test_norms_have_one_dimension() -> None:
    tensors = [torch.full((2, 2), 3.0, device=NPU), torch.ones(3, device=NPU)]
    assert [norm.shape for norm in torch._foreach_norm(tensors)] == [(1,), (1,)]
    assert torch.nn.utils.get_total_norm(tensors).item() == pytest.approx(39**0.5)
    script = """
        import open_clip.device, torch
        print([tuple(norm.shape) for norm in torch._foreach_norm([torch.ones(3, device="npu")])])
    """
    assert run_script(script, chip="Ascend910_9391") == ["[()]"]


def queries(*, needs_grad: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, 5, 8, generator=generator).to(NPU).requires_grad_(needs_grad) for _ in range(3)]


def test_attention_is_the_fused_operator() -> None:
    query, key, value = queries()
    mask = torch.ones(5, 5, dtype=torch.bool, device=NPU).tril()
    with Calls() as calls:
        outputs = [
            F.scaled_dot_product_attention(query, key, value),
            F.scaled_dot_product_attention(query, key, value, is_causal=True),
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask),
        ]
        sum(output.sum() for output in outputs).backward()
    assert calls.counts["npu::npu_fusion_attention_v3"] == calls.counts["npu::npu_fusion_attention_grad_v3"] == 3
    assert not calls.counts["aten::bmm"]
    torch.testing.assert_close(outputs[1], outputs[2])


def test_rows_without_keys() -> None:
    """scaled_dot_product_attention sets inner_precise 2, which gives zeros as in torch. Otherwise it is a mean."""
    query, key, value = queries()
    mask = torch.ones(5, 5, dtype=torch.bool, device=NPU)
    mask[2] = False
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert not output[:, :, 2].any()
    direct = torch_npu.npu_fusion_attention(query, key, value, 2, "BNSD", scale=8**-0.5, atten_mask=~mask)[0]
    torch.testing.assert_close(direct[:, :, 2], value.mean(2))
    torch.testing.assert_close(direct[:, :, :2], output[:, :, :2])
    found = torch.autograd.grad(direct[:, :, 2].sum(), (query, key, value))
    assert [gradient.abs().max().item() for gradient in found] == pytest.approx([0, 0, 0.2])
    found = torch.autograd.grad(output[:, :, 2].sum(), (query, key, value))
    assert not any(gradient.any() for gradient in found)


def test_attention_dropout_follows_the_seed_and_is_the_same_in_the_backward_pass() -> None:
    query, key, value = queries()
    value = torch.ones_like(value).requires_grad_()

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        torch.npu.manual_seed(1)
        output = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
        return output.detach(), torch.autograd.grad(output.sum(), value)[0]

    output, gradient = attend()
    again, gradient_again = attend()
    assert torch.equal(output, again)
    assert torch.equal(gradient, gradient_again)
    assert output.std() > 0.1, "weights are dropped"
    torch.testing.assert_close(gradient.sum(), output.sum(), msg="the backward pass drops the same ones")
    assert not torch.equal(output, F.scaled_dot_product_attention(query, key, value, dropout_p=0.5))
