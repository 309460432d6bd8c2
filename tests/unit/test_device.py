"""open_clip.device, with fake device modules instead of hardware."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from open_clip import device as devices

SOURCE = Path(__file__).parents[2] / "src"


class FakeScaler:
    def __init__(self, **options):
        self.options = options


class FakeNpu:
    """A fake `torch.npu` that records calls."""

    def __init__(self, name: str = "Ascend910B3", bf16: bool = True, count: int = 2):
        self.calls: list[tuple] = []
        self.matmul = SimpleNamespace(allow_hf32=False)
        self.conv = SimpleNamespace(allow_hf32=True)
        self.amp = SimpleNamespace(GradScaler=FakeScaler)
        self.utils = SimpleNamespace(is_support_inf_nan=lambda: True)
        self._name, self._bf16, self._count = name, bf16, count

    def is_available(self):
        return self._count > 0

    def device_count(self):
        return self._count

    def get_device_name(self, index=None):
        return self._name

    def is_bf16_supported(self):
        return self._bf16

    def memory_allocated(self, index=None):
        return 1 << 20

    def memory_reserved(self, index=None):
        return 2 << 20

    def max_memory_allocated(self, index=None):
        return 3 << 20

    def get_device_properties(self, index):
        return SimpleNamespace(total_memory=64 << 30)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args: self.calls.append((name, *args))


@pytest.fixture
def npu(monkeypatch):
    return install_npu(monkeypatch, FakeNpu())


def install_npu(monkeypatch, fake, version=torch.__version__):
    library = SimpleNamespace(
        __version__=version,
        npu_fast_gelu=lambda x: ("fast_gelu", x),
        npu_gelu=lambda x, approximate: ("gelu", approximate),
    )
    monkeypatch.setattr(torch, "npu", fake, raising=False)
    monkeypatch.setattr(devices.npu_loading, "torch_npu", library)
    monkeypatch.setattr(devices.npu_loading, "failure", None)
    return fake


def absent(monkeypatch, *kinds):
    for kind in kinds:
        monkeypatch.setattr(type(devices.DEVICES[kind]), "is_available", lambda self: False)


# Names


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1", "NPU:3", "mps", "xpu:0"])
def test_get_by_name(name):
    assert devices.get(name).type == name.split(":")[0].lower()


def test_get_by_torch_device():
    assert devices.get(torch.device("cuda", 1)) is devices.DEVICES["cuda"]


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "", "npu:", "npu:-1", torch.device("meta")])
def test_an_unknown_device_raises_with_the_known_ones(name):
    with pytest.raises(ValueError, match="npu, cuda, xpu, mps, cpu"):
        devices.get(name)


def test_the_cpu_is_the_last_choice(monkeypatch):
    absent(monkeypatch, "npu", "cuda", "xpu", "mps")
    assert devices.best() == torch.device("cpu")
    assert list(devices.DEVICES) == ["npu", "cuda", "xpu", "mps", "cpu"]


def test_best_prefers_cuda_to_xpu(monkeypatch):
    absent(monkeypatch, "npu", "mps")
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(type(devices.DEVICES[kind]), "is_available", lambda self: True)
    assert devices.best() == torch.device("cuda")


# Resolving


def test_resolve_gives_each_rank_another_device(monkeypatch):
    monkeypatch.setattr(devices.CudaDevice, "is_available", lambda self: True)
    monkeypatch.setattr(devices.CudaDevice, "count", lambda self: 4)
    assert devices.resolve("cuda") == torch.device("cuda:0")
    assert devices.resolve("cuda", local_rank=3) == torch.device("cuda:3")
    assert devices.resolve("cuda:1", local_rank=3) == torch.device("cuda:1")
    with pytest.raises(RuntimeError, match=r"cuda:4 does not exist: this host has 4"):
        devices.resolve("cuda", local_rank=4)


def test_resolve_auto_takes_the_best(monkeypatch):
    absent(monkeypatch, "npu", "cuda", "xpu", "mps")
    assert devices.resolve() == devices.resolve(None) == devices.resolve("auto", 3) == torch.device("cpu")


@pytest.mark.parametrize("kind", ["npu", "cuda", "xpu", "mps"])
def test_a_missing_device_raises_and_says_what_is_missing(monkeypatch, kind):
    absent(monkeypatch, kind)
    with pytest.raises(RuntimeError, match=f"Device '{kind}' is not available") as caught:
        devices.resolve(kind)
    assert devices.DEVICES[kind].why_missing() in str(caught.value)


def test_why_an_npu_is_missing(monkeypatch):
    kind = devices.DEVICES["npu"]
    monkeypatch.setattr(devices.npu_loading, "torch_npu", None)
    monkeypatch.setattr(devices.npu_loading, "failure", None)
    monkeypatch.setattr(torch, "__version__", "2.9.0+cpu")
    assert "pip install torch_npu==2.9.0.*" in kind.why_missing()
    monkeypatch.setattr(devices.npu_loading, "failure", "ImportError: libhccl.so")
    assert "libhccl.so" in kind.why_missing()
    assert "set_env.sh" in kind.why_missing()
    install_npu(monkeypatch, FakeNpu(count=0))
    assert "ASCEND_RT_VISIBLE_DEVICES" in kind.why_missing()
    install_npu(monkeypatch, FakeNpu())
    assert kind.why_missing() is None


# NpuDevice


def test_npu_memory(npu):
    mebi = {key: value >> 20 for key, value in devices.get("npu").memory(0).items()}
    assert mebi == {"allocated": 1, "reserved": 2, "peak": 3, "total": 64 << 10}


def test_npu_methods_call_the_module(npu):
    kind = devices.get("npu")
    kind.set_device(1)
    kind.manual_seed(7)
    kind.synchronize()
    kind.reset_peak_memory(1)
    kind.set_rng_state("state")
    assert npu.calls == [
        ("set_device", 1),
        ("manual_seed_all", 7),
        ("synchronize",),
        ("reset_peak_memory_stats", 1),
        ("set_rng_state", "state"),
    ]


def test_npu_fast_matmul_sets_products_and_convolutions(npu):
    for enabled in (True, False):
        devices.get("npu").set_fast_matmul(enabled)
        assert (npu.matmul.allow_hf32, npu.conv.allow_hf32) == (enabled, enabled)


def test_npu_scaler_is_torch_npus(npu):
    scaler = devices.get("npu").grad_scaler(init_scale=4.0)
    assert isinstance(scaler, FakeScaler)
    assert scaler.options == {"init_scale": 4.0}


def test_first_generation_has_no_bf16(monkeypatch):
    install_npu(monkeypatch, FakeNpu("Ascend910A", bf16=False))
    kind = devices.get("npu")
    assert kind.supports(torch.float16)
    assert not kind.supports(torch.bfloat16)
    assert kind.peak_flops(torch.float16) == 256e12
    assert kind.peak_flops(torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("Ascend910B1", 363.7),
        ("Ascend910B2C", 353.9),
        ("Ascend910B3", 294.9),
        ("Ascend910B4-1", 245.8),
        ("Ascend910_9391", 353.9),
        ("Ascend910_9362", None),
        ("Ascend910PremiumA", 256.0),
        ("Ascend910B", 221.2),
        ("Ascend910ProB", 221.2),
        ("Ascend950PR_9589", 432.5),
        ("Ascend950PR_9579", 378.5),
        ("Ascend950DT_9582", 486.6),
        ("Ascend310P3", None),
    ],
)
def test_ascend_peaks(monkeypatch, name, tera):
    install_npu(monkeypatch, FakeNpu(name))
    peak = devices.get("npu").peak_flops(torch.float16)
    assert (None if peak is None else round(peak / 1e12, 1)) == tera


@pytest.mark.parametrize(
    ("name", "fp16", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 312),
        ("NVIDIA H100 80GB HBM3", 989, 989),
        ("NVIDIA H100 PCIe", 756, 756),
        ("NVIDIA H200", 989, 989),
        ("NVIDIA H20", 148, 148),
        ("Tesla V100-SXM2-32GB", 125, None),
        ("Tesla T4", 65, None),
        ("NVIDIA L4", 121, 121),
        ("NVIDIA L40S", 362, 362),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2),
        ("NVIDIA A10G", 125, 125),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 165.2, 165.2),
        ("NVIDIA A1000", None, None),
    ],
)
def test_nvidia_peaks(monkeypatch, name, fp16, bf16):
    monkeypatch.setattr(devices.CudaDevice, "is_available", lambda self: True)
    monkeypatch.setattr(devices.CudaDevice, "name", lambda self, index=None: name)
    for dtype, tera in ((torch.float16, fp16), (torch.bfloat16, bf16)):
        assert devices.get("cuda").peak_flops(dtype) == (None if tera is None else tera * 1e12)
    assert devices.get("cuda").peak_flops(torch.float64) is None


def test_npu_profiler_is_torch_npus(npu, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        devices.npu_loading.torch_npu,
        "profiler",
        SimpleNamespace(
            ProfilerActivity=SimpleNamespace(CPU="host", NPU="device"),
            schedule=lambda **kwargs: kwargs,
            tensorboard_trace_handler=lambda folder: folder,
            profile=lambda **kwargs: asked.update(kwargs) or "profiler",
            ProfilerLevel=SimpleNamespace(Level0="L0", Level1="L1", Level2="L2"),
            AiCMetrics=SimpleNamespace(AiCoreNone="no metrics"),
            _ExperimentalConfig=lambda profiler_level, aic_metrics=None: (profiler_level, aic_metrics),
        ),
        raising=False,
    )
    for level in (2, 1, 0):
        assert devices.get("npu").profiler("traces", active=5, level=level) == "profiler"
        assert asked["experimental_config"] == (f"L{level}", None if level else "no metrics")
        assert (asked["record_shapes"], asked["with_stack"]) == (level >= 1, level >= 2)
    assert asked["activities"] == ["host", "device"]
    assert asked["schedule"]["active"] == 5
    assert asked["on_trace_ready"] == "traces"


def test_mismatched_versions_are_reported_with_a_fix(monkeypatch):
    install_npu(monkeypatch, FakeNpu(), version="1.11.0.post3")
    (problem,) = devices.get("npu").problems()
    assert "1.11.0.post3" in problem
    assert torch.__version__ in problem
    install_npu(monkeypatch, FakeNpu())
    assert devices.get("npu").problems() == []


def test_cann_version_is_read_from_its_files(npu, monkeypatch, tmp_path):
    (tmp_path / "compiler").mkdir()
    (tmp_path / "compiler/version.info").write_text("Version=8.5.0.B131\ntimestamp=20251101\n")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    assert devices.get("npu").software()["CANN"] == "8.5.0.B131"
    (tmp_path / "compiler/version.info").unlink()
    assert str(tmp_path) in devices.get("npu").software()["CANN"]


# Activations


def test_activations_on_any_device():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert torch.allclose(devices.quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))
    assert torch.equal(devices.gelu(x), torch.nn.functional.gelu(x))
    assert torch.equal(devices.gelu(x, "tanh"), torch.nn.functional.gelu(x, approximate="tanh"))
    assert devices.quick_gelu(torch.empty(2, 3, device="meta")).shape == (2, 3)


def test_npu_activations_are_fused_if_the_chip_supports_them(npu, monkeypatch):
    kind, x = devices.get("npu"), torch.ones(2)
    monkeypatch.setattr(devices.npu_ops, "is_usable", lambda name, device, dtype: False)
    torch.testing.assert_close(kind.gelu(x.double()), torch.nn.functional.gelu(x.double()))
    torch.testing.assert_close(kind.quick_gelu(x), x * torch.sigmoid(1.702 * x))
    monkeypatch.setattr(devices.npu_ops, "is_usable", lambda name, device, dtype: dtype == torch.float32)
    assert kind.quick_gelu(x)[0] == "fast_gelu"
    assert kind.gelu(x) == ("gelu", "none")
    assert kind.gelu(x, "tanh") == ("gelu", "tanh")
    assert torch.is_tensor(kind.quick_gelu(x.double()))  # the fused kernel does not support float64


@pytest.fixture
def elementary():
    devices.use_fused_ops(False)
    yield
    devices.use_fused_ops(True)


def test_fused_operators_can_be_switched_off(npu, elementary, monkeypatch):
    monkeypatch.setattr(devices.ops, "_PLAIN", devices.DEVICES["npu"])  # so that a wrong choice would be seen
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(devices.gelu(x), torch.nn.functional.gelu(x))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: pytest.fail("fused"))
    devices.attention(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))


def test_switched_off_operators_use_the_cpus(monkeypatch):
    fused = SimpleNamespace(quick_gelu=lambda x: "fused", gelu=lambda x, approximate: "fused")
    monkeypatch.setitem(devices.DEVICES, "cpu", fused)
    assert devices.quick_gelu(torch.ones(1)) == devices.gelu(torch.ones(1)) == "fused"
    devices.use_fused_ops(False)
    try:
        assert torch.is_tensor(devices.quick_gelu(torch.ones(1)))
        assert torch.is_tensor(devices.gelu(torch.ones(1), "tanh"))
    finally:
        devices.use_fused_ops(True)


def test_elementary_ops_is_temporary():
    query, key, value = (torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    fused = devices.attention(query, key, value, is_causal=True)
    with devices.elementary_ops():
        torch.testing.assert_close(devices.attention(query, key, value, is_causal=True), fused)
        assert not devices.ops._fused_ops
    assert devices.ops._fused_ops


@pytest.mark.parametrize("value", ["0", "1"])
def test_fused_operators_can_be_switched_off_by_a_variable(value):
    program = "from open_clip import device; print(device.ops._fused_ops)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OPEN_CLIP_FUSED_OPS": value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(value == "1")], done.stderr


@pytest.mark.parametrize("case", ["plain", "causal", "bool", "additive", "scale"])
@pytest.mark.parametrize("num_heads", [None, 2])
def test_attention_of_elementary_operators_equals_the_fused_one(case, num_heads, request):
    torch.manual_seed(0)
    shape = (2, 3, 4, 8) if num_heads is None else (2, 4, 16)
    query = torch.randn(shape, requires_grad=True)
    key, value = torch.randn(shape), torch.randn(shape)
    seen = torch.rand(2, 1, 4, 4) > 0.4
    seen[..., 0] = True
    options = {
        "plain": {}, "causal": {"is_causal": True}, "bool": {"attn_mask": seen},
        "additive": {"attn_mask": torch.randn(4, 4)}, "scale": {"scale": 0.7},
    }[case]  # fmt: skip
    expected = devices.attention(query, key, value, **options, num_heads=num_heads)
    assert expected.shape == shape
    (gradient,) = torch.autograd.grad(expected.square().sum(), query)
    request.getfixturevalue("elementary")
    found = devices.attention(query, key, value, **options, num_heads=num_heads)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), query)[0], gradient)


# Optimizers


def test_torch_npus_fused_adamw_needs_an_npu(npu, monkeypatch):
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]}]
    for kind in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=f"needs an NPU, and this device is {kind}"):
            devices.get(kind).adamw(groups, "npu")
    monkeypatch.setattr(devices.npu_adamw, "make_safe", lambda made: ("safe", *made))
    devices.npu_loading.torch_npu.optim = SimpleNamespace(NpuFusedAdamW=lambda groups, **options: (groups, options))
    assert devices.get("npu").adamw(groups, "npu", lr=0.5) == ("safe", groups, {"lr": 0.5})


@pytest.mark.parametrize(("form", "fused"), [("auto", None), ("torch", True), ("off", None)])
def test_npu_scaler_unscales_for_adamw(npu, form, fused):
    """torch_npu's scaler passes itself to the step of an optimizer that says it unscales; AdamW's step has no such
    argument."""
    optimizer = devices.get("npu").adamw([torch.nn.Parameter(torch.ones(2))], form)
    assert optimizer.param_groups[0]["fused"] is fused
    assert not optimizer._step_supports_amp_scaling


# CpuDevice


def test_cpu_device():
    kind = devices.get("cpu")
    assert kind.backend == "gloo"
    assert kind.default_precision == "fp32"
    assert not kind.pin_memory
    assert kind.grad_scaler() is None
    assert kind.peak_flops(torch.float32) is None
    with kind.autocast(torch.bfloat16):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    state = kind.rng_state()
    first = torch.rand(3)
    kind.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))
    kind.manual_seed(3)
    second = torch.rand(3)
    kind.manual_seed(3)
    assert torch.equal(second, torch.rand(3))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_cpu_memory_is_this_process_in_bytes():
    memory = devices.get("cpu").memory()
    assert 10 << 20 < memory["allocated"] <= memory["peak"] < memory["total"]


def test_cpu_profiler_writes_a_trace(tmp_path):
    with devices.get("cpu").profiler(str(tmp_path), wait=0, warmup=1, active=1) as profiler:
        for _ in range(2):
            torch.ones(2) + 1
            profiler.step()
    assert list(tmp_path.glob("*.json*"))


def test_cuda_tf32_is_set_for_products_and_convolutions(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=None))
    devices.get("cuda").set_fast_matmul(True)
    assert (asked[-1], torch.backends.cudnn.allow_tf32) == ("high", True)
    devices.get("cuda").set_fast_matmul(False)
    assert (asked[-1], torch.backends.cudnn.allow_tf32) == ("highest", False)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory(error, expected):
    assert devices.is_out_of_memory(error) is expected


# Loading torch_npu, in child processes and with the entry point that torch looks for


def run_with_torch_npu(folder: Path, body: str, program: str) -> subprocess.CompletedProcess:
    """Run `program` with an installed package torch_npu that has the given body and a torch.backends entry point."""
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu/__init__.py").write_text(body + "\ndef _autoload(): pass\n")
    info = folder / "torch_npu-2.6.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.6.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    path = os.pathsep.join([str(folder), str(SOURCE)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)


BROKEN = "raise ImportError('libhccl.so: cannot open shared object file')"


def test_torch_npu_without_cann_logs_one_warning_and_the_next_device_is_used(tmp_path):
    program = """if True:
        import logging
        logging.basicConfig()
        from open_clip import device
        import os
        print(device.DEVICES["npu"].is_available(), device.best().type, os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"])
    """
    result = run_with_torch_npu(tmp_path, BROKEN, program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == "False"
    assert result.stdout.split()[1] != "npu"
    assert result.stdout.split()[2] == "0"  # child processes work, too
    assert result.stderr.count("WARNING") == 1
    assert "libhccl.so" in result.stderr
    assert "set_env.sh" in result.stderr
    assert "Traceback" not in result.stderr


def test_torch_npu_that_loads_is_the_best_device(tmp_path):
    body = """if True:
        import types, torch
        torch.utils.rename_privateuse1_backend("npu")
        torch._register_device_module("npu", types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 2))
        __version__ = "2.6.0"
    """
    program = """if True:
        from open_clip import device
        import os
        print(device.best(), device.resolve(local_rank=1), "TORCH_DEVICE_BACKEND_AUTOLOAD" in os.environ)
    """
    result = run_with_torch_npu(tmp_path, body, program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["npu", "npu:1", "False"]


# MpsDevice, XpuDevice and missing devices


def test_mps_device(monkeypatch):
    calls = []
    fake = SimpleNamespace(
        current_allocated_memory=lambda: 1,
        driver_allocated_memory=lambda: 2,
        recommended_max_memory=lambda: 3,
        manual_seed=calls.append,
        device_count=lambda: 1,
    )
    monkeypatch.setattr(torch, "mps", fake)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    kind = devices.get("mps")
    assert kind.memory() == {"allocated": 1, "reserved": 2, "peak": 1, "total": 3}
    kind.manual_seed(5)
    assert calls == [5]
    assert devices.resolve("mps:0", local_rank=0) == torch.device("mps")
    assert not kind.supports(torch.bfloat16)
    assert kind.amp_dtype == torch.float16
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= (14, 5))
    assert kind.amp_dtype == torch.bfloat16
    assert kind.grad_scaler() is None


@pytest.mark.parametrize(
    ("kind", "version", "message"),
    [
        ("cuda", None, "built without CUDA"),
        ("cuda", "12.6", "nvidia-smi"),
        ("xpu", None, "built without XPU"),
        ("xpu", "20250000", "sycl-ls"),
    ],
)
def test_a_build_without_support_and_a_missing_device_have_different_messages(monkeypatch, kind, version, message):
    absent(monkeypatch, kind)
    monkeypatch.setattr(torch.version, kind, version, raising=False)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    assert message in devices.get(kind).why_missing()


def test_xpu_device_calls_its_module(monkeypatch):
    fake = FakeNpu("Intel Data Center GPU Max 1550", count=1)
    monkeypatch.setattr(torch, "xpu", fake)
    kind = devices.get("xpu")
    assert (kind.backend, kind.default_precision, kind.count()) == ("xccl", "amp", 1)
    assert kind.memory()["total"] == 64 << 30
    assert kind.peak_flops(torch.float16) is None
    kind.set_device(0)
    assert fake.calls == [("set_device", 0)]


def test_an_index_selects_an_accelerator(monkeypatch):
    monkeypatch.setattr(devices, "best", lambda: torch.device("cpu"))
    with pytest.raises(RuntimeError, match="device=0 selects an accelerator, and none is available"):
        devices.as_asked(0)
    with pytest.raises(ValueError, match="Unknown device 'True'"):
        devices.as_asked(True)
    monkeypatch.setattr(devices, "best", lambda: torch.device("cuda"))
    monkeypatch.setattr(type(devices.DEVICES["cuda"]), "is_available", lambda kind: True)
    monkeypatch.setattr(type(devices.DEVICES["cuda"]), "count", lambda kind: 2)
    assert devices.as_asked(1) == torch.device("cuda", 1)
    with pytest.raises(RuntimeError, match="cuda:2 does not exist"):
        devices.as_asked(2)
