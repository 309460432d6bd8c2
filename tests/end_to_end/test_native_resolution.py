"""Training with images of any shape and texts of any length: resume, ranks, packing, evaluation, learning."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib
import io
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

import processes
import train_runs
from open_clip.tokenizer import tiktoken_file
from train_runs import results, run, scalars, weights, write_classes, write_csv, write_model, write_shards
from training import components, main, ranks

SIZES = [(40, 40), (64, 24), (20, 48), (90, 30), (33, 50)]  # of the images, in pixels
SAMPLES = 48
STEPS = 6  # of 16 samples, in two epochs
VISION = {
    "image_size": 32,
    "image_seq_len": 16,
    "timm_model_name": "naflexvit_base_patch16_map",
    "timm_pool": "map",
    "timm_model_kwargs": {
        "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "pos_embed_grid_size": [4, 4],
    },
}  # fmt: skip
NAFLEX = ["--use-naflex", "--naflex-seq-lens", 4, 9, 16, "--naflex-max-tokens-per-batch", 64]
NAFLEX += ["--naflex-batch-divisor", 4]
TWO_PATCH_SIZES = ["--naflex-patch-sizes", 8, 6, "--naflex-patch-size-probs", 2, 1]
LARGE_EPS = ["--eps", 1e-3]  # AdamW makes rounding errors of gradients that are 0 as large as any


class Inputs(NamedTuple):
    model: str
    csv: Path
    shards: str
    classes: Path


def png_of_any_shape(number: int, make: Any = train_runs.png) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(make(number))).resize(SIZES[number % len(SIZES)]).save(buffer, "PNG")
    return buffer.getvalue()


def mixed_caption(number: int) -> str:
    return f"{number} picture" + " of" * (number * 5 % 11)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("native_resolution")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_runs, "png", png_of_any_shape)
        patch.setattr(train_runs, "caption", mixed_caption)
        return Inputs(
            write_model(folder / "model", vision_cfg=VISION, custom_text=True),
            write_csv(folder / "csv", SAMPLES),
            write_shards(folder / "shards", 4, SAMPLES // 4),
            write_classes(folder / "classes", 5),
        )


@pytest.fixture(autouse=True)
def restored_process() -> Iterator[None]:
    """The command configures logging and signals. Afterwards, both are as before."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], root.level = before[0], before[1]
    for number, previous in signals.items():
        signal.signal(number, previous)
    ranks.shutdown()


def options(model: str, logs: Path, *more: object) -> list[object]:
    """Train 2 epochs, and save each step."""
    return [
        "--model", model, "--batch-size", 16, "--epochs", 2, "--warmup", 1, "--lr", 1e-2, "--device", "cpu",
        "--workers", 0, "--log-every-n-steps", 1, "--report-to", "tensorboard", "--output-dir", logs, "--name", "run",
        "--save-every-n-steps", 1, "--keep-last", 50, *more,
    ]  # fmt: skip


def train(model: str, logs: Path, *more: object) -> Path:
    try:
        main.main(list(map(str, options(model, logs, *more))))
    finally:
        ranks.shutdown()
    return logs / "run"


def losses(folder: Path) -> list[float]:
    found = scalars(folder)["train/loss"]
    return [found[step] for step in sorted(found)]


def assert_same_bits(found: Any, expected: Any, place: str = "") -> None:
    """Compare nested state dicts."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), place
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_same_bits(found[key], value, f"{place}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_same_bits(found[number], value, f"{place}.{number}")
    else:
        assert found == expected, place


def assert_resumed(resumed: Path, unbroken: Path, first: int) -> None:
    """Compare the losses from step `first` on, and the weights and the state of the optimizer at the end."""
    expected, found = scalars(unbroken)["train/loss"], scalars(resumed)["train/loss"]
    assert found == {step: loss for step, loss in expected.items() if step >= first}
    one, two = (torch.load(folder / "checkpoints/epoch_2.pt", weights_only=True) for folder in (unbroken, resumed))
    assert_same_bits(two["state_dict"], one["state_dict"])
    assert_same_bits(two["optimizer"], one["optimizer"])


def count_micro_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list to which each later step appends the number of its micro-batches."""
    counts: list[int] = []
    step = components.Trainer.step

    def counted(trainer: Any, batches: Any, number: int) -> Any:
        counts.append(len(batches))
        return step(trainer, batches, number)

    monkeypatch.setattr(components.Trainer, "step", counted)
    return counts


# Resume


