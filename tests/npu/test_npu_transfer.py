"""torch_npu's transfer_to_npu, which replaces torch.cuda by torch.npu: "cuda" and "nccl" in scripts mean the NPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from emulated import ROOT, run_script

import processes
import train_runs

BEFORE = "from torch_npu.contrib import transfer_to_npu\nfrom open_clip import device as devices"
AFTER = "from open_clip import device as devices\nfrom torch_npu.contrib import transfer_to_npu"
SWITCHED_ON = "from open_clip import device as devices"  # with TORCH_TRANSFER_TO_NPU=1

RESOLVED = """
import torch
cuda = devices.DEVICES["cuda"]
print(devices.best(), devices.resolve("cuda"), devices.resolve("cuda:1"), devices.resolve("cuda", local_rank=1))
print(devices.as_asked("cuda"), devices.as_asked("cuda:1"), devices.as_asked(torch.device("cuda")))
print(devices.get("cuda"), cuda.is_available(), cuda.count(), devices.resolve_backend("cpu:gloo,cuda:nccl"))
scaler = devices.get("cuda").grad_scaler()
print(isinstance(scaler, torch.npu.amp.GradScaler), devices.DEVICES["npu"].notes() != [])
"""
EXPECTED = [
    "npu npu:0 npu:1 npu:1",
    "npu npu:1 npu",
    "<device npu> False 0 cpu:gloo,npu:hccl",
    "True True",
]


@pytest.mark.parametrize("imports", [BEFORE, AFTER, SWITCHED_ON], ids=["before", "after", "by variable"])
def test_cuda_is_the_npu(imports: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if imports is SWITCHED_ON:
        monkeypatch.setenv("TORCH_TRANSFER_TO_NPU", "1")
    assert run_script(imports + RESOLVED, devices=2)[-4:] == EXPECTED


def test_without_transfer_to_npu_cuda_is_missing() -> None:
    script = "from open_clip import device\nprint(device.get('cuda'), device.DEVICES['npu'].notes())"
    assert run_script(script)[-1] == "<device cuda> []"


def test_a_model_for_cuda_is_on_the_npu() -> None:
    script = """
        import open_clip, torch
        from torch_npu.contrib import transfer_to_npu
        import tiny_clip
        from open_clip.factory import create_model
        model = open_clip.CLIP(**tiny_clip.config()).to("cuda:0")
        image, text = torch.ones(1, 3, 32, 32, device="cuda"), torch.ones(1, 12, dtype=torch.long).cuda()
        with torch.no_grad(), torch.cuda.amp.autocast():
            print(model.encode_image(image).device, model.encode_text(text).device)
    """
    assert run_script(script)[-1] == "npu:0 npu:0"


def run(place: Path, *command: object, devices: int) -> str:
    path = f"{ROOT / 'tests/npu/shim'}:{ROOT / 'src'}"
    variables = {"PYTHONPATH": path, "CANN_EMULATOR_DEVICES": str(devices), "TORCH_TRANSFER_TO_NPU": "1"}
    return processes.run([sys.executable, *command], place, **variables)


def test_torchrun_with_the_options_of_a_script_for_gpus(tmp_path: Path) -> None:
    model = train_runs.write_model(tmp_path / "model")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "training.main"]
    data = ["--dataset-type", "synthetic", "--train-num-samples", 8, "--batch-size", 2, "--epochs", 1, "--workers", 0]
    options = ["--model", model, "--device", "cuda", "--dist-backend", "nccl", "--output-dir", "out", "--name", "run"]
    printed = run(tmp_path, *torchrun, *options, *data, devices=2)
    assert "Rank 1 of 2 on npu:1 (hccl)" in printed
    log = (tmp_path / "out/run/out.log").read_text()
    assert log.count("transfer_to_npu is on") == 1
    assert "dist_backend: hccl\n" in (tmp_path / "out/run/params.txt").read_text()


def test_the_doctor_lists_no_cuda_device(tmp_path: Path) -> None:
    printed = run(tmp_path, "-m", "training.doctor", "--json", devices=1)
    found = json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])
    assert [device["device"] for device in found["devices"]] == ["npu:0", "cpu"]
    assert "transfer_to_npu" in found["missing_devices"]["cuda"]
    assert found["backends"] == ["hccl", "gloo"]
    assert found["environment"]["TORCH_TRANSFER_TO_NPU"] == "1"
