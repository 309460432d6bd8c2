"""Runs open_clip_torch 3.3.0's own tests on this package, unedited.

    python tests/compat/run_upstream_tests.py             # on src
    python tests/compat/run_upstream_tests.py --peer      # on open_clip_torch 3.3.0 (after `make peer`), slowly
    python tests/compat/run_upstream_tests.py -k wds      # further arguments go to pytest

pip fetches the source distribution into .peer_tests, and `requests`, which one of the tests imports. Its tests are
unpacked to a temporary folder, where they also write. `NOT_RUN` lists the tests that need a network or absent data. The
exit status is 1 if any other test fails, or if a name in `NOT_RUN` is not that of a test.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from compare import PEER, ROOT

FOLDER = ROOT / ".peer_tests"
SOURCE = "open_clip_torch-3.3.0"
SHA256 = "904b1a9f909df8281bb3de60ab95491cd2994a509177ea4f9d6292a84fe24d6d"

_HUB_CONFIG = "the test reads the model's configuration from the hub"
_HUB_WEIGHTS = "the test compares probabilities of published weights, and its picture is not in the distribution"
# Test, or file with all its tests: why it is not run.
NOT_RUN = {
    "test_inference.py": "every test compares with recorded outputs that are not in the distribution",
    "test_download_pretrained.py::DownloadPretrainedTests::test_download_pretrained_from_hfh": "a model from the hub",
    "test_hf_model.py::test_pretrained_text_encoder[arampacha/roberta-tiny]": _HUB_CONFIG,
    "test_hf_model.py::test_pretrained_text_encoder[roberta-base]": _HUB_CONFIG,
    "test_hf_model.py::test_pretrained_text_encoder[xlm-roberta-base]": _HUB_CONFIG,
    "test_hf_model.py::test_pretrained_text_encoder[google/mt5-base]": _HUB_CONFIG,
    "test_inference_simple.py::test_inference_simple[ViT-B-32-laion2b_s34b_b79k-False-False]": _HUB_WEIGHTS,
    "test_inference_simple.py::test_inference_simple[ViT-B-32-laion2b_s34b_b79k-True-False]": _HUB_WEIGHTS,
    "test_inference_simple.py::test_inference_simple[ViT-B-32-laion2b_s34b_b79k-True-True]": _HUB_WEIGHTS,
    "test_inference_simple.py::test_inference_simple[roberta-ViT-B-32-laion2b_s12b_b32k-False-False]": _HUB_WEIGHTS,
    "test_training_simple.py::test_training_mt5": "the tokenizer of google/mt5-base is on the hub",
}


def fetch() -> Path:
    """Download the source distribution and `requests`, unless they are there. Return the distribution's path."""
    archive = FOLDER / f"{SOURCE}.tar.gz"
    if not archive.is_file():
        _pip("download", "--no-deps", "--no-binary", ":all:", "--dest", str(FOLDER), "open_clip_torch==3.3.0")
    if not (FOLDER / "packages/requests").is_dir():
        _pip("install", "--target", str(FOLDER / "packages"), "requests")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{archive} has the SHA-256 {found}, not {SHA256}. Delete it and start again.")
    return archive


def _pip(*arguments: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}
    subprocess.run([sys.executable, "-m", "pip", arguments[0], "--quiet", *arguments[1:]], check=True, env=environment)


def unpack_tests(archive: Path, folder: Path) -> None:
    """Write the regular files of the distribution's tests folder to `folder`, and nothing else."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if member.isfile() and path.parent == PurePosixPath(SOURCE, "tests"):
                content = tar.extractfile(member)
                assert content is not None
                (folder / path.name).write_bytes(content.read())


def main(arguments: list[str]) -> int:
    package = PEER if "--peer" in arguments else ROOT / "src"
    archive = fetch()
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder, "tests")
        tests.mkdir()
        unpack_tests(archive, tests)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(package), str(FOLDER / "packages")]),
            "HF_HUB_OFFLINE": "1",
        }
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", "tests"]

        def run(*more: str, **options: bool) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*pytest, *more], cwd=folder, env=environment, check=False, text=True, **options)

        collected = run("--collect-only", capture_output=True).stdout.splitlines()
        unknown = [name for name in NOT_RUN if not any(test.startswith(f"tests/{name}") for test in collected)]
        deselected = [f"--deselect=tests/{name}" for name in NOT_RUN]
        status = run(*deselected, *(argument for argument in arguments if argument != "--peer")).returncode
    print(f"\nTests of {SOURCE} that are not run:")
    for name, reason in NOT_RUN.items():
        print(f"  {name}: {reason}")
    if unknown:
        print(f"Not the name of a test: {', '.join(unknown)}")
    return int(status != 0 or bool(unknown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
