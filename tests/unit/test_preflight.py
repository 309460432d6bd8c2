"""Tests of training.preflight: errors are found before the first step, and correct runs pass."""

from __future__ import annotations

import logging
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import sharded_states
from gloo_ranks import run_ranks
from open_clip import progress
from train_runs import write_classes, write_csv, write_model, write_shards
from training import components, data, loop, main, precision, preflight, ranks
from training.data.probe import SAMPLES, read_first_batch
from training.evaluate import create_evaluators
from training.params import parse_args, sections


class Inputs(NamedTuple):
    model: str
    csv: Path
    bad_csv: Path
    shards: str
    shards_without_captions: str
    classes: Path
    bad_classes: Path
    folder: Path


def write_inputs(folder: Path) -> Inputs:
    folder.mkdir(parents=True, exist_ok=True)
    bad = folder / "bad.csv"
    bad.write_text("filepath\ttitle\n" + "".join(f"no{number}.png\tx\n" for number in range(12)))
    classes = write_classes(folder / "classes", 3)
    bad_classes = folder / "bad_classes"
    for name in ("a", "b"):
        (bad_classes / name).mkdir(parents=True)
        (bad_classes / name / "1.png").write_bytes(b"not an image")
    return Inputs(
        write_model(folder / "model"),
        write_csv(folder / "csv", 12),
        bad,
        write_shards(folder / "shards", 2, 8),
        write_shards(folder / "bare", 2, 8, captions=False),
        classes,
        bad_classes,
        folder,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("preflight") / "inputs")


