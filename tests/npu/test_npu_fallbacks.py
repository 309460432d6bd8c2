"""Fused operators that the chip lacks or computes wrongly: they are tested once, replaced, and logged once."""

from __future__ import annotations

import json

import pytest
from emulated import run_script

from open_clip.device import npu_ops

TRAINED = """
    import json, logging
    messages = []
    class Recorded(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())
    logging.getLogger().addHandler(Recorded())

    import open_clip, torch
    from npu_training import *

    trainer = make_trainer(NPU, CHOSEN, model=make_model(quick_gelu=QUICK))
    batches = [move(make_batch(step), NPU) for step in range(3)]
    with Calls() as first:
        losses = [trainer.step([batches[0]], 0)["loss"].item()]
    with Calls() as calls:
        found = [trainer.step([batch], step)["loss"] for step, batch in enumerate(batches[1:], 1)]
    losses += [loss.item() for loss in found]
    print(json.dumps([losses, calls.counts, calls.waits, [m for m in messages if "does not work" in m]]))
"""


def train_broken(broken: str, quick: bool, chosen: str = "fp32", **settings: object) -> list:
    script = TRAINED.replace("QUICK", str(quick)).replace("CHOSEN", repr(chosen))
    return json.loads(run_script(script, broken_ops=broken, **settings)[-1])


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("broken", ["", "error", "wrong", "backward:error", "backward:wrong"])
def test_a_broken_activation_is_replaced_and_logged_once(broken: str, quick: bool) -> None:
    from npu_training import CPU, make_model, make_trainer, train

    name = "npu_fast_gelu" if quick else "npu_gelu"
    setting = "" if not broken else f"{name}_{broken}" if "backward" in broken else f"{name}:{broken}"
    losses, counts, waits, messages = train_broken(setting, quick)
    assert losses == pytest.approx(train(make_trainer(CPU, model=make_model(quick_gelu=quick)), 3), abs=5e-5)
    assert waits == 0, "later steps do not wait for the test of the operator"
    assert (f"npu::{name}" in counts) == (not broken)
    assert "aten::gelu" not in counts, "F.gelu is the tanh form on an NPU"
    assert len(messages) == bool(broken)
    if broken:
        assert f"{name} does not work on Ascend910B1 in float32: " in messages[0]
        part = "gradient" if "backward" in broken else "output"
        assert (f"its {part} differs" if "wrong" in broken else "EZ1001") in messages[0]


def test_each_dtype_is_tested_when_it_is_used() -> None:
    _, counts, _, messages = train_broken("npu_gelu:error", quick=False, chosen="amp_bf16", chip="Ascend910B4")
    assert "npu::npu_gelu" not in counts
    assert len(messages) == 1
    assert "npu_gelu does not work on Ascend910B4 in bfloat16" in messages[0]


NESTED = """
    import open_clip.device as device, torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names = []
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    x = torch.linspace(-2, 2, 8, device="npu")
    with torch.inference_mode(), torch.autocast("npu", dtype=torch.bfloat16), Seen():
        device.quick_gelu(x)
    print(Seen.names)
    compiled = torch.compile(lambda x: device.gelu(x) + device.quick_gelu(x), backend="aot_eager", fullgraph=True)
    print(torch.allclose(compiled(x), torch.nn.functional.gelu(x.cpu()).npu() + device.quick_gelu(x), atol=1e-5))
    print(torch.allclose(torch.func.vmap(device.gelu)(x[:, None])[:, 0], device.gelu(x)))
"""


@pytest.mark.parametrize("broken", ["", "npu_gelu:error,npu_fast_gelu:error"])
def test_an_operator_is_tested_outside_of_the_callers_modes_and_compilation(broken: str) -> None:
    """The first use may be in any mode. torch.compile(fullgraph=True) keeps one graph."""
    names, *answers = run_script(NESTED, broken_ops=broken)[-3:]
    elementary = "['aten::mul.Tensor', 'aten::sigmoid', 'aten::mul.Tensor']"
    assert names == (elementary if broken else "['npu::npu_fast_gelu']")
    assert answers == ["True", "True"]


DOCTOR = """
    from training import doctor
    report = doctor.examine()
    print(*[f"{name}: {failure}" for name, failure in report.fused_ops.items()], sep="\\n")
    print([line.strip() for line in doctor.render(report).splitlines() if line.strip().startswith("npu_")])
"""


def test_the_doctor_reports_which_fused_operators_work() -> None:
    *lines, rendered = run_script(DOCTOR, broken_ops="npu_gelu:wrong")
    found = dict(line.split(": ", 1) for line in lines[-len(npu_ops.FUSED_OPS) :])
    assert set(found) == set(npu_ops.FUSED_OPS)
    assert found.pop("npu_gelu") == "its output differs from the formula by 1"
    assert set(found.values()) == {"None"}
    assert "works" in rendered
    assert "differs from the formula" in rendered
