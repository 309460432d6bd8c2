"""The first Ascend 910 and 310: private formats, saturation mode, no bf16, no fused attention; training in `amp`."""

from __future__ import annotations

import json

import pytest
from emulated import run_ranks, run_script
from npu_training import CPU, make_trainer, train

CHIPS = ["Ascend910A", "Ascend310P3"]

PLAIN = """
    import open_clip.device, torch, torch_npu
    print(torch.npu.utils.is_support_inf_nan(), torch.npu.is_bf16_supported())

    def flag():
        return bool(torch_npu.npu_get_float_status(torch.zeros(8, device="npu"))[0] != 0)

    x = torch.tensor([12.0, -2.0], dtype=torch.float16, device="npu")
    # The example on CANN's page of INF_NAN_MODE_ENABLE.
    print(flag(), torch.exp(x)[0].item(), flag(), (x / 0 - x / 0)[0].item())
    torch_npu.npu_clear_float_status(torch.zeros(8, device="npu"))
    masked = torch.zeros_like(x).masked_fill_(torch.tensor([True, False]).npu(), -torch.inf)
    print(flag(), (masked + 1).tolist(), flag(), (x.float() * 1e38 * 1e38)[0].item())
    print((x.float() * 1e6).half().tolist(), flag())

    weight = torch.randn(20, 40).npu()
    private = torch_npu.npu_format_cast(weight, 29)
    print(torch_npu.get_npu_format(private) != torch_npu.get_npu_format(weight), torch.equal(private, weight))
    print(torch.allclose(private.t() @ private, weight.t() @ weight), torch.equal(private.cpu(), weight.cpu()))
    try:
        torch_npu.npu_fusion_attention(*[torch.zeros(1, 2, 4, 8, device="npu")] * 3, 2, "BNSD")
    except RuntimeError as error:
        print("EZ1001" in str(error))
"""


@pytest.mark.parametrize("chip", [*CHIPS, "Ascend910B1"])
def test_arithmetic_saturates_and_sets_the_flag(chip: str) -> None:
    lines = run_script(PLAIN, chip=chip)
    if chip == "Ascend910B1":
        assert lines[:4] == ["True True", "False inf False nan", "False [-inf, 1.0] False inf", "[inf, -inf] False"]
        assert lines[4:] == ["True True", "True True"]
    else:
        assert lines[:2] == ["False False", "False 65504.0 True 0.0"]
        assert lines[2:4] == ["False [-65504.0, 1.0] False inf", "[65504.0, -65504.0] True"]
        assert lines[4:] == ["True True", "True True", "True"]


TRAINED = """
    import json
    import open_clip, torch
    from npu_training import *

    losses = train(make_trainer(NPU, "amp", init_scale=256.0), 12)
    trainer = make_trainer(NPU, "amp", init_scale=2.0**40)
    start = [p.detach().cpu().clone() for p in trainer.model.parameters()]

    def moved():
        return any(not torch.equal(p.detach().cpu(), before) for p, before in zip(trainer.model.parameters(), start))

    train(trainer, 1)
    found = [moved(), trainer.scaler.get_scale() / 2.0**40]
    train(trainer, 30)
    print(json.dumps([losses, *found, moved(), trainer.scaler.get_scale() < 2.0**30]))
"""


@pytest.mark.parametrize("chip", CHIPS)
def test_amp_trains_and_an_overflow_is_skipped(chip: str) -> None:
    """With the default precision, losses are near the CPU's. The scaler detects overflows by the status flag only."""
    losses, moved, factor, moved_later, scale_came_down = json.loads(run_script(TRAINED, chip=chip)[-1])
    assert losses == pytest.approx(train(make_trainer(CPU), 12), abs=2e-2)
    assert not moved
    assert factor == 0.5
    assert moved_later
    assert scale_came_down


FORWARD = """
    import open_clip.device, torch
    weight = torch.nn.Parameter(torch.ones(4, device="npu"))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.npu.amp.GradScaler(init_scale=4.0)
    for place in ("forward", "backward"):
        optimizer.zero_grad()
        loss = (weight * (1e6 if place == "forward" else 1)).half().float().sum() * 1e-6
        scaler.scale(loss).backward()
        if place == "backward":
            torch.exp(torch.full((2,), 12.0, dtype=torch.float16, device="npu"))
        scaler.step(optimizer)
        scaler.update()
        print(place, scaler.get_scale())
"""


def test_the_scaler_sees_overflows_of_the_backward_pass_only() -> None:
    """torch_npu/npu/amp/grad_scaler.py clears the status flag when the loss is scaled."""
    printed = [line for line in run_script(FORWARD, chip="Ascend910A") if line.startswith(("forward", "backward"))]
    assert printed == ["forward 4.0", "backward 2.0"]


TWO_RANKS = """
    import json
    import open_clip, torch
    from npu_training import *
    from training import ranks
    from training.params import DistributedConfig

    world = ranks.init(DistributedConfig())
    torch.npu.set_compile_mode(jit_compile=False)  # in compile mode hccl uses operators that the emulator does not have
    trainer = make_trainer(world.device, "amp", linked=True, init_scale=256.0)
    overflowing = torch.full((2,), 12.0, dtype=torch.float16, device=world.device)
    if world.rank == 1:
        parameter = next(trainer.model.parameters())

        def overflow(gradient):
            if step == 1:
                torch.exp(overflowing)

        parameter.register_hook(overflow)

    def sums():
        return [float(p.detach().double().cpu().abs().sum()) for p in trainer.model.parameters()]

    found = []
    for step in range(3):
        batch = move(make_batch(step, world.rank, world.world_size), world.device)
        trainer.step([batch], step)
        found.append(sums())
    ranks.leave()
    print(json.dumps([found, trainer.scaler.get_scale()]))
"""


def test_an_overflow_on_one_rank_is_skipped_by_both() -> None:
    """torch_npu's scaler sums the flags of all ranks on chips whose gradients do not show infinities."""
    ranks = [json.loads(lines[-1]) for lines in run_ranks(TWO_RANKS, 2, chip="Ascend910A")]
    for (first, second, third), scale in ranks:
        assert second == first
        assert third != second
        assert scale == 128.0
    assert ranks[0] == ranks[1]


def test_the_device_reports_saturation_and_that_a_310_is_not_for_training() -> None:
    script = """
        import open_clip.device as device
        npu = device.get("npu")
        print(npu.saturates, [problem for problem in npu.problems() if "inference" in problem])
    """
    assert run_script(script, chip="Ascend910A")[-1] == "True []"
    assert run_script(script, chip="Ascend910B1")[-1] == "False []"
    saturates, problem = run_script(script, chip="Ascend310P3")[-1].split(" ", 1)
    assert saturates == "True"
    assert "Ascend310P3 is an inference chip" in problem
