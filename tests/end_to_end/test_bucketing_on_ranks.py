"""Training with --length-bucketing in several processes."""

from __future__ import annotations

import pytest

import train_runs
from train_runs import run, scalars, write_csv, write_model


def test_two_processes_have_the_losses_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(train_runs, "caption", lambda number: f"{number} picture" + " of" * (number * 5 % 11))
    shared = [
        "--model", write_model(tmp_path / "model"), "--train-data", write_csv(tmp_path / "csv", 80), "--epochs", 1,
        "--warmup", 1, "--lr", 1e-3, "--eps", 1e-3, "--workers", 0, "--device", "cpu", "--log-every-n-steps", 1,
        "--report-to", "tensorboard", "--output-dir", tmp_path / "logs", "--length-bucketing", "--bucket-pool", 40,
    ]  # fmt: skip
    run(*shared, "--name", "one", "--batch-size", 8)
    linked = ["--gather-with-grad", "--dist-backend", "gloo"]
    run(*shared, *linked, "--name", "two", "--batch-size", 4, ranks=2)
    one, two = (scalars(tmp_path / "logs" / name)["train/loss"] for name in ("one", "two"))
    assert sorted(one) == list(range(10))
    assert two == pytest.approx(one, rel=1e-4)
