"""Packaging. The distribution is called `open_clip_torch`, so packages that depend on open_clip_torch accept it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    namespace: dict = {}
    exec((ROOT / "src/open_clip/version.py").read_text(encoding="utf-8"), namespace)
    return namespace["__version__"]


def read_requirements(*names: str) -> list[str]:
    """Return the lines of requirements.txt for the given packages, so each version bound is written in one place."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    by_name = {re.split(r"[<>=!~ ]", line)[0]: line for line in lines if line and not line.startswith("#")}
    return [by_name[name] for name in names]


setup(
    name="open_clip_torch",
    version=read_version(),
    description="Contrastive image-text models (CLIP, SigLIP, CoCa) on Ascend NPU, CUDA and CPU",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "NOTICE"],
    keywords="CLIP SigLIP CoCa contrastive image-text Ascend NPU",
    packages=find_packages("src"),
    package_dir={"": "src"},
    package_data={"open_clip": ["model_configs/*.json", "*.json", "*.txt.gz"]},
    python_requires=">=3.10",
    install_requires=read_requirements(
        "torch", "torchvision", "ftfy", "regex", "timm", "huggingface_hub", "safetensors", "tqdm"
    ),
    # torch_npu is not an extra, because its version depends on CANN (requirements-npu.txt).
    extras_require={
        "training": read_requirements("webdataset", "pandas", "tensorboard", "transformers", "sentencepiece"),
        "export": ["onnx", "onnxruntime", "onnxscript"],
        "demo": ["scikit-learn", "matplotlib"],
        "test": [
            *read_requirements("pytest", "pytest-timeout", "transformers", "sentencepiece"),
            *("pytest-xdist", "setuptools>=70.1", "scikit-learn", "peft"),
        ],
        "lint": ["ruff", "mypy"],
    },
)
