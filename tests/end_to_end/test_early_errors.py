"""On two processes: what would fail late fails before the first step, on both, and warnings come once."""

from __future__ import annotations

import pytest

from train_runs import run, write_csv, write_model


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("early")
    csv = write_csv(folder / "csv", 24)
    (folder / "bad.csv").write_text("filepath\ttitle\n" + "".join(f"no{number}.png\tx\n" for number in range(9)))
    return [
        "--model", write_model(folder / "model"), "--train-data", csv, "--batch-size", 4, "--epochs", 1, "--workers", 1,
        "--device", "cpu", "--output-dir", folder / "logs",
    ]  # fmt: skip


def test_an_evaluation_set_without_usable_samples(options):
    bad = options[3].parents[1] / "bad.csv"
    printed = run(*options, "--name", "bad", "--val-data", bad, "--warmup", 1, ranks=2, status=1)
    assert "bad.csv: not one usable sample" in printed
    assert "Train Epoch" not in printed


def test_options_that_cannot_be(options):
    printed = run(*options, "--name", "missing", "--zeroshot-data", "nowhere", ranks=2, status=1)
    assert "--zeroshot-data nowhere: no such folder" in printed
    assert "parameters" not in printed, "no model was built"


def test_warnings_are_the_first_rank_s(options):
    printed = run(*options, "--name", "warned", "--val-data", options[3], "--lock-image", "--lock-text", ranks=2)
    assert printed.count("--warmup 10000 is more than the run's 3 steps") == 1
    assert printed.count("--lock-image and --lock-text freeze both towers") == 1
    assert printed.count("has no pretrained weights") == 1
    assert printed.count("Waiting for all of them") == 1
    assert printed.count("Eval Epoch: 1 ") == 1
