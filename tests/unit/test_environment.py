"""The suite's conftest.py makes the environment the same for every caller."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HOSTILE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": "/nonexistent",
    "TRANSFORMERS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "ASCEND_RT_VISIBLE_DEVICES": "7",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "10.255.255.1",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "PMI_SIZE": "3",
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",
    "TORCH_LOGS": "+dynamo",
    "XDG_CACHE_HOME": "/nonexistent",
    "WDS_CACHE": "/nonexistent",
    "COLUMNS": "20",
    "NO_COLOR": "1",
    "LC_ALL": "C",
    "http_proxy": "http://127.0.0.1:9",
    "PYTHONWARNINGS": "error",
    "OMP_NUM_THREADS": "3",
    "HOME": "/nonexistent",
    "LANG": "C",
}
REPORT = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
os.umask(0o077)
import conftest
mask = os.umask(0)
print(json.dumps({"environment": dict(os.environ), "umask": mask}))
"""


def test_a_hostile_environment_is_removed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPORT, str(Path(__file__).parents[1])],
        env={**os.environ, **HOSTILE, "ASCEND_HOME_PATH": "/opt/cann"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    left = found["environment"]
    replaced = {"OMP_NUM_THREADS", "HOME", "LANG"}
    assert (HOSTILE.keys() & left.keys()) - replaced == set()
    assert (left["OMP_NUM_THREADS"], left["LANG"]) == ("1", "C.UTF-8")
    assert left["HOME"] != "/nonexistent"
    assert not Path(left["HOME"]).exists()  # removed at exit
    assert left["ASCEND_HOME_PATH"] == "/opt/cann"
    assert found["umask"] == 0o022


def test_warnings_stay_warnings(tmp_path: Path) -> None:
    (tmp_path / "test_warns.py").write_text("import warnings\ndef test(): warnings.warn('only this')\n")
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", str(tmp_path)],
        env={**os.environ, "PYTHONWARNINGS": "error", "PYTHONPATH": str(root / "tests")},
        cwd=tmp_path,
        check=True,
    )


def test_this_process_is_isolated() -> None:
    assert "HF_HUB_OFFLINE" not in os.environ
    assert Path.cwd() == Path(__file__).parents[2]
