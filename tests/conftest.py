"""The suite gives the same results whatever the caller's environment is.

What can change a result is removed or set here, before any test module and thus any library is imported, for this
process and for those that tests start. pytest-xdist's workers load this file too.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import site
import sys
import tempfile
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

# Variables are removed by prefix, in upper case. The places of CANN, CUDA and compilers stay (ASCEND_HOME_PATH, CC).
REMOVED = (
    # libraries that tests use: caches, endpoints, offline mode, tokens, logging
    "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_", "TIMM_", "FSSPEC_",
    "WDS_", "WEBDATASET_", "WANDB_", "TENSORBOARD_", "MLFLOW_", "TQDM_", "AWS_", "GOOGLE_APPLICATION_", "NLTK_", "PIP_",
    # torch and the devices it sees
    "PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "TRITON_", "NCCL_", "GLOO_", "HCCL_", "TP_SOCKET_",
    "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR", "ASCEND_RT_VISIBLE_DEVICES",
    "ASCEND_VISIBLE_DEVICES", "ASCEND_LAUNCH_BLOCKING", "ASCEND_GLOBAL_", "ASCEND_SLOG_", "ACL_DEVICE_SYNC_TIMEOUT",
    "CUBLAS_WORKSPACE_CONFIG",
    # launchers of several processes
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM_", "SLURMD_", "SRUN_", "OMPI_", "PMI_", "PMIX_", "MPI_", "MV2_",
    "I_MPI_", "HOROVOD_", "DEEPSPEED_", "ACCELERATE_", "FSDP_",
    # this package
    "OPEN_CLIP_",
    # threads: sums depend on their number
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "VECLIB_",
    # how output looks, and in what language and time zone
    "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "PY_COLORS", "LC_", "LANGUAGE", "TZ",
    # proxies: tests run servers on 127.0.0.1
    "HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY",
    # where files are looked for and kept
    "XDG_",
    # the interpreter of the processes that tests start
    "PYTHONWARNINGS", "PYTHONOPTIMIZE", "PYTHONHASHSEED", "PYTHONIOENCODING", "PYTHONUTF8", "PYTHONSAFEPATH",
    "PYTHONDEVMODE", "PYTHONINSPECT", "PYTHONSTARTUP", "PYTHONFAULTHANDLER", "PYTHONTRACEMALLOC",
)  # fmt: skip


def isolate() -> None:
    """Remove and set what the results of the suite depend on."""
    for name in list(os.environ):
        if name.upper().startswith(REMOVED):
            del os.environ[name]
    os.environ.update(OMP_NUM_THREADS="1", LANG="C.UTF-8", TZ="UTC")
    # Packages of the user's site folder are found through HOME, unless it is named.
    os.environ.setdefault("PYTHONUSERBASE", site.getuserbase())
    home = tempfile.mkdtemp(prefix="open-clip-tests-home-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ["HOME"] = home
    os.umask(0o022)


def reset_warnings() -> None:
    """Forget the filters of PYTHONWARNINGS."""
    if sys.warnoptions:
        sys.warnoptions.clear()
        warnings.resetwarnings()


isolate()


def pytest_sessionstart() -> None:
    # Not earlier: paths among pytest's options are relative to where it was started, and while conftest files are
    # loaded pytest keeps the filters to restore them.
    os.chdir(ROOT)
    reset_warnings()


# What old versions of libraries cannot do, by the error: (library, first version that can, what).
NEEDED = {
    "timm has no such optimizer": ("timm", "1.0.21", "timm/muon"),
    "Image towers for any size (NaFlex) need timm": ("timm", "1.0.31", "NaFlexVit"),
    "cannot run --fsdp on the CPU": ("torch", "2.7", "FSDP2 on the CPU"),
    "'Stream' object has no attribute 'record_event'": ("torch", "2.7", "FSDP2 on the CPU"),
    "fully_shard() got an unexpected keyword argument 'ignored_params'": (
        "torch",
        "2.7",
        "FSDP2 without some parameters",
    ),
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    with skipped_on_old_versions():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    with skipped_on_old_versions():
        return (yield)


@contextlib.contextmanager
def skipped_on_old_versions() -> Iterator[None]:
    """Skip a test that fails because an installed library is too old for what it tests."""
    try:
        yield
    except Exception as error:
        for text, needed in NEEDED.items():
            if text in str(error):
                from versions import require

                require(*needed)
        raise
