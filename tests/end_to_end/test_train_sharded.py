"""The training command with --fsdp, in processes of its own."""

from __future__ import annotations

import pytest
import torch

import train_runs


def test_a_sharded_run_on_two_processes_equals_ddp_and_resumes(tmp_path):
    model = train_runs.write_model(tmp_path / "model")
    csv = train_runs.write_csv(tmp_path / "data", 24)
    classes = train_runs.write_classes(tmp_path / "classes", 1)  # 4 images: one batch for one of the processes
    options = (
        *("--model", model, "--train-data", csv, "--val-data", csv, "--zeroshot-data", classes, "--device", "cpu"),
        *("--output-dir", tmp_path / "logs", "--workers", 0, "--lr", 1e-3, "--warmup", 1, "--epochs", 2),
        *("--local-loss", "--gather-with-grad", "--ema-decay", 0.9, "--eps", 1e-4),
    )
    sharded = (*options, "--name", "sharded", "--batch-size", 4, "--fsdp")
    printed = train_runs.run(*sharded, ranks=2)
    assert "--fsdp: 2 shards" in printed
    train_runs.run(*options, "--name", "ddp", "--batch-size", 4, ranks=2)
    logs = tmp_path / "logs"
    weights, expected = (train_runs.weights(logs / name, "epoch_2.pt") for name in ("sharded", "ddp"))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
    for key, value in train_runs.results(logs / "ddp")[-1].items():
        assert train_runs.results(logs / "sharded")[-1][key] == pytest.approx(value, abs=1e-3), key
    (logs / "sharded" / "checkpoints" / "epoch_2.pt").unlink()
    assert "Resumed from" in train_runs.run(*sharded, "--resume", "latest", ranks=2)
    again = train_runs.weights(logs / "sharded", "epoch_2.pt")
    assert all(torch.equal(again[name], value) for name, value in weights.items())
