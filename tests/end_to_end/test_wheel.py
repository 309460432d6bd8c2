"""A wheel built from the tree and installed elsewhere works: configurations, vocabulary and tables are in it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USE_IT = """
import json, open_clip, training.params, open_clip_train
from importlib.metadata import version
model = open_clip.create_model("ViT-S-32-alt")
print(json.dumps({
    "from": open_clip.__file__,
    "version": version("open_clip_torch"),
    "architectures": len(open_clip.list_models()),
    "pretrained": len(open_clip.list_pretrained()),
    "tokens": open_clip.get_tokenizer("ViT-S-32-alt")(["a dog"])[0, :4].tolist(),
    "classes": len(open_clip.IMAGENET_CLASSNAMES),
    "parameters": sum(p.numel() for p in model.parameters()),
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # A copy, so that building leaves nothing in the tree.
    source = folder / "source"
    source.mkdir()
    for path in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(path, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source], check=True
    )
    (wheel,) = folder.glob("open_clip_torch-3.3.0+npu.*.whl")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def test_wheel_works_away_from_the_tree(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", USE_IT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert Path(seen.pop("from")).is_relative_to(installed)
    assert round(seen.pop("parameters") / 1e6, 2) == 43.22  # as published
    assert seen == {
        "version": "3.3.0+npu.1",
        "architectures": 154,
        "pretrained": 198,
        "tokens": [49406, 320, 1929, 49407],
        "classes": 1000,
    }
