"""Tests of training.doctor: the report and the exit status."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from open_clip import device as devices
from training import doctor


def test_this_machine_can_train(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert text.rstrip().endswith("Training can run here.")
    for word in (torch.__version__, "cpu", "gloo", "fp32", "torchvision", "default device"):
        assert word in text


def test_labels_are_aligned():
    text = doctor.render(doctor.examine())
    rows = [line for line in text.split("Environment")[0].splitlines() if line.startswith("  ") and "!" not in line]
    width = max(len(name) for name in (*doctor.REQUIRED, *doctor.OPTIONAL))
    assert len(rows) > 10
    assert all(line[2 + width] == line[3 + width] == " " and line[4 + width] != " " for line in rows)


def test_json_has_the_same_content(capsys):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["can_train"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert {"device": "cpu", "name": devices.get("cpu").name(), "memory": devices.get("cpu").memory().get("total")} in (
        found["devices"]
    )
    assert "amp_bf16" in found["precisions"]
    assert found["missing_devices"].keys() | {device["device"].split(":")[0] for device in found["devices"]} == set(
        devices.DEVICES
    )


def test_a_missing_package_is_an_obstacle_and_sets_the_exit_status(monkeypatch, capsys):
    monkeypatch.setitem(doctor.REQUIRED, "no-such-distribution", ("no_such_module", "nothing"))
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "pip install no-such-distribution" in text
    assert text.rstrip().endswith("Training cannot run here.")


def test_a_missing_optional_package_is_not_an_obstacle(monkeypatch):
    monkeypatch.setitem(doctor.OPTIONAL, "no-such-distribution", "nothing")
    report = doctor.examine()
    assert report.can_train
    assert report.optional["no-such-distribution"] is None


def test_a_package_for_another_torch_is_an_obstacle(monkeypatch, tmp_path):
    (tmp_path / "built_for_another.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(doctor.REQUIRED, "torchvision", ("built_for_another", "transforms"))
    report = doctor.examine()
    (obstacle,) = report.obstacles
    assert "torchvision::nms" in obstacle
    assert torch.__version__ in obstacle


def test_old_versions_are_obstacles(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 0))
    report = doctor.Report()
    doctor._examine_versions(report)
    assert ["Python" in report.obstacles[0], "torch 2.5.1+cpu is too old" in report.obstacles[1]] == [True, True]


def test_an_npu_is_described_with_its_software(monkeypatch, tmp_path):
    fake = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_name=lambda index=None: "Ascend910B3",
        memory_allocated=lambda index: 0,
        memory_reserved=lambda index: 0,
        max_memory_allocated=lambda index: 0,
        get_device_properties=lambda index: SimpleNamespace(total_memory=64 << 30),
    )
    (tmp_path / "version.cfg").write_text("runtime_running_version=[8.3.RC1:8.3.RC1]")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("HCCL_EVENT_TIMEOUT", "600")
    monkeypatch.setattr(torch, "npu", fake, raising=False)
    monkeypatch.setattr(devices.npu_loading, "torch_npu", SimpleNamespace(__version__="1.11.0"))
    report = doctor.Report()
    doctor._examine_devices(report)
    text = doctor.render(report)
    assert {"device": "npu:1", "name": "Ascend910B3", "memory": 64 << 30} in report.devices
    assert "Ascend910B3, 64.0 GiB" in text
    assert "8.3.RC1" in text
    assert report.environment["ASCEND_RT_VISIBLE_DEVICES"] == "0,1"
    assert "torch_npu 1.11.0 does not match torch" in text
    assert "PYTORCH_ALLOC_CONF and PYTORCH_NPU_ALLOC_CONF are both set" in text
    assert "HCCL_EVENT_TIMEOUT=600 must be larger" in text
    assert report.environment["HCCL_EVENT_TIMEOUT"] == "600"


def test_an_error_of_a_driver_is_a_problem_in_the_report(monkeypatch):
    def broken(self, index=None):
        raise RuntimeError("driver: error 507899\nmore lines")

    monkeypatch.setattr(devices.CpuDevice, "memory", broken)
    report = doctor.examine()
    assert report.problems == ["cpu does not answer: RuntimeError: driver: error 507899"]
    assert doctor._reason(RuntimeError("init\nEJ0001: ...")).startswith("RuntimeError: init EJ0001: the process that")
    assert report.can_train


@pytest.mark.parametrize("break_it", ["raise", "nan"])
def test_a_failing_step_is_an_obstacle(monkeypatch, break_it):
    def step(self, closure=None):
        if break_it == "raise":
            raise RuntimeError("kernel missing")
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    report = doctor.examine()
    (obstacle,) = report.obstacles
    assert ("kernel missing" if break_it == "raise" else "not finite") in obstacle
    assert not report.can_train


def run_doctor(tmp_path, *flags: str, torch_npu: str | None = None) -> str:
    """Return the stdout of the command, optionally with a fake torch_npu that has this source."""
    if torch_npu is not None:
        (tmp_path / "torch_npu.py").write_text(torch_npu)
        write_metadata(tmp_path, "torch_npu", "2.9.0.post2")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "training.doctor", *flags],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_metadata(folder: Path, name: str, version: str) -> None:
    (folder / f"{name}-{version}.dist-info").mkdir()
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / f"{name}-{version}.dist-info/METADATA").write_text(text)


def test_constraints_are_the_installed_versions(tmp_path):
    assert run_doctor(tmp_path, "--constraints").splitlines() == [
        f"torch=={importlib.metadata.version('torch')}",
        f"torchvision=={importlib.metadata.version('torchvision')}",
    ]


@pytest.mark.parametrize("flag", ["--constraints", "--json"])
def test_the_output_of_torch_npu_is_not_part_of_the_report(tmp_path, flag):
    """Without the variables of CANN, torch_npu prints a warning during its import."""
    printed = "print('Warning: ASCEND_HOME_PATH environment variable is not set.')\nraise ImportError('libhccl.so')\n"
    text = run_doctor(tmp_path, flag, torch_npu=printed)
    if flag == "--json":
        assert "libhccl.so" in json.loads(text)["problems"][0]
    else:
        assert text.splitlines()[-1] == "torch-npu==2.9.0.post2"
        assert all("==" in line for line in text.splitlines())


@pytest.mark.parametrize(
    ("own", "there", "matches"),
    [
        ("2.9.0.post2", "2.9.0+cpu", True),
        ("2.14.0", "2.14.1", False),
        ("2.7.1.post11", "2.7.0", False),
    ],
)
def test_torch_npu_is_compared_to_all_three_numbers(monkeypatch, own, there, matches):
    monkeypatch.setattr(devices.npu_loading, "torch_npu", SimpleNamespace(__version__=own))
    monkeypatch.setattr(torch, "__version__", there)
    problems = devices.get("npu").problems()
    assert len(problems) == (not matches)
    assert matches or f"torch_npu {own} does not match torch {there}" in problems[0]
