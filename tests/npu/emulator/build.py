"""Builds the emulated CANN for the torch and torch_npu of this interpreter, and installs it beside torch_npu.

    python build.py            build and install
    python build.py --check    only look whether this machine can build it

About half a minute, one compiler at a time. The libraries go to site-packages/torch_npu.libs/, where the wheel's own
RPATH looks: programs need no LD_LIBRARY_PATH and no change. What was built from the same sources is not built again.
"""

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
WARNINGS = ("-Wall", "-Wextra")
SOURCES = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h"), *HERE.glob("*.txt"), *HERE.glob("*.py")])
# The newest torch whose CUDA build was tried and does not make its torch_npu abort.
NEWEST_OVER_CUDA = (2, 9)
# torch_npu links to these; all they are asked for is in libascendcl.
EMPTY_COMPANIONS = ("acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")


def version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"{distribution} is not installed in {sys.prefix}: `make test-npu` makes an environment that has it.")


def check_machine() -> None:
    """Says what is missing for the build and how to mend it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        here = f"{sys.platform} on {platform.machine()}"
        sys.exit(f"The emulated CANN is made for Linux on x86-64, and this is {here}: run the NPU tests there.")
    if sys.version_info < (3, 11):
        sys.exit(f"The NPU tests need Python 3.11 or later and this is {platform.python_version()}: set PYTHON=.")
    for tool in ("g++", "gcc", "nm"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is needed to build the emulated CANN and is not there: install gcc, g++ and binutils.")


def find_torch() -> Path:
    """Returns site-packages; what is there must match."""
    torch, torch_npu = version_of("torch"), version_of("torch-npu")
    if torch.split(".")[:2] != torch_npu.split(".")[:2]:
        sys.exit(f"torch {torch} and torch-npu {torch_npu} do not match: their first two numbers must be the same.")
    site_packages = Path(str(importlib.metadata.distribution("torch").locate_file(".")))
    is_cuda_build = (site_packages / "torch/lib/libtorch_cuda.so").exists()
    if is_cuda_build and tuple(map(int, torch.split(".")[:2])) > NEWEST_OVER_CUDA:
        sys.exit(f"torch {torch} is a CUDA build, over which its torch_npu aborts: install the CPU build of torch.")
    return site_packages


def run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"Failed: {' '.join(map(str, command))}\n{done.stderr}")
    sys.stderr.write(done.stderr)  # warnings


def build(folder: Path, site_packages: Path) -> list[Path]:
    """Compiles everything into `folder`; returns the libraries."""
    torch = site_packages / "torch"
    shared = ["g++", "-shared", "-Wl,-rpath,$ORIGIN", f"-L{folder}"]

    def library(name: str) -> Path:
        return folder / f"lib{name}.so"

    def link(name: str, *inputs: object) -> None:
        run(*shared, f"-Wl,-soname,lib{name}.so", "-o", library(name), *inputs)

    print("Building the runtime ...", flush=True)
    run("g++", "-O1", "-fPIC", "-std=c++17", *WARNINGS, "-c", HERE / "runtime.cpp", "-o", folder / "runtime.o")
    stubs = subprocess.run(
        [sys.executable, HERE / "make_stubs.py", HERE / "torch_npu_symbols.txt", folder / "runtime.o"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (folder / "stubs.c").write_text(stubs, encoding="utf-8")
    run("gcc", "-O1", "-fPIC", "-w", "-c", folder / "stubs.c", "-o", folder / "stubs.o")
    link("ascendcl", folder / "runtime.o", folder / "stubs.o", "-lpthread", "-ldl")
    (folder / "empty.c").write_text("", encoding="utf-8")
    for name in EMPTY_COMPANIONS:
        link(name, folder / "empty.c", "-Wl,--no-as-needed", "-lascendcl")

    print("Building the collectives ...", flush=True)
    # With its own std::filesystem: the CUDA build of torch 2.9 exports one that crashes when it is called.
    own_library = ("-static-libstdc++", "-Wl,--exclude-libs,ALL")
    link("hccl", "-O2", "-fPIC", "-std=c++17", *WARNINGS, *own_library, HERE / "collectives.cpp", "-lascendcl")

    objects = []
    for name in ("kernels", "npu_ops"):
        print(f"Building {name} ...", flush=True)
        objects.append(folder / f"{name}.o")
        includes = ["-isystem", torch / "include", "-isystem", torch / "include/torch/csrc/api/include"]
        flags = ("-O1", "-fPIC", "-std=c++20", *WARNINGS, *includes)
        run("g++", *flags, "-c", HERE / f"{name}.cpp", "-o", objects[-1])
    link("opapi", *objects, f"-L{torch}/lib", "-ltorch_cpu", "-lc10", "-lascendcl")
    return [library(name) for name in ("ascendcl", "hccl", "opapi", *EMPTY_COMPANIONS)]


def main() -> None:
    check_machine()
    if "--check" in sys.argv[1:]:
        return
    site_packages = find_torch()
    target = site_packages / "torch_npu.libs"
    digest = hashlib.sha256(version_of("torch").encode())
    for path in SOURCES:
        digest.update(path.read_bytes())
    stamp = target / "emulated_cann.sha256"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == digest.hexdigest():
        print(f"The emulated CANN in {target} is up to date.")
        return
    with tempfile.TemporaryDirectory() as folder:
        libraries = build(Path(folder), site_packages)
        target.mkdir(exist_ok=True)
        for path in libraries:
            shutil.copy(path, target)
    stamp.write_text(digest.hexdigest(), encoding="utf-8")
    print(f"Installed the emulated CANN into {target}.")


if __name__ == "__main__":
    main()
