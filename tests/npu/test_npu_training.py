"""The Trainer on one NPU: losses equal the CPU's, operators are fused, the host never waits, overflows are skipped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emulated import run_script
from npu_training import (
    CONFIGURATIONS,
    CPU,
    NPU,
    Calls,
    encode,
    make_batch,
    make_model,
    make_trainer,
    move,
    replace_fused_adamw,
    train,
)  # fmt: skip
from torch.utils._python_dispatch import TorchDispatchMode

import half_precision
import open_clip
from open_clip import device as devices
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from training.batches import Normalization, to_device
from training.checkpoint.state import TrainState
from training.ema import WeightAverage
from training.step_guard import StepGuard
from training.trainer import Trainer


@pytest.fixture
def synchronized(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record the explicit synchronizations, by class name."""
    made: list[str] = []
    for owner in (torch.npu, torch.npu.Stream, torch.npu.Event):
        monkeypatch.setattr(owner, "synchronize", lambda *_, owner=owner: made.append(owner.__name__))
    return made


def count(trainer, steps: int = 1) -> Calls:
    """Return the calls of `steps` steps, without those of a first step, which initializes the state."""
    batches = [move(make_batch(step), NPU) for step in range(steps + 1)]
    trainer.step([batches[0]], 0)
    with Calls() as calls:
        for number, batch in enumerate(batches[1:], 1):
            trainer.step([batch], number)
    return calls


def test_losses_of_fifty_steps_equal_the_cpus() -> None:
    ours, reference = train(make_trainer(NPU), 50), train(make_trainer(CPU), 50)
    assert reference[-1] < 0.7 * reference[0], "it learns"
    assert ours == pytest.approx(reference, abs=5e-4)


@pytest.mark.parametrize("form", ["auto", "torch", "npu", "off"])
@pytest.mark.parametrize("chosen", ["fp32", "amp"])
def test_every_form_of_the_optimizer_gives_the_same_losses(form: str, chosen: str) -> None:
    trainer = make_trainer(NPU, chosen, form, init_scale=256.0) if chosen == "amp" else make_trainer(NPU, chosen, form)
    tolerance = 2e-2 if chosen == "amp" else 5e-4
    assert train(trainer, 12) == pytest.approx(train(make_trainer(CPU), 12), abs=tolerance)


@pytest.mark.parametrize("chosen", ["amp", "amp_bf16", "bf16", "fp16", "pure_bf16", "pure_fp16"])
def test_every_precision_trains(chosen: str) -> None:
    """eps is too small for float16, so moments in float16 would cause a division by 0."""
    reference = half_precision.train("fp32", CPU, steps=30)
    losses = half_precision.train(chosen, NPU, steps=30)
    half_precision.assert_learns_alike(losses, reference)


def test_quick_gelu_is_one_fused_operator_per_layer() -> None:
    calls = count(make_trainer(NPU, model=make_model(quick_gelu=True))).counts
    layers = 2  # one per tower
    assert calls["npu::npu_fast_gelu"] == calls["npu::npu_fast_gelu_backward"] == layers
    assert not calls["aten::sigmoid"]


