"""The emulated runtime with the real torch_npu: devices, memory, AMP, random numbers, strict and delayed modes."""

from __future__ import annotations

import math

import pytest
import torch
from emulated import run_script

NPU = "npu"


def test_the_device_is_an_npu() -> None:
    assert torch.npu.is_available()
    assert torch.npu.get_device_name(0).startswith("Ascend")
    assert torch.get_device_module(NPU) is torch.npu


def test_several_devices() -> None:
    lines = run_script(
        """
        import open_clip.device, torch
        torch.npu.set_device(2)
        x = torch.ones(2, device="npu")
        print(torch.npu.device_count(), x.device, x.to("npu:1").device, torch.npu.get_device_name(3))
        try:
            x + x.to("npu:1")
        except RuntimeError as error:
            print("refused" if "same device" in str(error) else error)
        """,
        devices=4,
        chip="Ascend910B4",
    )
    assert lines == ["4 npu:2 npu:1 Ascend910B4", "refused"]


def test_copies_do_not_change_the_device_of_a_tensor() -> None:
    here, there = torch.zeros(2), torch.ones(2, device=NPU)
    with torch.inference_mode():  # without autograd's kernel, which would hide a wrong result of copy_
        assert torch.ops.aten.copy_(here, there).device.type == "cpu"
        assert here.tolist() == [1, 1]
        assert torch.ops.aten.copy_(there, 3 * here).device.type == "npu"
        assert there.tolist() == [3, 3]


def test_memory_is_counted_and_freed() -> None:
    torch.npu.empty_cache()
    before = torch.npu.memory_allocated()
    x = torch.empty(1 << 20, device=NPU)
    assert torch.npu.memory_allocated() - before == pytest.approx(4 << 20, rel=0.01)
    del x
    assert torch.npu.memory_allocated() == before


def test_out_of_memory_raises_torchs_exception_and_can_be_handled() -> None:
    lines = run_script(
        """
        from open_clip import device
        import torch
        held = torch.empty(40 << 20, dtype=torch.uint8, device="npu")
        try:
            torch.empty(80 << 20, dtype=torch.uint8, device="npu")
        except torch.OutOfMemoryError as error:
            print("out of memory", device.is_out_of_memory(error))
        del held
        torch.npu.empty_cache()
        print(torch.empty(80 << 20, dtype=torch.uint8, device="npu").numel() >> 20)
        """,
        memory="100M",
    )
    assert lines == ["out of memory True", "80"]


def test_training_equals_the_cpu() -> None:
    """Five AdamW steps of a small network with the same initial weights."""

    def train(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(16, 4))
        inputs, targets = torch.randn(32, 8), torch.randn(32, 4)
        network.to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        for _ in range(5):
            loss = torch.nn.functional.mse_loss(network(inputs.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [parameter.detach().cpu() for parameter in network.parameters()]

    for ours, reference in zip(train(NPU), train("cpu"), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_computes_products_in_the_lower_precision(dtype: torch.dtype) -> None:
    x = torch.randn(4, 4, device=NPU)
    with torch.autocast(NPU, dtype=dtype):
        assert (x @ x).dtype == dtype
        assert torch.nn.functional.layer_norm(x @ x, (4,)).dtype == torch.float32
    with torch.npu.amp.autocast():
        assert (x @ x).dtype == torch.float16


def test_scaler_skips_an_overflow_and_continues() -> None:
    weight = torch.nn.Parameter(torch.ones(4, device=NPU))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.npu.amp.GradScaler(init_scale=4.0)
    steps = []
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append((weight[0].item(), scaler.get_scale()))
    (first, scale0), (second, scale1), (third, scale2) = steps
    assert first == pytest.approx(0.9)
    assert second == first
    assert scale1 == scale0 / 2
    assert third == pytest.approx(0.8)
    assert scale2 == scale1


def test_the_device_has_a_separate_random_state() -> None:
    torch.npu.manual_seed(7)
    host = torch.get_rng_state()
    first = torch.rand(5, device=NPU)
    state = torch.npu.get_rng_state()
    second = torch.rand(5, device=NPU)
    torch.npu.set_rng_state(state)
    assert torch.equal(second, torch.rand(5, device=NPU))
    torch.npu.manual_seed(7)
    assert torch.equal(first, torch.rand(5, device=NPU))
    assert not torch.equal(first, second)
    assert torch.equal(host, torch.get_rng_state())


STRICT = """
import open_clip.device, torch
import torch.nn.functional as F
x = torch.ones(4, 4, device="npu")
q = torch.randn(1, 2, 4, 8, device="npu")
cases = {
    "float64": lambda: x.double() * 2,
    "float64 scalar": lambda: x.sum().double() * 2,
    "complex": lambda: torch.complex(x, x) * 2,
    "copy of float64": lambda: x.double().cpu(),
    "added mask": lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=x),
    "added mask, recorded": lambda: F.scaled_dot_product_attention(q.requires_grad_(), q, q, attn_mask=x),
    "bool mask": lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=x > 0),
    "causal": lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True),
}
for name, case in cases.items():
    try:
        case()
        print(name, "runs")
    except RuntimeError as error:
        print(name, "refused" if "strict" in str(error) else error)
"""


@pytest.mark.parametrize("strict", [True, False])
def test_strict_mode_refuses_what_npus_refuse(strict: bool) -> None:
    answers = dict(line.rsplit(" ", 1) for line in run_script(STRICT, strict=int(strict)))
    refused = {"float64", "complex", "added mask", "added mask, recorded"} if strict else set()
    assert {name for name, answer in answers.items() if answer == "refused"} == refused
    assert {name for name, answer in answers.items() if answer == "runs"} == set(answers) - refused
    assert len(answers) == 8


DELAYED = """
import open_clip.device, torch
x = torch.arange(4.0, device="npu") + 1
early = x.to("cpu", non_blocking=True)
print("to host, read early:", early.tolist() == [1, 2, 3, 4])
torch.npu.synchronize()
print("to host, synchronized:", early.tolist() == [1, 2, 3, 4])

source = torch.ones(4)
there = source.to("npu", non_blocking=True)
source.fill_(5)  # before the copy happens
print("to device, source overwritten early:", there.cpu().tolist() == [1, 1, 1, 1])

source = torch.ones(4)
there = source.to("npu", non_blocking=True)
print("to device, work on the same stream:", (there + 1).cpu().tolist() == [2, 2, 2, 2])
print("blocking:", x.cpu().tolist() == [1, 2, 3, 4])
"""


def test_delayed_copies_reveal_a_host_that_does_not_wait() -> None:
    assert run_script(DELAYED, delay_copies=1) == [
        "to host, read early: False",
        "to host, synchronized: True",
        "to device, source overwritten early: False",
        "to device, work on the same stream: True",
        "blocking: True",
    ]
    assert all(line.endswith("True") for line in run_script(DELAYED))