@pytest.mark.parametrize(
    ("kind", "workers", "workers_of_resumed"),
    [("csv", 2, (0, 2)), ("csv", 0, (0,)), ("shards", 2, (2,)), ("shards", 0, (0,))],  # readers of shards are workers
)
def test_a_run_resumed_within_an_epoch_equals_the_uninterrupted_one(
    inputs, tmp_path, monkeypatch, kind, workers, workers_of_resumed
):
    source = inputs.csv if kind == "csv" else inputs.shards
    more = ["--train-data", source, *NAFLEX, "--aug-cfg", "scale=(0.3,1.0)", "--packing", "on"]
    more += [*TWO_PATCH_SIZES, "--force-patch-dropout", 0.3] if kind == "csv" else []
    counts = count_micro_batches(monkeypatch)
    unbroken = train(inputs.model, tmp_path / "unbroken", *more, "--workers", workers)
    assert len(counts) == len(losses(unbroken)) == (8 if kind == "shards" and workers else STEPS)
    assert min(counts) >= 2
    for first, number in ((1, workers_of_resumed[0]), (len(losses(unbroken)) - 1, workers_of_resumed[-1])):
        (checkpoint,) = (unbroken / "checkpoints").glob(f"epoch_*_step_{first}.pt")
        again = train(inputs.model, tmp_path / checkpoint.stem, *more, "--workers", number, "--resume", checkpoint)
        assert_resumed(again, unbroken, first)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_between_two_micro_batches_finishes_the_step(inputs, tmp_path, monkeypatch, workers):
    more = ["--train-data", inputs.csv, *NAFLEX, *TWO_PATCH_SIZES, "--workers", workers]
    unbroken = train(inputs.model, tmp_path / "unbroken", *more)
    step = components.Trainer.step

    def stopped(trainer: Any, batches: Any, number: int) -> Any:
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batches, number)

    with monkeypatch.context() as patch:
        patch.setattr(components.Trainer, "step", stopped)
        with pytest.raises(SystemExit) as ended:
            train(inputs.model, tmp_path / "stopped", *more)
    assert ended.value.code == 143
    folder = tmp_path / "stopped/run"
    assert {path.name for path in (folder / "checkpoints").glob("*.pt")} == {"epoch_0_step_1.pt", "epoch_0_step_2.pt"}
    train(inputs.model, tmp_path / "stopped", *more, "--resume", "latest")
    assert_resumed(folder, unbroken, 0)


@pytest.mark.parametrize(("kind", "workers", "resumed"), [("csv", 2, 0), ("shards", 2, 2), ("shards", 0, 0)])
def test_steps_of_different_sizes_are_resumed(inputs, tmp_path, monkeypatch, kind, workers, resumed):
    source = inputs.csv if kind == "csv" else inputs.shards
    more = ["--train-data", source, *NAFLEX, "--naflex-variable-batch", "--naflex-loss-scale", "sqrt"]
    counts = count_micro_batches(monkeypatch)
    unbroken = train(inputs.model, tmp_path / "unbroken", *more, "--workers", workers)
    steps = len(counts)
    assert counts == [1] * steps
    assert steps >= 10
    checkpoint = unbroken / "checkpoints" / f"epoch_1_step_{steps - 2}.pt"
    again = train(inputs.model, tmp_path / "again", *more, "--workers", resumed, "--resume", checkpoint)
    assert_resumed(again, unbroken, steps - 2)


def test_the_defaults_of_open_clip_s_main_branch(inputs, tmp_path, monkeypatch):
    counts = count_micro_batches(monkeypatch)
    more = ["--train-data", inputs.csv, "--like-4", *NAFLEX]
    folder = train(inputs.model, tmp_path, *more)
    assert set(counts) == {1}
    assert all(loss > 0 for loss in scalars(folder)["train/loss"].values())  # logged each step
    assert "--like-4 sets" in (folder / "out.log").read_text()


# Ranks and packing


