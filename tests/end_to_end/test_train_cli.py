"""The training command as a user types it, on small real images, in processes of its own."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from processes import environment
from train_runs import (
    command,
    results,
    run,
    scalars,
    weights,
    write_classes,
    write_csv,
    write_model,
    write_shards,
)


class Inputs(NamedTuple):
    model: str
    csv: Path
    shards: str
    classes: Path
    logs: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("train_cli")
    return Inputs(
        write_model(folder / "model"),
        write_csv(folder / "csv", 24),
        write_shards(folder / "shards", 3, 8),
        write_classes(folder / "classes", 3),
        folder / "logs",
    )


def options(inputs: Inputs, name: str, *more: object) -> list[object]:
    """What all runs here have in common: 3 epochs of 6 steps of 4 samples, with random crops and patch dropout."""
    return [
        "--model", inputs.model, "--batch-size", 4, "--epochs", 3, "--warmup", 4, "--lr", 1e-2, "--device", "cpu",
        "--force-patch-dropout", 0.5, "--aug-cfg", "scale=(0.3,1.0)", "--report-to", "tensorboard",
        "--log-every-n-steps", 1, "--output-dir", inputs.logs, "--name", name, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(inputs: Inputs) -> Path:
    """A run of 3 epochs with workers, validation and zero-shot evaluation."""
    run(
        *options(inputs, "unbroken", "--train-data", inputs.csv, "--workers", 2, "--save-most-recent"),
        *("--val-data", inputs.csv, "--zeroshot-data", inputs.classes, "--zeroshot-frequency", 2),
    )
    return inputs.logs / "unbroken"


def test_a_run_leaves_logs_numbers_and_checkpoints(unbroken):
    names = {path.name for path in (unbroken / "checkpoints").iterdir()}
    assert names == {"epoch_1.pt", "epoch_2.pt", "epoch_3.pt", "epoch_latest.pt", "results.jsonl"}
    log = (unbroken / "out.log").read_text()
    for part in ("Train Epoch: 2 [24/24 (100%)]", "/s/device", "Logit Scale:", "Memory:", "Eval Epoch: 3"):
        assert part in log
    assert "precision: fp32\n" in (unbroken / "params.txt").read_text()

    numbers = scalars(unbroken)
    for name in ("loss", "contrastive_loss", "data_time", "batch_time", "samples_per_second", "scale", "lr"):
        assert sorted(numbers[f"train/{name}"]) == list(range(18))
    assert sorted(numbers["train/samples_per_second_per_gpu"]) == list(range(18))
    assert sorted(numbers["val/clip_val_loss"]) == [1, 2, 3]
    assert numbers["train/lr"][3] == pytest.approx(1e-2)

    lines = results(unbroken)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(0 <= line["image_to_text_R@1"] <= 1 for line in lines)
    # Zero-shot every second epoch, and after the last one.
    assert ["zeroshot-top1" in " ".join(line) for line in lines] == [False, True, True]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(inputs, unbroken, workers):
    name = f"resumed-{workers}"
    run(
        *options(inputs, name, "--train-data", inputs.csv, "--workers", workers),
        *("--resume", unbroken / "checkpoints/epoch_2.pt"),
    )
    expected, found = scalars(unbroken)["train/loss"], scalars(inputs.logs / name)["train/loss"]
    assert found == {step: expected[step] for step in range(12, 18)}
    for key, value in weights(unbroken, "epoch_3.pt").items():
        assert torch.equal(weights(inputs.logs / name, "epoch_3.pt")[key], value), key


def test_two_processes_with_accumulation_train_like_one_with_the_same_global_batch(inputs):
    """1 x 8 samples, and 2 processes x 2 batches x 2.

    Without patch dropout, which draws on each process for itself; with a large eps, as AdamW makes the rounding errors
    of gradients that are 0 (those of the keys' biases) as large as any.
    """
    shared = ["--train-data", inputs.csv, "--workers", 0, "--force-patch-dropout", 0.0, "--eps", 1e-3, "--epochs", 2]
    run(*options(inputs, "one", *shared, "--batch-size", 8))
    linked = ["--local-loss", "--gather-with-grad", "--dist-backend", "gloo", "--val-data", inputs.csv]
    run(*options(inputs, "two", *shared, *linked, "--batch-size", 2, "--accum-freq", 2), ranks=2)
    one, two = inputs.logs / "one", inputs.logs / "two"
    assert sorted(scalars(two)["train/loss"]) == list(range(6))
    found = weights(two, "epoch_2.pt")
    for key, value in weights(one, "epoch_2.pt").items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    log = (two / "out.log").read_text()
    assert "2 x cpu" in log
    assert log.count("Start epoch 0") == 1, "the master alone writes"
    assert [line["num_samples"] for line in results(two)] == [24, 24], "every sample once, whatever the ranks"


def test_shards_train_and_a_checkpoint_is_evaluated_alone(inputs):
    run(*options(inputs, "shards", "--train-data", inputs.shards, "--workers", 1, "--epochs", 1))
    folder = inputs.logs / "shards"
    assert sorted(scalars(folder)["train/loss"]) == list(range(6))

    run(
        *options(inputs, "evaluated", "--val-data", inputs.shards, "--zeroshot-data", inputs.classes, "--workers", 0),
        *("--resume", folder / "checkpoints/epoch_1.pt", "--val-num-samples", 24),
    )
    (line,) = results(inputs.logs / "evaluated")
    assert line["epoch"] == 1
    assert line["num_samples"] == 24
    assert any(name.endswith("top1") for name in line), "whatever --zeroshot-frequency says"
    assert not list((inputs.logs / "evaluated" / "checkpoints").glob("*.pt"))


def test_towers_of_timm_and_resnets_train_at_another_size_in_part_and_recomputing(inputs, tmp_path):
    towers = {
        "timm": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "mlp", "image_size": 160},
        "resnet": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 96},
    }
    for name, vision_cfg in towers.items():
        model = write_model(tmp_path / name, vision_cfg=vision_cfg)
        shared = ["--train-data", inputs.csv, "--workers", 0, "--epochs", 1, "--force-patch-dropout", 0.0]
        run(
            *options(inputs, name, *shared, "--model", model, "--force-image-size", 64, "--grad-checkpointing"),
            *("--lock-image", "--lock-image-unlocked-groups", 2, "--lock-image-freeze-bn-stats"),
        )
        folder = inputs.logs / name
        losses = scalars(folder)["train/loss"]
        assert sorted(losses) == list(range(6))
        assert all(0 < loss < 10 for loss in losses.values())
        run(
            *options(inputs, f"{name}-evaluated", "--val-data", inputs.csv, "--workers", 0, "--model", model),
            *("--force-image-size", 64, "--pretrained", folder / "checkpoints/epoch_1.pt"),
        )
        (line,) = results(inputs.logs / f"{name}-evaluated")
        assert line["num_samples"] == 24


def test_an_error_on_two_processes_ends_both(inputs):
    printed = run(
        *options(inputs, "missing-2", "--train-data", "nowhere.csv", "--dist-backend", "gloo"), ranks=2, status=1
    )
    assert "nowhere.csv" in printed


def test_ctrl_c_ends_the_run_and_says_how_to_go_on(inputs):
    endless = ["--dataset-type", "synthetic", "--train-num-samples", 100_000, "--workers", 1]
    process = subprocess.Popen(
        command(*options(inputs, "interrupted", *endless)), env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    log = inputs.logs / "interrupted" / "out.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and "Train Epoch" in log.read_text()):
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "--resume latest" in log.read_text().splitlines()[-1]
