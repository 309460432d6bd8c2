"""Write the pip constraint files of this folder: the releases of torch, torchvision and torch_npu that work together.

    python constraints/write.py            write them
    python constraints/write.py --check    exit with 1 if a file is not what this script writes

`cann-9.0.txt` pins the newest torch_npu for CANN 9.0. `torch-2.9.0.txt` pins torch 2.9.0 and leaves the `.postN` of
torch_npu 2.9.0 open, because it depends on CANN. To add a release, add it to a table below.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# The newest torch_npu for each CANN, from COMPATIBILITY.md in gitcode.com/Ascend/pytorch. It has no line for torch_npu
# 2.13 and 2.14 yet.
CANN = {
    "8.2": "2.6.0",
    "8.3": "2.8.0",
    "8.5": "2.9.0",
    "9.0": "2.10.0",
    "9.1": "2.12.0.post2",
}

# The releases of torch that torch_npu has wheels for, from the package index.
TORCH = ("2.6.0", "2.7.1", "2.8.0", "2.9.0", "2.9.1", "2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.0")


def load_torch_versions():
    """Load src/open_clip/torch_versions.py without the package, which needs torch."""
    spec = importlib.util.spec_from_file_location("torch_versions", HERE.parent / "src/open_clip/torch_versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files() -> dict[str, str]:
    """Name of each constraint file and its text."""
    torch_versions = load_torch_versions()
    found = {}
    for cann, torch_npu in CANN.items():
        torch = torch_versions.release(torch_npu)
        comment = f"# CANN {cann}. Written by constraints/write.py."
        found[f"cann-{cann}.txt"] = pins(comment, torch, torch_versions.torchvision_for(torch), torch_npu)
    for torch in TORCH:
        comment = f"# torch {torch}, with the .postN of torch_npu that CANN needs. Written by constraints/write.py."
        found[f"torch-{torch}.txt"] = pins(comment, torch, torch_versions.torchvision_for(torch), f"{torch}.*")
    return found


def pins(comment: str, torch: str, torchvision: str, torch_npu: str) -> str:
    return f"{comment}\ntorch=={torch}\ntorchvision=={torchvision}\ntorch_npu=={torch_npu}\n"


def main() -> int:
    wanted = files()
    there = {path.name: path.read_text(encoding="utf-8") for path in HERE.glob("*.txt")}
    if "--check" in sys.argv[1:]:
        wrong = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
        if wrong:
            print(f"{', '.join(wrong)}: not what constraints/write.py writes. Run it.")
        return bool(wrong)
    for name in there.keys() - wanted.keys():
        (HERE / name).unlink()
    for name, text in wanted.items():
        (HERE / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
