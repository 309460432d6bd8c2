"""The flags that docs/scale.md recommends, in 8 processes."""

from __future__ import annotations

import pytest
import torch

import train_runs


@pytest.mark.slow
@pytest.mark.parametrize("loss", [("--local-loss", "--gather-with-grad"), ("--siglip",)], ids=lambda loss: loss[0])
def test_eight_processes_train_save_and_resume(loss, tmp_path):
    options = (
        "--model", train_runs.write_model(tmp_path / "model"), "--dataset-type", "synthetic", "--workers", 0,
        "--train-num-samples", 64, "--batch-size", 4, "--warmup", 1, "--seed", 1, *loss,
        "--grad-checkpointing", "--precision", "amp_bf16", "--grad-clip-norm", 1, "--dist-timeout", 120,
        "--output-dir", tmp_path, "--name", "run", "--resume", "latest",
        "--save-every-n-steps", 1, "--keep-last", 1,
    )  # fmt: skip
    train_runs.run(*options, "--epochs", 1, ranks=8)
    printed = train_runs.run(*options, "--epochs", 2, ranks=8)
    assert "epoch_1.pt" in printed
    first, second = (train_runs.weights(tmp_path / "run", f"epoch_{number}.pt") for number in (1, 2))
    assert all(value.isfinite().all() for value in second.values())
    assert not torch.equal(first["visual.conv1.weight"], second["visual.conv1.weight"])
