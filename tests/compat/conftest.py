"""Programs in the style of third parties. They run here and on open_clip_torch 3.3.0 (`make test-compat`).

Files in this folder import only what both packages have: `open_clip`, `open_clip_train`, torch, torchvision, and what
such programs use besides. They import nothing of this repository's other tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import open_clip
import open_clip.factory

IS_PEER = "npu" not in open_clip.__version__

# Four layers and heads of 64 channels, as third-party code expects; small enough for a test.
TINY = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 192, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}


# Read before any test runs, because other tests replace the list for a while.
CONFIG_PATHS = open_clip.factory._MODEL_CONFIG_PATHS


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ours_only(reason): open_clip_torch 3.3.0 cannot do this, or does it wrong")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("ours_only")
        if marker and IS_PEER:
            item.add_marker(pytest.mark.skip(reason=marker.args[0]))


@pytest.fixture(scope="module")
def tiny_name(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a small architecture, registered while a file's tests run."""
    path = tmp_path_factory.mktemp("configs") / "compat-tiny.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    open_clip.add_model_config(path)
    yield path.stem
    CONFIG_PATHS.remove(path)
    del open_clip.factory._MODEL_CONFIGS[path.stem]


@pytest.fixture
def model(tiny_name: str) -> torch.nn.Module:
    """A CLIP with random weights, the same in every test, in evaluation mode."""
    torch.manual_seed(0)
    return open_clip.create_model(tiny_name).eval()


@pytest.fixture
def images() -> torch.Tensor:
    """float32 [3, 3, 64, 64]"""
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def texts(tiny_name: str) -> torch.Tensor:
    """int64 [3, 77]"""
    return open_clip.get_tokenizer(tiny_name)(["a dog", "two cats on a mat", "a"])


@pytest.fixture
def weights(model: torch.nn.Module, tmp_path: Path) -> Path:
    """The state dict of `model`, saved with torch.save."""
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    return path
