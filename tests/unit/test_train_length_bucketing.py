"""Training with --length-bucketing: resumed within an epoch bit for bit, with accumulation, under its checks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import train_runs
from train_runs import scalars, weights, write_csv, write_model, write_shards
from training import main, params, ranks

SAMPLES = 48


class Inputs(NamedTuple):
    model: str
    csv: Path
    shards: str


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("bucketing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_runs, "caption", lambda number: f"{number} picture" + " of" * (number * 5 % 11))
        return Inputs(
            write_model(folder / "model"),
            write_csv(folder / "csv", SAMPLES),
            write_shards(folder / "shards", 4, SAMPLES // 4),
        )


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    """Pools of 24 samples: an epoch ends in its second pool, or in its second block of a reader."""
    monkeypatch.setattr("training.data.bucketing._LEAST_BATCHES", 2)
    monkeypatch.setattr("training.data.shards.reader.BLOCK_SAMPLES", 12)


@pytest.fixture(autouse=True)
def quiet_afterwards():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], root.level = before[0], before[1]
    ranks.shutdown()


def train(inputs: Inputs, logs: Path, *more: object) -> Path:
    """Train 2 epochs with random crops, and save after each second step."""
    main.main(list(map(str, [
        "--model", inputs.model, "--batch-size", 4, "--epochs", 2, "--warmup", 1, "--device", "cpu",
        "--aug-cfg", "scale=(0.3,1.0)", "--log-every-n-steps", 1, "--report-to", "tensorboard",
        "--output-dir", logs, "--name", "run", "--save-every-n-steps", 2, "--keep-last", 50,
        "--length-bucketing", "--bucket-pool", 16, *more,
    ])))  # fmt: skip
    return logs / "run"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["csv", "shards"])
def test_a_run_resumed_within_an_epoch_is_the_unbroken_one_bit_for_bit(inputs, tmp_path, kind, workers):
    options = ["--train-data", inputs.csv if kind == "csv" else inputs.shards, "--workers", workers]
    unbroken = train(inputs, tmp_path / "unbroken", *options)
    expected = scalars(unbroken)["train/loss"]
    assert sorted(expected) == list(range(24))
    for checkpoint, step in (("epoch_0_step_2.pt", 2), ("epoch_1_step_22.pt", 22)):
        resumed = train(inputs, tmp_path / checkpoint, *options, "--resume", unbroken / "checkpoints" / checkpoint)
        assert scalars(resumed)["train/loss"] == {number: expected[number] for number in range(step, 24)}
        found = weights(resumed, "epoch_2.pt")
        for key, value in weights(unbroken, "epoch_2.pt").items():
            assert torch.equal(found[key], value), key


def test_a_step_of_several_batches_is_resumed(inputs, tmp_path):
    options = ["--train-data", inputs.csv, "--workers", 0, "--accum-freq", 3]
    unbroken = train(inputs, tmp_path / "unbroken", *options)
    expected = scalars(unbroken)["train/loss"]
    assert sorted(expected) == list(range(8))
    resumed = train(inputs, tmp_path / "resumed", *options, "--resume", unbroken / "checkpoints/epoch_0_step_2.pt")
    assert scalars(resumed)["train/loss"] == {number: expected[number] for number in range(2, 8)}


def test_a_run_with_main_s_defaults_is_resumed_with_another_batch_size(inputs, tmp_path):
    """--like-4 sets --naflex-variable-batch, which has no effect on images of one size."""
    options = ["--train-data", inputs.csv, "--workers", 0, "--like-4", "--bucket-chunk", 8]
    unbroken = train(inputs, tmp_path / "unbroken", *options)
    options += ["--log-metric-every-n-steps", 1]
    changed = [*options, "--batch-size", 8, "--resume", unbroken / "checkpoints/epoch_0_step_2.pt"]
    resumed = train(inputs, tmp_path / "resumed", *changed)
    assert sorted(scalars(resumed)["train/loss"]) == list(range(1, 12))  # 8 of 48 samples had been read


# The options


def parsed(*words):
    return params.parse_args(["--train-data", "a.csv", *map(str, words)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bucket-pool", 0], "--bucket-pool must be 1 or more, got 0."),
        (["--bucket-runs", 0], "--bucket-runs must be 1 or more, got 0."),
        (["--bucket-chunk", -1], "--bucket-chunk must be 1 or more, got -1."),
        (["--bucket-runs", 1, "--bucket-chunk", 64, "--bucket-pool", 32], "--bucket-chunk 64 is larger than"),
        (["--bucket-runs", 8, "--batch-size", 4], "--bucket-runs 8 needs a sample of each run in a batch"),
    ],
)
def test_values_that_make_no_sense_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parsed("--length-bucketing", *words)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], []),
        (["--length-bucketing", "--bucket-pool", 64], []),
        (["--length-bucketing", "--bucket-runs", 1, "--bucket-chunk", 64], []),
        (["--bucket-pool", 64], ["--bucket-pool has no effect: there is no --length-bucketing"]),
        (["--length-bucketing", "--bucket-chunk", 64], ["--bucket-chunk has no effect: it belongs to --bucket-runs 1"]),
        (
            ["--length-bucketing", "--bucket-prefetch-pools", 2],
            ["--bucket-prefetch-pools has no effect: workers read the next pool while they decode one"],
        ),
    ],
)
def test_options_without_effect_are_named(words, expected):
    assert params.warnings_for(parsed(*words)) == expected


def test_synthetic_data_have_one_length():
    args = params.parse_args(["--dataset-type", "synthetic", "--length-bucketing"])
    assert params.warnings_for(args) == ["--length-bucketing has no effect: synthetic captions have one length"]
