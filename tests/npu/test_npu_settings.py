"""Settings that a run on an NPU checks or makes at its start: variables, torch.compile, determinism, profiler, peak."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from emulated import ROOT, run_ranks, run_script

import processes
import train_runs

INI = """
[SoCInfo]
cube_core_cnt=10
[AICoreSpec]
cube_freq=1000
cube_m_size=16
cube_n_size=16
cube_k_size=16
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_runs.write_model(tmp_path_factory.mktemp("settings") / "model")


def train(model: str, place: Path, name: str, *more: object, status: int = 0, **variables: str) -> str:
    """Train two steps on an NPU, and return the output."""
    data = ["--dataset-type", "synthetic", "--train-num-samples", 8, "--batch-size", 4, "--epochs", 1, "--workers", 0]
    log = ["--log-every-n-steps", 1, "--report-to", "tensorboard", "--output-dir", place, "--name", name]
    path = f"{ROOT / 'tests/npu/shim'}:{ROOT / 'src'}"
    command = [sys.executable, "-m", "training.main", "--model", model, *data, *log, *more]
    return processes.run(command, place, status, PYTHONPATH=path, CANN_EMULATOR_DEVICES="1", **variables)


def test_two_deterministic_runs_have_the_same_bits(model: str, tmp_path: Path) -> None:
    common = ["--deterministic", "--force-patch-dropout", 0.5]
    for name in ("first", "second"):
        train(model, tmp_path, name, *common)
    first, second = (train_runs.scalars(tmp_path / name)["train/loss"] for name in ("first", "second"))
    assert len(first) == 2
    assert first == second
    one, other = (train_runs.weights(tmp_path / name, "epoch_1.pt") for name in ("first", "second"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    log = (tmp_path / "first/out.log").read_text()
    assert "--deterministic: torch.use_deterministic_algorithms, HCCL_DETERMINISTIC=true." in log


def test_determinism_is_set_before_collectives_are_created() -> None:
    script = """
        import os
        import open_clip, torch
        from training import ranks
        from training.params import DistributedConfig
        make = ranks._make_groups
        seen = []
        ranks._make_groups = lambda *a: seen.append(os.environ.get("HCCL_DETERMINISTIC")) or make(*a)
        world = ranks.init(DistributedConfig(deterministic=True))
        ranks.leave()
        print(world.backend, seen, torch.are_deterministic_algorithms_enabled())
    """
    assert [lines[-1] for lines in run_ranks(script, 2)] == ["hccl ['true'] True"] * 2


def test_peak_and_trace(model: str, tmp_path: Path) -> None:
    """MFU uses the peak from CANN's file, and torch_npu's profiler runs at a level that is not its default."""
    folder = tmp_path / "cann/aarch64-linux/data/platform_config"
    folder.mkdir(parents=True)
    (folder / "Ascend910B1.ini").write_text(INI)
    home = str(tmp_path / "cann")
    traced = ["--profile-steps", "0:1", "--profile-level", 1]
    train(model, tmp_path, "run", *traced, ASCEND_TOOLKIT_HOME=home)
    log = (tmp_path / "run/out.log").read_text()
    assert f"a peak of 81.9 TFLOP/s, from {folder / 'Ascend910B1.ini'}" in log
    assert "Traced 1 step(s)" in log


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_profiler_takes_the_levels_of_torch_npu(level: int, tmp_path: Path) -> None:
    script = f"""
        import open_clip.device as device
        profiler = device.get("npu").profiler({str(tmp_path)!r}, wait=0, warmup=0, active=1, level={level})
        print(profiler.prof_if.experimental_config._profiler_level)
    """
    assert run_script(script)[-1] == f"Level{level}"


@pytest.mark.parametrize(("strategy", "backend"), [("blocks", "aot_eager"), ("task", "eager"), ("step", "aot_eager")])
def test_a_backend_without_a_compiler_trains_as_eager_mode(
    model: str, tmp_path: Path, strategy: str, backend: str
) -> None:
    compiling = ["--torchcompile", "--torchcompile-strategy", strategy, "--torchcompile-backend", backend]
    common = ["--precision", "amp_bf16" if strategy == "step" else "fp32"]
    for name, more in (("plain", []), ("compiled", compiling)):
        train(model, tmp_path, name, *common, *more)
    expected, found = (train_runs.scalars(tmp_path / name)["train/loss"] for name in ("plain", "compiled"))
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=0.02 if strategy == "step" else 1e-4)
    assert "graph break" not in (tmp_path / "compiled/out.log").read_text()


@pytest.mark.parametrize(
    ("more", "variables", "reason"),
    [
        (["--torchcompile"], {}, "--torchcompile: torch.compile on an NPU needs triton-ascend"),
        ([], {"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_NPU_ALLOC_CONF": "a:1"}, "are both set"),
        ([], {"ACL_DEVICE_SYNC_TIMEOUT": "0"}, "ACL_DEVICE_SYNC_TIMEOUT=0"),
        (["--deterministic"], {"HCCL_DETERMINISTIC": "false"}, "contradicts HCCL_DETERMINISTIC=false"),
    ],
    ids=["compile", "allocator", "synchronization", "deterministic"],
)
def test_a_setting_that_prevents_the_run_is_reported_without_a_traceback(
    model: str, tmp_path: Path, more: list[str], variables: dict[str, str], reason: str
) -> None:
    printed = train(model, tmp_path, "run", *more, status=1, **variables)
    assert reason in printed
    assert printed.count("The run ends") == 1
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()
