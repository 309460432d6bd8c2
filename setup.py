"""Packaging. The distribution is called `open_clip_torch`, so that what depends on that is satisfied."""
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    namespace: dict = {}
    exec((ROOT / "src/open_clip/version.py").read_text(encoding="utf-8"), namespace)
    return namespace["__version__"]


def requirements(*names: str) -> list[str]:
    """Lines of requirements.txt for the given packages, so that a version bound is written in one place."""
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
    install_requires=requirements(
        "torch", "torchvision", "ftfy", "regex", "timm", "huggingface_hub", "safetensors", "tqdm"
    ),
    # torch_npu is not an extra: which one is right depends on CANN (requirements-npu.txt).
    extras_require={
        "training": requirements("webdataset", "pandas", "tensorboard", "transformers", "sentencepiece"),
        "export": ["onnx", "onnxruntime", "onnxscript"],
        "demo": ["scikit-learn", "matplotlib"],
        "test": [
            *requirements("pytest", "pytest-timeout", "transformers", "sentencepiece"),
            *("pytest-xdist", "setuptools>=70.1", "scikit-learn", "peft"),
        ],
        "lint": ["ruff", "mypy"],
    },
)
