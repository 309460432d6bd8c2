"""The files of examples/: their syntax, and the options that they pass to training.main and torchrun."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from training.params import parse_args

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted([*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("*.sbatch")])
MANIFESTS = sorted(EXAMPLES.glob("*.yaml"))


def documents(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def pods(path: Path) -> dict[str, dict]:
    """Return the specification of each kind of pod of a job."""
    (job,) = documents(path)
    replicas = job["spec"].get("pytorchReplicaSpecs") or job["spec"]["replicaSpecs"]
    return {kind: replica["template"]["spec"] for kind, replica in replicas.items()}


def scripts_of(path: Path) -> list[str]:
    """Return the shell scripts in a file."""
    if path.suffix != ".yaml":
        return [path.read_text(encoding="utf-8")]
    return [container["args"][0] for pod in pods(path).values() for container in pod["containers"]]


def words_of(script: str) -> tuple[list[str], list[str]]:
    """Return the words before and after `-m training.main` of the command that trains."""
    joined = script.replace("\\\n", " ")
    (line,) = (line for line in joined.splitlines() if "-m training.main" in line and not line.startswith("#"))
    for name, value in {"HOST0": "host0", "RANK": "1", "SHARED": "/shared", "MASTER_PORT": "2222"}.items():
        line = re.sub(rf"\${name}\b", value, line)
    launcher, _, options = line.partition("-m training.main")
    return shlex.split(launcher), shlex.split(options)


def test_every_kind_of_launcher_has_an_example():
    names = {path.name for path in SCRIPTS + MANIFESTS}
    assert names == {
        "torchrun.sh", "slurm_cuda.sbatch", "slurm_ascend.sbatch",
        "pytorchjob_cuda.yaml", "pytorchjob_ascend.yaml", "mindcluster.yaml",
    }  # fmt: skip
    listed = re.findall(r"\]\(([a-z_]+\.(?:sh|sbatch|yaml))\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert set(listed) == names


@pytest.mark.parametrize("path", SCRIPTS + MANIFESTS, ids=lambda path: path.name)
def test_scripts_are_valid_shell(path):
    for script in scripts_of(path):
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("path", SCRIPTS + MANIFESTS, ids=lambda path: path.name)
def test_the_options_exist_and_let_a_run_continue(path):
    for script in scripts_of(path):
        launcher, options = words_of(script)
        args = parse_args(options)
        assert args.resume == "latest"
        assert args.name
        assert args.save_every_n_steps > 0
        assert args.logs.startswith("/shared/")
        assert args.local_loss
        assert args.gather_with_grad
        assert (args.dist_backend, args.device) == (("hccl", "npu") if is_ascend(path) else (None, "auto"))
        if "torchrun" in launcher:
            known = get_args_parser().parse_args([*launcher[launcher.index("torchrun") + 1 :], "script"])
            assert (known.nnodes, known.nproc_per_node) == ("2", "8")
        else:
            assert launcher[:1] == ["srun"]
            assert "--kill-on-bad-exit=0" in launcher  # rank 0 saves after the others have ended


def is_ascend(path: Path) -> bool:
    return path.stem.endswith("ascend") or path.stem == "mindcluster"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_pods_have_devices_storage_and_time_to_save(path):
    (job,) = documents(path)
    assert job["metadata"]["name"]
    for kind, pod in pods(path).items():
        assert kind in ("Master", "Worker")
        (container,) = pod["containers"]
        resource = "huawei.com/Ascend910" if is_ascend(path) else "nvidia.com/gpu"
        assert container["resources"]["limits"][resource] == 8
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert pod["terminationGracePeriodSeconds"] > int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 300
        assert "exec torchrun" in container["args"][0]  # so that torchrun gets the signal
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_slurm_signals_the_ranks_and_requeues(path):
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^#SBATCH --signal=USR1@\d+$", text, re.MULTILINE)
    assert re.search(r"^#SBATCH --requeue$", text, re.MULTILINE)
    assert "-eq 143" in text  # training.signals.EXIT_STATUS
    assert "set -e" not in text  # the status is read after srun
