"""`NpuDevice` with the real torch_npu: the choice of the device, its properties, and messages if it is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated import environment, run_script

from open_clip import device as devices
from training import doctor, precision
from training.checkpoint.state import TrainState

NPU = devices.get("npu")


def test_the_npu_is_preferred() -> None:
    assert devices.best().type == "npu"
    assert devices.resolve() == devices.resolve("npu") == torch.device("npu", 0)
    assert NPU.backend == "hccl"
    assert NPU.pin_memory


def test_an_index_selects_a_card_and_an_index_too_high_raises() -> None:
    script = """
        from open_clip import device
        import torch
        from training import ranks
        from training.params import DistributedConfig
        world = ranks.init(DistributedConfig(device="npu:1"))
        print(world.device, torch.ones(1, device="npu").device, device.resolve("auto", local_rank=2))
        try:
            device.resolve("npu:3")
        except RuntimeError as error:
            print(error)
    """
    found, error = run_script(script, devices=3)[-2:]
    assert found == "npu:1 npu:1 npu:2"
    assert "npu:3 does not exist: this host has 3 npu device(s)" in error


CHIP = """
    import open_clip.device as device, torch
    from training import precision
    npu = device.get("npu")
    print(npu.name(0), ",".join(precision.available("npu")), npu.peak_flops(torch.float16, 0) / 1e12)
    try:
        print(precision.create("amp_bf16", "npu").name)
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize(("chip", "has_bf16"), [("Ascend910A", False), ("Ascend910B4", True), ("Ascend910_9391", True)])
def test_precisions_are_those_of_the_chip(chip: str, has_bf16: bool) -> None:
    found, answer = run_script(CHIP, chip=chip)[-2:]
    name, precisions, peak = found.split()
    assert name == chip
    assert ("amp_bf16" in precisions.split(",")) == has_bf16
    assert {"amp", "fp16", "fp32"} <= set(precisions.split(","))
    assert 200 < float(peak) < 400
    assert answer == "amp_bf16" if has_bf16 else "'amp_bf16' needs torch.bfloat16, which npu does not support" in answer


def test_scaler_and_autocast_are_torch_npus() -> None:
    scaler = precision.create("amp", "npu").grad_scaler()
    assert isinstance(scaler, torch.npu.amp.GradScaler)
    assert scaler.is_enabled()
    assert not precision.create("amp_bf16", "npu").grad_scaler().is_enabled()
    x = torch.ones(2, 2, device="npu")
    for chosen, dtype in (("amp", torch.float16), ("amp_bf16", torch.bfloat16), ("fp32", torch.float32)):
        with precision.get_autocast(chosen, "npu")():
            assert (x @ x).dtype == dtype


def test_hf32_is_one_switch_for_products_and_convolutions() -> None:
    before = torch.npu.matmul.allow_hf32, torch.npu.conv.allow_hf32
    try:
        for enabled in (True, False):
            NPU.set_fast_matmul(enabled)
            assert (torch.npu.matmul.allow_hf32, torch.npu.conv.allow_hf32) == (enabled, enabled)
    finally:
        torch.npu.matmul.allow_hf32, torch.npu.conv.allow_hf32 = before


def test_memory_is_the_devices() -> None:
    before = NPU.memory(0)
    held = torch.empty(8 << 20, dtype=torch.uint8, device="npu")
    during = NPU.memory(0)
    assert during["allocated"] - before["allocated"] == pytest.approx(8 << 20, rel=0.01)
    del held
    assert NPU.memory(0)["allocated"] == before["allocated"]
    assert NPU.memory(0)["peak"] >= during["allocated"]
    NPU.reset_peak_memory(0)
    assert NPU.memory(0)["peak"] < during["allocated"]
    assert during["total"] == 64 << 30


def test_a_checkpoint_has_the_npus_random_state(tmp_path: Path) -> None:
    device = torch.device("npu", 0)

    def state() -> TrainState:
        return TrainState(model=torch.nn.Linear(1, 1), device=device, name="run", seed=0)

    NPU.manual_seed(5)
    torch.rand(3, device=device)
    torch.save(state().state_dict(), tmp_path / "epoch_1.pt")
    expected = torch.rand(3, device=device).tolist()
    NPU.manual_seed(6)
    state().load_state_dict(torch.load(tmp_path / "epoch_1.pt", weights_only=True))
    assert torch.rand(3, device=device).tolist() == expected


def test_tensors_are_pinned_for_the_npu() -> None:
    assert torch.ones(2).pin_memory().is_pinned()


def test_the_doctor_finds_the_npu() -> None:
    report = doctor.examine()
    assert report.default_device == "npu:0" or report.default_device == "npu"
    assert report.can_train
    text = doctor.render(report)
    for part in ("Ascend910B1", "hccl", "torch_npu"):
        assert part in text


@pytest.fixture
def broken_torch_npu(tmp_path: Path) -> dict[str, str]:
    """Return an environment whose torch_npu fails to import as it does without CANN."""
    (tmp_path / "torch_npu").mkdir()
    failure = "libhccl.so: cannot open shared object file: No such file or directory"
    (tmp_path / "torch_npu/__init__.py").write_text(f"raise ImportError({failure!r})\n")
    variables = environment()
    return variables | {"PYTHONPATH": f"{tmp_path}:{variables['PYTHONPATH']}"}


def test_open_clip_works_if_torch_npu_fails_without_cann(broken_torch_npu: dict[str, str]) -> None:
    script = "import open_clip; from open_clip import device; print(device.best(), open_clip.list_models()[0] != '')"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=broken_torch_npu, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu", "True"]
    assert done.stderr.count("torch_npu is installed but cannot load") == 1
    assert "set_env.sh" in done.stderr


def test_device_npu_raises_if_torch_npu_cannot_load(broken_torch_npu: dict[str, str]) -> None:
    command = [sys.executable, "-m", "training.main", "--device", "npu", "--dataset-type", "synthetic"]
    done = subprocess.run(command, env=broken_torch_npu, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert "'npu' is not available" in done.stdout + done.stderr
    assert "set_env.sh" in done.stdout + done.stderr
