"""The export command as a user types it, and the documentation's script on what it wrote."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import open_clip
import processes
import train_runs


def test_the_documented_commands(tmp_path: Path) -> None:
    model_name = train_runs.write_model(tmp_path / "model")
    torch.manual_seed(3)
    model, _, preprocess = open_clip.create_model_and_transforms(model_name)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    printed = processes.run(
        [sys.executable, "-m", "open_clip.export", "--model", model_name, "--pretrained", tmp_path / "weights.pt",
         "--output", "exported", "--normalize"],
        tmp_path,
    )  # fmt: skip
    assert "image tower: largest difference" in printed
    assert "Wrote to exported: export.onnx.json, image.onnx, text.onnx." in printed
    assert "Traceback" not in printed

    (script,) = re.findall(r"```python\n(.*?)```", (processes.ROOT / "docs/export.md").read_text(), flags=re.DOTALL)
    (tmp_path / "script.py").write_text(script)
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(tmp_path / "photo.jpg")
    found = ast.literal_eval(processes.run([sys.executable, "script.py"], tmp_path).splitlines()[-1])

    tokens = open_clip.get_tokenizer(model_name)(list(found))
    with torch.no_grad():
        logits, _ = model.eval().get_logits(preprocess(Image.open(tmp_path / "photo.jpg"))[None], tokens)
    assert list(found.values()) == pytest.approx(logits.softmax(dim=1)[0].tolist(), abs=2e-3)
    assert max(found.values()) - min(found.values()) > 0.02  # or a graph that forgets its input would do


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    printed = processes.run([sys.executable, "-m", "open_clip.export", "--model", "ViT-B-32", "--output", "exported"],
                            tmp_path, status=1)  # fmt: skip
    assert "has no weights, and the caller requires them" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "exported").exists()
