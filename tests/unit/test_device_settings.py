"""Checks of the environment, torch.compile, determinism, hints for errors, and peaks from CANN's files."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from open_clip import device as devices

NPU, CUDA, CPU = (devices.get(kind) for kind in ("npu", "cuda", "cpu"))
VARIABLES = {name for kind in devices.DEVICES.values() for name in kind.variables}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in VARIABLES | {"CC", "CXX"}:
        monkeypatch.delenv(name, raising=False)


# transfer_to_npu


def functions(name: str) -> SimpleNamespace:
    return SimpleNamespace(
        device_count=lambda: 2, is_available=lambda: True, get_device_name=lambda index=None: name, set_device=print
    )


@pytest.fixture
def transferred(monkeypatch):
    """Simulate a loaded torch_npu that has replaced functions of torch.cuda."""
    npu, cuda = functions("Ascend910B3"), functions("Ascend910B3")
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(devices.npu_loading, "torch_npu", SimpleNamespace(npu=npu, __version__=torch.__version__))
    monkeypatch.setattr(devices.npu_loading, "failure", None)
    assert CUDA.is_available()
    assert devices.get("cuda") is CUDA
    cuda.device_count = npu.device_count  # checked at each use, because transfer_to_npu may be imported later
    return cuda


def test_cuda_is_the_npu_while_it_is_replaced(transferred):
    assert devices.get("cuda") is devices.get("cuda:1") is devices.get(torch.device("cuda", 1)) is NPU
    with pytest.raises(RuntimeError, match="npu:2 does not exist: this host has 2"):
        devices.resolve("cuda:2")  # tests/npu tests existing devices; this torch does not know the name
    assert (CUDA.is_available(), CUDA.count()) == (False, 0)
    assert "transfer_to_npu" in CUDA.why_missing()
    assert "transfer_to_npu" in NPU.notes()[0]


def test_nccl_is_hccl_while_cuda_is_replaced(transferred):
    assert devices.resolve_backend("nccl") == "hccl"
    assert devices.resolve_backend("cpu:gloo,cuda:nccl") == "cpu:gloo,npu:hccl"
    assert devices.resolve_backend("gloo") == "gloo"


def test_cuda_stays_cuda_without_transfer_to_npu(transferred):
    transferred.device_count = lambda: 2
    assert devices.get("cuda") is CUDA
    assert devices.resolve("cuda:1") == torch.device("cuda", 1)
    assert devices.resolve_backend("cpu:gloo,cuda:nccl") == "cpu:gloo,cuda:nccl"
    assert NPU.notes() == []


# The environment


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PYTORCH_ALLOC_CONF": "a", "PYTORCH_NPU_ALLOC_CONF": "a"}, "are both set"),
        ({"PYTORCH_ALLOC_CONF": "a"}, None),
        ({"PYTORCH_NPU_ALLOC_CONF": "a"}, None),
        ({"ACL_DEVICE_SYNC_TIMEOUT": "0"}, "ACL_DEVICE_SYNC_TIMEOUT=0"),
        ({"ACL_DEVICE_SYNC_TIMEOUT": "-1"}, "ACL_DEVICE_SYNC_TIMEOUT=-1"),
        ({"ACL_DEVICE_SYNC_TIMEOUT": "60"}, None),
    ],
)
def test_settings_that_prevent_a_run_on_an_npu(monkeypatch, variables, expected):
    check_sentences(monkeypatch, variables, NPU.environment_errors, expected)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HCCL_EVENT_TIMEOUT": "1800"}, "=1800 must be larger than HCCL_EXEC_TIMEOUT, which is 1836"),
        ({"HCCL_EVENT_TIMEOUT": "1837"}, None),
        ({"HCCL_EVENT_TIMEOUT": "600", "HCCL_EXEC_TIMEOUT": "600"}, "which is 600"),
        ({"HCCL_EVENT_TIMEOUT": "601", "HCCL_EXEC_TIMEOUT": "600"}, None),
        ({"HCCL_EVENT_TIMEOUT": "601", "HCCL_EXEC_TIMEOUT": "0"}, "no limit"),
        ({"HCCL_EVENT_TIMEOUT": "0", "HCCL_EXEC_TIMEOUT": "600"}, None),
        ({"HCCL_EVENT_TIMEOUT": "soon"}, None),
        ({"HCCL_OP_EXPANSION_MODE": "AIV"}, None),
        ({"HCCL_OP_EXPANSION_MODE": "AIV", "HCCL_EXEC_TIMEOUT": "1200"}, "=1200 is more than the 1091"),
        ({"HCCL_EXEC_TIMEOUT": "3600"}, None),
        ({"HCCL_CONNECT_TIMEOUT": "60"}, "CANN accepts 120 to 7200"),
        ({"HCCL_CONNECT_TIMEOUT": "1800"}, None),
        ({"ASCEND_LAUNCH_BLOCKING": "1"}, "ASCEND_LAUNCH_BLOCKING"),
        ({"ASCEND_LAUNCH_BLOCKING": "0"}, None),
    ],
)
def test_settings_of_an_npu_that_contradict_each_other(monkeypatch, variables, expected):
    check_sentences(monkeypatch, variables, NPU.environment_warnings, expected)


def check_sentences(monkeypatch, variables, ask, expected):
    assert set(variables) <= set(NPU.variables), "the doctor shows what it judges"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = ask()
    assert len(found) == (expected is not None)
    assert all(expected in sentence for sentence in found)


# torch.compile


def install_triton(monkeypatch, folder: Path | None):
    real = importlib.util.find_spec
    spec = None if folder is None else importlib.machinery.ModuleSpec("triton", None, is_package=True)
    if spec is not None:
        spec.submodule_search_locations.append(str(folder))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: spec if name == "triton" else real(name, *rest)
    )


def test_compiling_for_an_npu_needs_triton_ascend(monkeypatch, tmp_path):
    install_triton(monkeypatch, None)
    assert "needs triton-ascend" in NPU.why_not_compile()
    install_triton(monkeypatch, tmp_path)
    assert "needs triton-ascend" in NPU.why_not_compile(), "the triton for GPUs does not suffice"
    (tmp_path / "backends/ascend").mkdir(parents=True)
    assert NPU.why_not_compile() is None
    install_triton(monkeypatch, None)
    monkeypatch.setenv("TORCHINDUCTOR_NPU_BACKEND", "dvm")
    assert NPU.why_not_compile() is None


def test_compiling_under_transfer_to_npu(transferred, monkeypatch, tmp_path):
    (tmp_path / "backends/ascend").mkdir(parents=True)
    install_triton(monkeypatch, tmp_path)
    assert "transfer_to_npu" in NPU.why_not_compile()


def test_compiling_for_a_gpu_needs_triton_and_a_c_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    install_triton(monkeypatch, None)
    assert "cuda needs the package triton" in CUDA.why_not_compile()
    assert "xpu needs the package triton" in devices.get("xpu").why_not_compile()
    assert devices.get("mps").why_not_compile() is None
    install_triton(monkeypatch, tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs a C compiler" in CUDA.why_not_compile()
    monkeypatch.setenv("CC", "/opt/gcc")
    assert CUDA.why_not_compile() is None


def test_compiling_for_the_cpu_needs_a_cpp_compiler(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert CPU.why_not_compile() is None
    monkeypatch.setenv("CXX", "g++-99")
    assert "'g++-99' is not installed" in CPU.why_not_compile()


# Determinism


@pytest.fixture
def restored(monkeypatch):
    """Restore the settings that `set_deterministic` changes."""
    for name in ("HCCL_DETERMINISTIC", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@pytest.mark.parametrize(
    ("kind", "variables"),
    [
        (NPU, {"HCCL_DETERMINISTIC": "true"}),
        (CUDA, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "^NVLS,NVLSTree"}),
        (CPU, {}),
    ],
)
def test_deterministic_settings_of_a_device(restored, kind, variables):
    torch.backends.cudnn.benchmark = True
    kind.set_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert {name: os.environ[name] for name in variables} == variables
    for name, value in variables.items():
        assert f"{name}={value}" in kind.deterministic_settings()
    if kind is CUDA:
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)


def test_deterministic_settings_of_the_user_are_kept(restored, monkeypatch):
    monkeypatch.setenv("HCCL_DETERMINISTIC", "strict")
    NPU.set_deterministic()
    assert os.environ["HCCL_DETERMINISTIC"] == "strict"
    assert "HCCL_DETERMINISTIC=strict" in NPU.deterministic_settings()
    monkeypatch.setenv("HCCL_DETERMINISTIC", "False")
    with pytest.raises(ValueError, match="--deterministic contradicts HCCL_DETERMINISTIC=false"):
        NPU.set_deterministic()


# Errors

EJ0001 = """create_config: HCCL function error: hcclCommInitRootInfoConfig(...), error code is 7
[ERROR] 2025-04-24-16:14:56 (PID:468348, Device:0, RankID:2) ERR02200 DIST call hccl api failed.
EJ0001: [PID: 468348] Failed to initialize the HCCP process. Reason: Maybe the last training process is running."""


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (EJ0001, "Wait 10 s after its end"),
        ("NPU function error: aclrtSynchronizeDevice, error code is 507046", "A wait for the NPU timed out"),
        ("NPU function error: aclrtSynchronizeStream, error code is 107020", "A wait for the NPU timed out"),
        ("wait for compute device to finish failed, runtime result = 507046.", "A wait for the NPU timed out"),
        ("EE1002: 2024-09-03 Stream synchronize timeout.", "A wait for the NPU timed out"),
        ("EI0002: The wait execution of the Notify register times out.", "HCCL_EXEC_TIMEOUT"),
        ("EI0006: Getting socket times out.", "HCCL_CONNECT_TIMEOUT"),
        ("[ERROR] (PID:975, Device:-1, RankID:-1) ERR99999 UNKNOWN applicaiton exception", "Its traceback"),
        ("NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)", "NCCL_SOCKET_IFNAME"),
        ("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000", "Two processes use one GPU"),
        ("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(...)", "--dist-timeout"),
        ("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...", "--deterministic"),
        ("The folder run-107020 has 507046 images", None),
        ("shape mismatch", None),
    ],
)
def test_hints_for_known_errors(text, advice):
    found = devices.hint(text)
    assert (found is None) if advice is None else advice in found


@pytest.mark.parametrize(
    "text",
    [
        "NPU function error: aclrtMalloc, error code is 207001",
        "alloc device memory failed, runtime result = 207018[FUNC:ReportCallError]",
        "[PID: 210907] Memory_Allocation_Failure(EL0004): Failed to allocate memory requested by GE module.",
    ],
)
def test_codes_of_cann_for_out_of_memory(text):
    assert devices.is_out_of_memory(RuntimeError(text))


# CANN's description of a chip

INI = """
[version]
SoC_version=Ascend910B4
[SoCInfo]
ai_core_cnt=20
cube_core_cnt=20
vector_core_cnt=40
[AICoreSpec]
cube_freq=1500
cube_m_size=16
cube_n_size=16
cube_k_size=16
"""


@pytest.fixture
def chip(monkeypatch, tmp_path):
    """Simulate an NPU that is not in the table, on a host with CANN."""
    monkeypatch.setattr(devices.NpuDevice, "is_available", lambda self: True)
    monkeypatch.setattr(devices.NpuDevice, "name", lambda self, index=None: "Ascend777X")
    monkeypatch.setattr(devices.NpuDevice, "supports", lambda self, dtype: dtype != torch.bfloat16)
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("folder", ["x86_64-linux", "aarch64-linux", "arm64-linux", "compiler"])
def test_the_peak_is_read_from_canns_file(chip, folder):
    assert NPU.peak_flops(torch.float16) is None
    (chip / folder / "data/platform_config").mkdir(parents=True)
    path = chip / folder / "data/platform_config/Ascend777X.ini"
    path.write_text(INI)
    assert NPU.peak_flops(torch.float16) == pytest.approx(245.76e12)
    assert NPU.peak_flops(torch.bfloat16) is None, "this chip has none"
    assert NPU.peak_flops(torch.float32) is None
    assert NPU.peak_source() == str(path)


def test_canns_file_is_preferred_to_the_table(chip, monkeypatch):
    monkeypatch.setattr(devices.NpuDevice, "name", lambda self, index=None: "Ascend910B4")
    assert "peaks.py" in NPU.peak_source()
    (chip / "compiler/data/platform_config").mkdir(parents=True)
    (chip / "compiler/data/platform_config/Ascend910B4.ini").write_text(INI.replace("1500", "3000"))
    assert NPU.peak_flops(torch.float16) == pytest.approx(2 * 245.76e12)


@pytest.mark.parametrize(
    ("text", "tera"),
    [
        (INI.replace("cube_core_cnt=20\n", ""), 245.76),  # older files have only ai_core_cnt
        (INI.replace("cube_freq=1500", "cube_freq=fast"), None),
        (INI.replace("cube_freq=1500", "cube_freq=0"), None),
        (INI.replace("cube_k_size=16", ""), None),
        (INI.replace("[SoCInfo]", "[Other]"), None),
        ("not an ini file", None),
        (INI + "[AICoreSpec]\n%=%(x)s\n", 245.76),
    ],
)
def test_incomplete_files_of_cann(tmp_path, text, tera):
    path = tmp_path / "chip.ini"
    path.write_text(text)
    found = devices.peaks.of_platform_config(path)
    assert found == (None if tera is None else pytest.approx(tera * 1e12))
    assert devices.peaks.of_platform_config(tmp_path / "none.ini") is None