@pytest.fixture(scope="module")
def on_one_rank(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with packed images and evaluation, in a process like those of several ranks."""
    logs = tmp_path_factory.mktemp("one_rank")
    run(*options(inputs.model, logs, "--train-data", inputs.csv, *NAFLEX, *LARGE_EPS, "--packing", "on"))
    return logs / "run"


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_with_the_same_global_batch_have_the_losses_of_one(inputs, tmp_path, on_one_rank, count):
    """The batches and shapes are the same. Sums over ranks have another order, so that float32 rounds differently."""
    more = ["--train-data", inputs.csv, *NAFLEX, *LARGE_EPS, "--packing", "on", "--batch-size", 16 // count]
    run(*options(inputs.model, tmp_path, *more, "--gather-with-grad", "--dist-backend", "gloo"), ranks=count)
    assert losses(tmp_path / "run") == pytest.approx(losses(on_one_rank), rel=1e-5)
    found = weights(tmp_path / "run", "epoch_2.pt")
    for key, value in weights(on_one_rank, "epoch_2.pt").items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    "changed", [["--packing", "off"], ["--naflex-max-tokens-per-batch", 1024]], ids=lambda words: words[0]
)
def test_padding_and_the_size_of_micro_batches_change_no_loss(inputs, tmp_path, on_one_rank, changed):
    more = ["--train-data", inputs.csv, *NAFLEX, *LARGE_EPS, "--packing", "on", *changed]
    assert losses(train(inputs.model, tmp_path, *more)) == pytest.approx(losses(on_one_rank), rel=1e-5)


def test_evaluation_on_two_ranks_equals_that_on_one(inputs, tmp_path, on_one_rank):
    more = ["--val-data", inputs.csv, "--zeroshot-data", inputs.classes, "--batch-size", 5, *NAFLEX]
    more += ["--resume", on_one_rank / "checkpoints/epoch_1.pt"]
    (one,) = results(train(inputs.model, tmp_path / "one", *more))
    run(*options(inputs.model, tmp_path / "two", *more, "--dist-backend", "gloo"), ranks=2)
    (two,) = results(tmp_path / "two/run")
    assert one["num_samples"] == SAMPLES
    assert any(name.endswith("top1") for name in one)
    for line in (one, two):
        del line["clip_val_loss"]  # the mean over batches, which are others on two ranks
    assert two == pytest.approx(one, rel=1e-5)


# Texts of any length


@pytest.fixture
def model_of_long_texts(tmp_path, monkeypatch) -> str:
    """A NaFlex image tower with a modern text tower, whose tokenizer has the 256 bytes as its vocabulary."""
    vocabulary = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    real = tiktoken_file.ENCODINGS["r50k_base"]
    checksum = hashlib.sha256(vocabulary).hexdigest()
    encoding = dataclasses.replace(real, size=257, sha256=checksum)
    monkeypatch.setitem(tiktoken_file.ENCODINGS, real.name, encoding)
    text = {
        "text_arch": "modern", "context_length": 64, "variable_text": True, "vocab_size": 260, "width": 16, "heads": 2,
        "layers": 2, "pad_id": 258, "bos_id": 259, "eos_id": 257, "pool_type": "map", "qk_norm": True,
        "attention_mode": "bidirectional", "tokenizer_type": "tiktoken", "tiktoken_name": real.name,
    }  # fmt: skip
    name = write_model(tmp_path / "model", vision_cfg=VISION, custom_text=True, text_cfg=text)
    (tmp_path / "model" / real.file_names[0]).write_bytes(vocabulary)
    return name


@pytest.mark.parametrize("kind", ["csv", "shards"])
@pytest.mark.parametrize("packing", ["on", "off"])
def test_texts_of_any_length_with_bucketing_and_accumulation_are_resumed(
    inputs, tmp_path, model_of_long_texts, monkeypatch, kind, packing
):
    monkeypatch.setattr("training.data.bucketing._LEAST_BATCHES", 2)
    source = inputs.csv if kind == "csv" else inputs.shards
    more = ["--train-data", source, "--length-bucketing", "--bucket-pool", 16, "--text-pad-multiple", 8]
    more += ["--batch-size", 4, "--accum-freq", 2, "--packing", packing]
    counts = count_micro_batches(monkeypatch)
    unbroken = train(model_of_long_texts, tmp_path / "unbroken", *more, "--workers", 2)
    assert counts == [2] * 12
    again = ["--resume", unbroken / "checkpoints/epoch_1_step_8.pt", "--workers", 0 if kind == "csv" else 2]
    assert_resumed(train(model_of_long_texts, tmp_path / "again", *more, *again), unbroken, 8)


# Learning


@pytest.mark.slow
def test_a_run_at_several_resolutions_learns_digits(tmp_path, monkeypatch):
    """The run of docs/native_resolution.md with fewer epochs. Chance is 10 %."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(processes.ROOT / "demo")
    data = tmp_path / "sheets"
    importlib.import_module("native_resolution_data").main(["--output", str(data)])
    folder = train(
        f"local-dir:{data / 'model'}", tmp_path / "logs", "--train-data", data / "train.csv", "--use-naflex",
        "--naflex-seq-lens", 9, 16, 36, "--batch-size", 64, "--epochs", 4, "--lr", 1e-3, "--wd", 0.1, "--warmup", 20,
        "--save-every-n-steps", 0, "--zeroshot-frequency", 4, "--zeroshot-data", data / "test",
        "--zeroshot-classnames", data / "classnames.txt", "--zeroshot-templates", data / "templates.txt",
    )  # fmt: skip
    assert results(folder)[-1]["zeroshot-top1"] > 0.3