@pytest.fixture(autouse=True)
def quiet_afterwards():
    """Restore the logging of the process, which the command sets up."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], root.level = before[0], before[1]
    ranks.shutdown()


def options(inputs: Inputs, logs: Path, *more: object) -> list[str]:
    common = [
        "--model", inputs.model, "--batch-size", 4, "--epochs", 1, "--warmup", 1, "--workers", 0, "--device", "cpu",
        "--log-every-n-steps", 1, "--output-dir", logs, "--name", "run",
    ]  # fmt: skip
    return list(map(str, [*common, *more]))


def training_options(inputs: Inputs, logs: Path, *more: object) -> list[str]:
    return options(inputs, logs, "--train-data", inputs.csv, *more)


@pytest.fixture
def no_step(monkeypatch):
    """Fail the test if a run makes a step."""
    monkeypatch.setattr(loop, "run_epoch", lambda *_, **__: pytest.fail("a step was made"))


@pytest.fixture
def no_model(monkeypatch):
    """Fail the test if a run builds a model."""
    monkeypatch.setattr(components, "build_model", lambda *_, **__: pytest.fail("a model was built"))


def text_file(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


BEFORE_A_MODEL = {
    "nothing to do": (None, ValueError, "There are no data. Use --train-data"),
    "a missing --val-data": (lambda i, t: ["--val-data", "no.csv"], FileNotFoundError, "no.csv: no such CSV file"),
    "missing shards": (lambda i, t: ["--val-data", "no/{0..3}.tar"], FileNotFoundError, "None of the 4 shards"),
    "data of no known form": (lambda i, t: ["--val-data", "nothing"], ValueError, "--dataset-type"),
    "a list that runs commands": (
        lambda i, t: ["--val-data", text_file(t, "l.txt", "pipe:cat x\n")], ValueError, "line 1",
    ),
    "no such folder of ImageNet": (
        lambda i, t: ["--imagenet-val", "no"], FileNotFoundError, "--imagenet-val no: no such folder",
    ),
    "no such folder of ImageNet-V2": (lambda i, t: ["--imagenet-v2", "no"], FileNotFoundError, "--imagenet-v2 no"),
    "no such folder of classes": (lambda i, t: ["--zeroshot-data", "no"], FileNotFoundError, "--zeroshot-data no"),
    "no such names": (
        lambda i, t: ["--zeroshot-data", i.classes, "--zeroshot-classnames", "no.txt"], FileNotFoundError, "no.txt",
    ),
    "no such templates": (
        lambda i, t: ["--zeroshot-data", i.classes, "--zeroshot-templates", "no.txt"], FileNotFoundError, "no.txt",
    ),
    "a template without a place for the name": (
        lambda i, t: ["--zeroshot-data", i.classes, "--zeroshot-templates", text_file(t, "t.txt", "a {}\na photo\n")],
        ValueError, "line 2: the template 'a photo' has no {}",
    ),
    "no such checkpoint": (lambda i, t: ["--resume", "no.pt"], FileNotFoundError, "--resume 'no.pt'"),
    "an unknown optimizer": (
        lambda i, t: ["--opt", "timm/lionn", "--lr", 1e-4], ValueError, "no such optimizer. Similar names: timm/lion",
    ),
    "moments that float16 does not hold": (
        lambda i, t: ["--precision", "fp16", "--fused-optimizer", "off"], ValueError, "Use --fused-optimizer auto",
    ),
    "a timm optimizer for float16": (
        lambda i, t: ["--precision", "fp16", "--opt", "timm/lamb", "--lr", 1e-4], ValueError, "Use --opt adamw",
    ),
    "an unknown teacher": (
        lambda i, t: ["--distill-model", "ViT-B-23", "--distill-pretrained", "x"], RuntimeError, "ViT-B-32",
    ),
    "a teacher without weights": (
        lambda i, t: ["--distill-model", "ViT-B-32", "--distill-pretrained", "no.pt"], RuntimeError, "no.pt",
    ),
    "an unknown store": (
        lambda i, t: ["--remote-sync", "nothing://x", "--remote-sync-protocol", "fsspec"], ValueError, "nothing",
    ),
    "a folder that is a file": (
        lambda i, t: ["--output-dir", text_file(t, "file", "x")], NotADirectoryError, "cannot be written",
    ),
    "a folder that is not there to be made": (
        lambda i, t: ["--output-dir", "/proc/x"], OSError, "--output-dir /proc/x/run/checkpoints cannot be written",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE_A_MODEL)
def test_what_options_and_files_tell_ends_the_run_before_a_model_is_built(inputs, tmp_path, no_model, name):
    more, error, words = BEFORE_A_MODEL[name]
    if more is None:
        arguments = options(inputs, tmp_path / "logs")
    else:
        arguments = training_options(inputs, tmp_path / "logs", *more(inputs, tmp_path))
    with pytest.raises(error, match=words.replace("{", r"\{")):
        main.main(arguments)
    assert not (tmp_path / "logs").exists(), "the name can be used again"


def test_the_folder_of_a_sharded_checkpoint_can_be_resumed(inputs, tmp_path, no_model):
    checkpoint_folder = tmp_path / "epoch_3"
    sharded_states.save(checkpoint_folder)
    arguments = training_options(inputs, tmp_path / "logs", "--resume", checkpoint_folder)
    preflight.check_options(sections(parse_args(arguments)))
    (checkpoint_folder / ".metadata").unlink()
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        main.main(arguments)


@pytest.mark.parametrize(
    ("package", "more"),
    [
        ("tensorboard", ["--report-to", "tensorboard"]),
        ("wandb", ["--report-to", "wandb"]),
        ("pandas", []),
        ("webdataset", ["--val-data", "SHARDS"]),
        ("braceexpand", ["--val-data", "SHARDS"]),
        ("timm", ["--opt", "timm/lion", "--lr", "1e-4"]),
        ("fsspec", ["--remote-sync", "file:///tmp/x", "--remote-sync-protocol", "fsspec"]),
        ("fsspec", ["--resume", "memory://x.pt"]),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    inputs, tmp_path, monkeypatch, no_model, package, more
):
    monkeypatch.setitem(sys.modules, package, None)
    more = [inputs.shards if word == "SHARDS" else word for word in more]
    with pytest.raises(ModuleNotFoundError, match=f"needs the package {package}. Run: pip install {package}"):
        main.main(training_options(inputs, tmp_path, *more))


def test_a_store_s_package_and_command(inputs, tmp_path, monkeypatch, no_model):
    import fsspec

    def needs_s3fs(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", needs_s3fs)
    sync = ["--remote-sync", "s3://bucket/runs", "--remote-sync-protocol"]
    with pytest.raises(ModuleNotFoundError, match="pip install s3fs"):
        main.main(training_options(inputs, tmp_path, *sync, "fsspec"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FileNotFoundError, match="needs the command `aws`"):
        main.main(training_options(inputs, tmp_path, *sync, "s3"))


def test_packages_that_are_not_needed_may_be_missing(inputs, tmp_path, monkeypatch):
    for package in ("tensorboard", "wandb", "webdataset", "fsspec"):
        monkeypatch.setitem(sys.modules, package, None)
    preflight.check_options(sections(parse_args(training_options(inputs, tmp_path))))


def without_class_names(inputs: Inputs, folder: Path) -> list[object]:
    return ["--zeroshot-data", inputs.classes, "--zeroshot-classnames", text_file(folder, "names.txt", "a\nb\n")]


def other_checkpoint(folder: Path) -> Path:
    torch.save({"epoch": 1, "state_dict": torch.nn.Linear(2, 2).state_dict()}, folder / "other.pt")
    return folder / "other.pt"


BEFORE_A_STEP = {
    "pairs without images": (
        lambda i, t: ["--val-data", i.bad_csv],
        "bad.csv: not one usable sample, and 12 bad ones. The first: no0.png",
    ),
    "shards without captions": (lambda i, t: ["--val-data", i.shards_without_captions], "bare.*no_caption"),
    "classes without images": (lambda i, t: ["--zeroshot-data", i.bad_classes], "bad_classes: not one usable sample"),
    "ImageNet without images": (lambda i, t: ["--imagenet-val", i.bad_classes], "bad_classes: not one usable sample"),
    "too few names": (without_class_names, "has 2 class names and --zeroshot-data has 4 class folders"),
    "a wrong column": (lambda i, t: ["--val-data", text_file(t, "c.csv", "a\tb\nx\ty\n")], "no column 'filepath'"),
}  # fmt: skip


@pytest.mark.parametrize("frequency", [1, 100])
@pytest.mark.parametrize("name", BEFORE_A_STEP)
def test_evaluation_data_that_cannot_be_used_end_the_run_before_a_step(inputs, tmp_path, no_step, name, frequency):
    more, words = BEFORE_A_STEP[name]
    often = ["--val-frequency", frequency, "--zeroshot-frequency", frequency]
    with pytest.raises(ValueError, match=words) as caught:
        main.main(training_options(inputs, tmp_path / "logs", *more(inputs, tmp_path), *often))
    assert str(caught.value) in (tmp_path / "logs/run/out.log").read_text()
    assert len(str(caught.value)) < 500


def test_data_that_are_never_evaluated_are_not_tried(inputs, tmp_path):
    main.main(training_options(inputs, tmp_path, "--val-data", inputs.bad_csv, "--val-frequency", 0))
    assert (tmp_path / "run/checkpoints/epoch_1.pt").exists()


def test_a_checkpoint_of_another_model_is_refused_before_data_are_opened(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(components, "get_data", lambda *_, **__: pytest.fail("data were opened"))
    with pytest.raises(ValueError, match="another model"):
        main.main(training_options(inputs, tmp_path, "--resume", other_checkpoint(tmp_path)))


def test_a_tokenizer_of_another_vocabulary(inputs, tmp_path, no_step):
    changed = write_model(
        tmp_path / "small",
        text_cfg={"context_length": 16, "vocab_size": 1000, "width": 16, "heads": 2, "layers": 1},
    )
    with pytest.raises(ValueError, match="token ids up to 49407, but the vocab_size of the model is 1000"):
        main.main(training_options(inputs, tmp_path, "--model", changed))


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [((32, 32), (64, 64), "image size is .64, 64."), (49408, 1000, "vocab_size is 1000 and the model's is 49408")],
)
def test_a_teacher_that_takes_other_batches(ours, theirs, words):
    def model(value):
        size, vocab = (value, 49408) if isinstance(value, tuple) else ((32, 32), value)
        return SimpleNamespace(visual=SimpleNamespace(image_size=size), vocab_size=vocab)

    preflight.check_teacher(model(ours), model(ours))
    with pytest.raises(ValueError, match=words):
        preflight.check_teacher(model(ours), model(theirs))


def test_a_teacher_and_a_model_that_take_no_patches():
    size = SimpleNamespace(image_size=(32, 32))
    patches = SimpleNamespace(image_size=(64, 64), takes_packed_patches=False)
    student = SimpleNamespace(visual=patches)
    preflight.check_teacher(student, SimpleNamespace(visual=SimpleNamespace(takes_packed_patches=True)), True)
    with pytest.raises(ValueError, match="Choose a teacher with a NaFlex image tower"):
        preflight.check_teacher(student, SimpleNamespace(visual=size), True)
    with pytest.raises(ValueError, match="image size"):
        preflight.check_teacher(student, SimpleNamespace(visual=size))
    preflight.check_takes_patches(student)
    with pytest.raises(ValueError, match="Add --use-naflex or --force-naflex-vision"):
        preflight.check_takes_patches(SimpleNamespace(visual=size))


def test_patches_without_a_tower_for_them_are_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match="--aug-cfg naflex=True converts images to sequences of patches"):
        main.main(training_options(inputs, tmp_path, "--aug-cfg", "naflex=True"))


# No side effects


def loaders(inputs: Inputs, workers: int = 0, tokenizer=lambda texts: torch.ones(len(texts), 4, dtype=torch.int64)):
    arguments = ["--workers", workers, "--imagenet-val", inputs.classes, "--zeroshot-data", inputs.classes]
    made = {}
    for name, path in (("csv", inputs.csv), ("shards", inputs.shards)):
        cfg = sections(parse_args([*map(str, arguments), "--val-data", str(path), "--batch-size", "5"])).data
        found = data.get_data(cfg, (transform, transform), 0, tokenizer)
        made |= {f"{name} {key}": info for key, info in found.items()}
    return made


def transform(image):
    random.random(), np.random.rand(), torch.rand(1)
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


def test_a_small_batch_of_each_set_is_read_and_nothing_else_changes(inputs):
    device = torch.device("cpu")
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    made = loaders(inputs)
    preflight.check_evaluation_data(torch.nn.Identity(), made.values(), device)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    untried = loaders(inputs)
    for name, info in made.items():
        assert info.skipped.read() == (0, 0), "nothing counts as read"
        found, expected = list(info.dataloader), list(untried[name].dataloader)
        assert len(found) == len(expected) > 1
        for one, other in zip(found, expected, strict=True):
            assert one["key"] == other["key"]
            assert torch.equal(one["image"], other["image"])
    assert info.skipped.read()[0] == 12


def parse_eval():
    return sections(parse_args(["--val-data", "x.csv"])).eval


def test_the_probe_is_small_and_starts_no_worker(inputs):
    for name, info in loaders(inputs, workers=2).items():
        batch = read_first_batch(info.dataloader)
        assert len(batch["image"]) == SAMPLES, name
        is_captioned = "val" in name and "imagenet" not in name
        assert set(batch) == {"image", "key", *(("text", "image_id") if is_captioned else ("label",))}, name
        assert info.dataloader._iterator is None


def test_ids_of_the_data_are_compared_with_the_vocabulary(inputs):
    model = SimpleNamespace(vocab_size=10)
    large = loaders(inputs, tokenizer=lambda texts: torch.full((len(texts), 4), 10))
    with pytest.raises(ValueError, match="token ids up to 10, but the vocab_size of the model is 10"):
        preflight.check_evaluation_data(model, [large["csv val"]], torch.device("cpu"))


def test_the_warning_about_classes_comes_once(inputs, caplog):
    made = {"imagenet-val": loaders(inputs)["csv imagenet-val"]}
    for _ in range(3):
        create_evaluators(made, parse_eval(), precision.create("fp32", "cpu"), lambda captions: captions)
    assert caplog.text.count("has 4 class folders, but ImageNet has 1000") == 1


# Several ranks


def rank_cases(rank: int, world_size: int) -> dict:
    """Return the errors for bad rows on one rank, on both, for a single row, and for a rank that fails."""
    folder = Path(os.environ["PREFLIGHT_INPUTS"])
    found = {}
    for name in ("half.csv", "bad.csv", "one.csv", "fails.csv"):
        cfg = sections(parse_args(["--workers", "0", "--val-data", str(folder / name), "--batch-size", "5"])).data
        info = data.get_data(cfg, (transform, transform), 0, None)["val"]
        if name == "fails.csv" and rank == 1:
            info.dataloader.collate_fn = lambda samples: fail()
        try:
            preflight.check_evaluation_data(torch.nn.Identity(), [info], torch.device("cpu"))
            found[name] = "right"
        except ValueError as error:
            found[name] = str(error)
    return found


def fail():
    raise RuntimeError("no room for the batch")


def test_ranks_find_the_same_and_none_waits_for_ever(inputs, tmp_path, monkeypatch):
    good = inputs.csv.read_text().splitlines()
    rows = [f"no{number}.png\tx" if number % 2 == 0 else good[1 + number] for number in range(12)]
    text_file(tmp_path, "half.csv", "\n".join([good[0], *rows]))  # rank 0 of 2 reads the even rows
    text_file(tmp_path, "bad.csv", inputs.bad_csv.read_text())
    text_file(tmp_path, "one.csv", "\n".join(good[:2]))
    text_file(tmp_path, "fails.csv", "\n".join(good))
    monkeypatch.setenv("PREFLIGHT_INPUTS", str(tmp_path))
    (both,) = [run_ranks(__file__, "rank_cases", (2,), tmp_path)[2]]
    assert both[0] == both[1]
    assert both[0]["half.csv"] == both[0]["one.csv"] == "right"
    assert "bad.csv: not one usable sample, and 6 bad ones. The first: no0.png" in both[0]["bad.csv"]
    assert "no room for the batch" in both[0]["fails.csv"]


# Warnings


def log_of(inputs: Inputs, logs: Path, *more: object) -> str:
    main.main(training_options(inputs, logs, *more))
    return (logs / "run/out.log").read_text()


def test_a_run_warns_of_what_will_not_work_once(inputs, tmp_path):
    log = log_of(
        inputs, tmp_path, "--warmup", 1000, "--lock-image", "--lock-text", "--lock-text-freeze-layer-norm",
        "--profile-steps", "30:40",
    )  # fmt: skip
    for words in (
        "WARNING | --warmup 1000 is more than the run's 3 steps, so the learning rate only reaches 0.3% of --lr",
        "WARNING | Only logit_scale is trained",
        "WARNING | --profile-steps 30:40 traces nothing",
    ):
        assert log.count(words) == 1


def test_a_run_without_fault_has_no_such_warning(inputs, tmp_path):
    log = log_of(inputs, tmp_path, "--val-data", inputs.shards, "--profile-steps", "1:2")
    log += log_of(inputs, tmp_path, "--resume", "latest", "--val-data", inputs.shards)
    warnings = [line for line in log.splitlines() if "WARNING" in line]
    assert [line for line in warnings if "no pretrained weights" not in line and "already" not in line] == []


def test_a_resumed_run_with_more_epochs_says_that_the_rate_jumps(inputs, tmp_path):
    assert "learning rate changes" not in log_of(inputs, tmp_path, "--epochs", 2)
    log = log_of(inputs, tmp_path, "--epochs", 4, "--resume", "latest")
    assert log.count("WARNING | The learning rate changes from") == 1
    assert "at step 6, where the run is resumed" in log


def test_siglip_starts_from_weights_without_a_bias_at_its_own(inputs, tmp_path, monkeypatch):
    log_of(inputs, tmp_path / "clip")
    weights = tmp_path / "clip/run/checkpoints/epoch_1.pt"
    started = []
    create = components.create_objective

    def noting(cfg, model, teacher):
        started.append(model.logit_bias.item())
        return create(cfg, model, teacher)

    monkeypatch.setattr(components, "create_objective", noting)
    log = log_of(inputs, tmp_path / "siglip", "--siglip", "--pretrained", weights, "--ema-decay", 0.5)
    assert started == [-10.0]
    assert log.count("the weights have no logit_bias, so it starts at -10") == 1
    trained = tmp_path / "siglip/run/checkpoints/epoch_1.pt"
    log = log_of(inputs, tmp_path / "again", "--siglip", "--pretrained", trained)
    bias = torch.load(trained, weights_only=True)["state_dict"]["logit_bias"]
    assert started[1] == pytest.approx(float(bias))
    assert "no logit_bias" not in log, "these weights have one"
    again = ["--siglip", "--pretrained", weights, "--resume", "latest", "--epochs", 2]
    resumed = log_of(inputs, tmp_path / "siglip", *again)
    assert resumed.count("no logit_bias") == 1, "only as the run began"
    assert "no logit_bias" not in log_of(inputs, tmp_path / "random", "--siglip")


# Progress


def test_what_takes_long_says_how_far_it_is(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_POLL_SECONDS", 1e-4)
    log = log_of(
        inputs, tmp_path, "--val-data", inputs.csv, "--imagenet-val", inputs.classes, "--zeroshot-data", inputs.classes,
        "--zeroshot-templates", "simple",
    )  # fmt: skip
    for words in (
        f"Building {inputs.model}: ",
        f"Reading {inputs.csv}: 12 rows, ",
        f"Listing the images in {inputs.classes}: 1 of 4 classes (25%), ",
        "Building the zero-shot classifier: 500 of 1,000 classes (50%), ",
        "Evaluating imagenet-val: 8 of 12 images (67%), ",
        "Evaluating zero-shot data: 12 of 12 images (100%), ",
        "Evaluating the validation data: 8 of 12 samples (67%), ",
    ):
        assert f"INFO | {words}" in log
    assert not progress._is_shown, "a later run in this process starts silent"


def test_an_old_torch_cannot_shard_on_the_cpu(monkeypatch):
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    options = ["--dataset-type", "synthetic", "--device", "cpu"]
    with pytest.raises(RuntimeError, match=r"torch .* cannot run --fsdp on the CPU\. Install a newer torch\."):
        preflight.check_device(sections(parse_args([*options, "--fsdp"])))
    preflight.check_device(sections(parse_args(options)))