def test_gelu_uses_the_operator_that_obeys_approximate() -> None:
    calls = count(make_trainer(NPU)).counts
    assert calls["npu::npu_gelu"] == calls["npu::npu_gelu_backward"] == 2
    assert not calls["aten::gelu"]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_features_equal_the_cpus(name: str) -> None:
    model = make_model(**CONFIGURATIONS[name])
    reference = encode(model, CPU)
    for ours, theirs in zip(encode(model, NPU), reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("chosen", ["fp32", "amp_bf16"])
def test_a_step_does_not_wait_for_the_device(name: str, chosen: str, synchronized: list[str]) -> None:
    calls = count(make_trainer(NPU, chosen, model=make_model(**CONFIGURATIONS[name])), steps=2)
    assert calls.counts["aten::mm"] + calls.counts["aten::addmm"] > 4, "the counter sees the operators"
    assert calls.waits == 0
    assert synchronized == []


def test_accumulated_batches_do_not_wait_for_the_device(synchronized: list[str]) -> None:
    trainer = make_trainer(NPU, model=make_model(vision={"patch_dropout": 0.5}))
    trainer.accum_freq = 2
    steps = [[move(make_batch(2 * step + part), NPU) for part in range(2)] for step in range(2)]
    trainer.step(steps[0], 0)
    with Calls() as calls:
        trainer.step(steps[1], 1)
    assert calls.waits == 0
    assert synchronized == []


@pytest.mark.parametrize("form", ["auto", "torch", "off"])
@pytest.mark.parametrize("clip", [1.0, math.inf])
def test_the_scaler_waits_only_for_optimizers_that_cannot_skip(form: str, clip: float, synchronized: list[str]) -> None:
    """For these, torch_npu's scaler decides on the host with `found_inf.item()`."""
    trainer = make_trainer(NPU, "amp", form)
    trainer.grad_clip_norm = clip
    waits = count(trainer, steps=4).waits / 4
    assert waits == (0 if form == "auto" else waits_of_the_scaler_alone())
    assert synchronized == []


def test_the_scale_changes_as_in_torch_npus_scaler() -> None:
    """It grows after `growth_interval` good steps and shrinks after an overflow, with both optimizers."""
    factors = {}
    for form in ("auto", "off"):
        trainer = make_trainer(NPU, "amp", form, init_scale=256.0, growth_interval=2)
        batch = move(make_batch(0), NPU)
        overflow = {**batch, "image": batch["image"] * 1e30}
        factors[form] = []
        for number, each in enumerate([batch, batch, batch, overflow, batch, batch, overflow]):
            trainer.step([each], number)
            factors[form].append(trainer.scaler.get_scale())
    assert factors["auto"] == factors["off"] == [256, 512, 512, 256, 256, 512, 256]


def waits_of_the_scaler_alone() -> float:
    weight = torch.nn.Parameter(torch.ones(4, device=NPU))
    optimizer = devices.get(NPU).adamw([weight], "off", lr=0.1)
    scaler = devices.get(NPU).grad_scaler()

    def step() -> None:
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    step()
    with Calls() as calls:
        for _ in range(4):
            step()
    return calls.waits / 4


def test_reading_a_value_is_counted_as_waiting() -> None:
    x = torch.ones(2, device=NPU)
    for wait in (lambda: x.sum().item(), x.cpu, x.tolist, lambda: torch.empty(2).copy_(x), lambda: x[x > 0]):
        with Calls() as calls:
            wait()
        assert calls.waits >= 1
    with Calls() as calls:
        _ = x + 1
    assert calls.waits == 0


def test_an_overflow_is_skipped_and_training_recovers() -> None:
    trainer = make_trainer(NPU, "amp", init_scale=1024.0)
    batch = move(make_batch(0), NPU)
    trainer.step([batch], 0)
    before = {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}
    scale = trainer.scaler.get_scale()

    trainer.step([{**batch, "image": batch["image"] * 1e30}], 1)
    assert all(torch.equal(p.detach().cpu(), before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.scaler.get_scale() == scale / 2

    losses = train(trainer, 20)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert trainer.scaler.get_scale() == scale / 2
    assert any(not torch.equal(p.detach().cpu(), before[name]) for name, p in trainer.model.named_parameters())


def test_a_scale_that_is_too_high_is_lowered() -> None:
    trainer = make_trainer(NPU, "amp", init_scale=2.0**40)
    losses = train(trainer, 40)
    assert trainer.scaler.get_scale() < 2.0**40
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("form", ["auto", "npu"])
@pytest.mark.parametrize(("first", "second"), [(NPU, CPU), (CPU, NPU), (NPU, NPU)])
def test_a_checkpoint_is_resumed_on_another_device(
    first: torch.device, second: torch.device, form: str, tmp_path: Path
) -> None:
    whole = train(make_trainer(CPU), 8)
    forms = {NPU: form, CPU: "auto"}

    def state_of(trainer) -> TrainState:
        return TrainState(trainer.model, trainer.device, name="run", seed=0, parts={"optimizer": trainer.optimizer})

    trainer = make_trainer(first, fused_optimizer=forms[first])
    assert train(trainer, 4) == pytest.approx(whole[:4], abs=1e-4)
    torch.save(state_of(trainer).state_dict(), tmp_path / "epoch_1.pt")

    saved = torch.load(tmp_path / "epoch_1.pt", map_location="cpu", weights_only=True)
    resumed = make_trainer(second, fused_optimizer=forms[second], model=make_model(seed=9))
    state_of(resumed).load_state_dict(saved)
    losses = [resumed.step([move(make_batch(step), second)], step)["loss"].item() for step in range(4, 8)]
    assert losses == pytest.approx(whole[4:], abs=1e-4)


def test_weights_saved_on_npu_load_without_torch_npu(tmp_path: Path) -> None:
    model = make_model().to(NPU)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    script = f"""
        import sys
        sys.modules["torch_npu"] = None  # as if it were not installed
        import os
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        import torch
        found = torch.load({str(tmp_path / "weights.pt")!r}, map_location="cpu", weights_only=True)
        print(len(found), {{value.device.type for value in found.values()}}, hasattr(torch, "npu"))
    """
    assert run_script(script)[-1] == f"{len(model.state_dict())} {{'cpu'}} False"


ONE_STEP_EACH = """
    import open_clip, torch
    from npu_training import *

    def use(name, model):
        trainer = make_trainer(NPU, model=model)
        print(name, train(trainer, 2))
        encode(model, NPU)
    for_each_configuration(use)
    print("amp", train(make_trainer(NPU, "amp"), 2))
    print("bf16", train(make_trainer(NPU, "amp_bf16"), 2))
"""


def test_strict_mode_and_delayed_copies_change_nothing() -> None:
    """Training and encoding use no float64 and no additive attention mask, and read no copy before it is complete."""
    plain = run_script(ONE_STEP_EACH, strict=0)
    assert sum("[" in line for line in plain) == len(CONFIGURATIONS) + 2
    assert run_script(ONE_STEP_EACH, strict=1, delay_copies=1, poison=1) == plain


def guarded(form: str, chosen: str = "fp32") -> Trainer:
    trainer = make_trainer(NPU, chosen, form)
    trainer.guard = StepGuard(trainer.model, trainer.optimizer, NPU)
    trainer.average = WeightAverage(trainer.model, 0.9)
    return trainer


def everything(trainer: Trainer) -> list[torch.Tensor]:
    """Return weights, moments and averages, on the CPU."""
    states = trainer.optimizer.state.values()
    moments = [value for state in states for value in state.values() if torch.is_tensor(value)]
    averages = trainer.average.state_dict().values()
    return [value.detach().cpu().clone() for value in (*trainer.model.parameters(), *moments, *averages)]


@pytest.fixture
def blind_fused_adamw() -> Iterator[None]:
    """Use a `_fused_adamw_` that ignores `found_inf` and `grad_scale`, as op-plugin's does."""
    library = replace_fused_adamw()
    yield
    library._destroy()


@pytest.mark.parametrize("form", ["auto", "torch", "npu", "off"])
@pytest.mark.parametrize("chosen", ["fp32", "amp"])
def test_a_step_that_is_not_finite_changes_nothing(form: str, chosen: str, blind_fused_adamw: None) -> None:
    trainer = guarded(form, chosen)
    batches = [move(make_batch(step), NPU) for step in range(3)]
    trainer.step([batches[0]], 0)
    before = everything(trainer)
    trainer.step([{**batches[1], "image": batches[1]["image"] * float("nan")}], 1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(everything(trainer), before, strict=True))
    assert int(trainer.guard.counters()["skipped_steps"]) == 1
    trainer.step([batches[2]], 2)
    assert all(torch.isfinite(value).all() for value in everything(trainer))
    assert not torch.equal(everything(trainer)[0], before[0])


@pytest.mark.parametrize("chosen", ["fp32", "amp_bf16", "bf16", "amp"])
def test_a_guarded_step_does_not_wait(chosen: str, synchronized: list[str]) -> None:
    model = make_model()
    if chosen == "bf16":
        open_clip.convert_weights_to_lp(model, torch.bfloat16)
    trainer = make_trainer(NPU, chosen, model=model)
    trainer.guard = StepGuard(trainer.model, trainer.optimizer, NPU)
    batches = [move(make_batch(step), NPU) for step in range(4)]
    if chosen == "bf16":
        batches = [{**batch, "image": batch["image"].bfloat16()} for batch in batches]
    trainer.step([batches[0]], 0)
    with Calls() as calls:
        for number, batch in enumerate(batches[1:], 1):
            trainer.step([batch], number)
    assert calls.waits == 0
    assert synchronized == []


@pytest.mark.parametrize("form", ["torch", "off"])
def test_the_guard_waits_for_optimizers_that_cannot_skip(form: str, synchronized: list[str]) -> None:
    assert count(guarded(form), steps=3).waits == 3
    assert synchronized == []


SAVED_WHILE_TRAINING = """
    import threading
    from pathlib import Path
    import open_clip, torch
    from npu_training import *
    from training import file_utils
    from training.checkpoint.state import TrainState
    from training.params import CheckpointConfig
    from training.checkpoint.saver import Saver

    trainer = make_trainer(NPU)
    train(trainer, 2)
    state = TrainState(trainer.model, NPU, parts={"optimizer": trainer.optimizer}, step=2)
    before = {name: value.cpu().clone() for name, value in trainer.model.state_dict().items()}
    go, save = threading.Event(), file_utils.pt_save
    file_utils.pt_save = lambda *args: (go.wait(30), save(*args))
    saver = Saver(CheckpointConfig(save_every_n_steps=2), Path(FOLDER), state, 1)
    saver.after_step()
    for step in range(2, 5):
        trainer.step([move(make_batch(step), NPU)], step)
    go.set()
    saver.finish()
    saved = torch.load(Path(FOLDER) / "epoch_0_step_2.pt", weights_only=True)
    print(all(torch.equal(saved["state_dict"][name], value) for name, value in before.items()))
    moved = not torch.equal(trainer.model.visual.proj.cpu(), before["visual.proj"])
    print(saved["state_dict"]["visual.proj"].device, moved)
"""


def test_a_checkpoint_has_the_weights_of_its_step_with_delayed_copies(tmp_path: Path) -> None:
    script = SAVED_WHILE_TRAINING.replace("FOLDER", repr(str(tmp_path)))
    assert run_script(script, delay_copies=1)[-2:] == ["True", "cpu True"]


class Copies(TorchDispatchMode):
    """Counts the bytes that are copied from the host to the NPU."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        source = args[0] if func is torch.ops.aten._to_copy.default else None
        if source is not None and source.device.type == "cpu" and result.device.type == "npu":
            self.bytes += source.nbytes
        return result


def test_images_are_copied_as_bytes_and_normalized_on_the_npu() -> None:
    normalize = Normalization(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    expected = normalize(levels)
    batch = {"image": levels.contiguous().pin_memory()}
    to_device(batch, NPU, normalization=normalize)  # creates the constants
    with Copies() as copies, Calls() as calls:
        image = to_device(batch, NPU, normalization=normalize)["image"]
    assert copies.bytes == levels.numel()
    assert (calls.waits, sum(calls.counts.values())) == (0, 4)  # the copy, and three launches
    assert torch.equal(image.cpu(), expected)
    half = to_device(batch, NPU, torch.bfloat16, normalization=normalize)["image"]
    assert torch.equal(half.cpu(), expected.bfloat16())
