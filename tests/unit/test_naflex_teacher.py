"""Distillation with images of any shape: what is checked of the teacher before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import open_clip
import train_runs
from training import components
from training.main import main

NAFLEX = ["--use-naflex", "--naflex-seq-lens", "4", "16", "--naflex-max-tokens-per-batch", "64"]
NAFLEX += ["--naflex-batch-divisor", "2"]


@pytest.fixture(params=["csv", "shards"])
def options(request, tmp_path: Path) -> list[str]:
    """Return the options of a run whose teacher reads fewer tokens than the captions may have."""
    student = train_runs.write_model(tmp_path / "student")
    vision = {
        "image_size": 32,
        "timm_model_name": "naflexvit_base_patch16_gap",
        "timm_model_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    }
    text = {**train_runs.MODEL["text_cfg"], "context_length": 8}
    teacher = train_runs.write_model(tmp_path / "teacher", vision_cfg=vision, text_cfg=text)
    torch.save(open_clip.create_model(teacher).state_dict(), tmp_path / "teacher.pt")
    if request.param == "csv":
        data = ["--train-data", str(train_runs.write_csv(tmp_path / "data", 16))]
    else:
        data = ["--train-data", train_runs.write_shards(tmp_path / "data", 2, 8)]
    return [
        *("--model", student, "--distill-model", teacher, "--distill-pretrained", str(tmp_path / "teacher.pt")),
        *("--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--logs", str(tmp_path / "logs")),
        *data,
        *NAFLEX,
    ]


def test_a_teacher_with_a_shorter_context_ends_the_run_at_its_start(options, monkeypatch) -> None:
    monkeypatch.setattr(components, "Trainer", None)  # nothing is built after the check
    with pytest.raises(ValueError, match="captions have up to 16 tokens, and the teacher reads at most 8"):
        main(options)
