"""The training command in this process: what it builds from its options, what it writes, and what it refuses."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import open_clip
from open_clip import device as devices
from train_runs import results, scalars, weights, write_csv, write_model, write_shards
from training import components, file_utils, loop, main, precision, preflight, ranks
from training.checkpoint.latest import natural_key
from training.data.rows import csv_file as csv_data
from training.objective import ContrastiveObjective
from training.params import parse_args, sections
from training.step_guard import TooManyBadSteps
from versions import require


class Inputs(NamedTuple):
    model: str
    csv: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("main")
    return Inputs(write_model(folder / "model"), write_csv(folder / "csv", 12))


@pytest.fixture(autouse=True)
def quiet_afterwards():
    """The command sets up the process's logging; others here want it as it was."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], root.level = before[0], before[1]
    ranks.shutdown()


def options(inputs: Inputs, logs: Path, *more: object) -> list[str]:
    """2 epochs of 3 steps of 4 samples."""
    common = [
        "--model", inputs.model, "--batch-size", 4, "--epochs", 2, "--warmup", 1, "--workers", 0, "--device", "cpu",
        "--log-every-n-steps", 1, "--report-to", "tensorboard", "--output-dir", logs, "--name", "run",
    ]  # fmt: skip
    return list(map(str, [*common, *more]))


def train(inputs: Inputs, logs: Path, *more: object) -> Path:
    main.main(options(inputs, logs, "--train-data", inputs.csv, *more))
    return logs / "run"


def losses(folder: Path) -> list[float]:
    found = scalars(folder)["train/loss"]
    assert sorted(found) == list(range(6))
    return [found[step] for step in sorted(found)]


@pytest.fixture(scope="module")
def plain(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    folder = train(inputs, tmp_path_factory.mktemp("plain"))
    root.handlers[:], root.level = before[0], before[1]
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        ["--grad-checkpointing"],
        ["--accum-freq", "1", "--fused-optimizer", "off"],
        ["--grad-clip-norm", "1e6"],
        ["--force-custom-text"],
    ],
    ids=" ".join,
)
def test_what_changes_only_how_it_is_computed(inputs, plain, tmp_path, flags):
    assert losses(train(inputs, tmp_path, *flags)) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.parametrize("flags", [[], ["--max-bad-steps", "0"], ["--precision", "pure_fp16"]], ids=" ".join)
def test_a_run_without_one_update_does_not_end_well(inputs, tmp_path, monkeypatch, flags):
    losses = ContrastiveObjective.losses
    monkeypatch.setattr(
        ContrastiveObjective, "losses", lambda *args: {name: loss * torch.nan for name, loss in losses(*args).items()}
    )
    with pytest.raises(TooManyBadSteps, match=r"All 6 steps of this run were skipped .*try --precision"):
        train(inputs, tmp_path, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "amp"],
        ["--precision", "amp_bf16"],
        ["--precision", "bf16"],
        ["--precision", "pure_bf16"],
        ["--precision", "fp16"],
        ["--precision", "pure_fp16"],
        ["--siglip"],
        ["--grad-clip-norm", "0.01"],
        ["--lr-scheduler", "const-cooldown", "--epochs-cooldown", "1"],
        ["--skip-scheduler"],
        ["--force-patch-dropout", "0.5"],
        ["--seed", "1"],
    ],
    ids=" ".join,
)
def test_what_changes_the_numbers(inputs, plain, tmp_path, flags):
    folder = train(inputs, tmp_path, *flags)
    found = losses(folder)
    assert all(torch.isfinite(torch.tensor(found)))
    assert found != losses(plain)
    checkpoint = torch.load(folder / "checkpoints/epoch_2.pt", weights_only=True)
    dtype = checkpoint["state_dict"]["visual.conv1.weight"].dtype
    assert dtype == precision.weights_dtype(parse_args(flags).precision)
    assert ("logit_bias" in checkpoint["state_dict"]) == ("--siglip" in flags)


def test_a_locked_tower_does_not_move_and_the_other_one_does(inputs, plain, tmp_path):
    torch.manual_seed(0)
    start = plain / "checkpoints/epoch_1.pt"
    folder = train(inputs, tmp_path, "--lock-image", "--pretrained", start)
    before, after = weights(plain, "epoch_1.pt"), weights(folder, "epoch_2.pt")
    assert torch.equal(after["visual.conv1.weight"], before["visual.conv1.weight"])
    assert not torch.equal(
        after["transformer.resblocks.0.mlp.c_fc.weight"], before["transformer.resblocks.0.mlp.c_fc.weight"]
    )


def test_a_teacher_is_distilled_from(inputs, plain, tmp_path):
    teacher = plain / "checkpoints/epoch_2.pt"
    folder = train(
        inputs, tmp_path, "--distill-model", inputs.model, "--distill-pretrained", teacher, "--accum-freq", "1"
    )
    numbers = scalars(folder)
    total = [numbers["train/contrastive_loss"][i] + numbers["train/distill_loss"][i] for i in range(6)]
    assert [numbers["train/loss"][i] for i in range(6)] == pytest.approx(total, rel=1e-5)


@pytest.fixture
def dynamo_restored():
    import torch._dynamo

    with torch._dynamo.config.patch(cache_size_limit=8, optimize_ddp=True):
        yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_compiling_leaves_the_names_in_the_checkpoint(inputs, plain, tmp_path, monkeypatch):
    original, compiled = torch.nn.Module.compile, []

    def without_a_compiler(self, *args, **kwargs):
        compiled.append(type(self).__name__)
        return original(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_a_compiler)
    monkeypatch.setattr(devices.CpuDevice, "why_not_compile", lambda self: None)
    folder = train(inputs, tmp_path, "--torchcompile", "--epochs", "2")
    assert compiled == ["ResidualAttentionBlock"] * 3
    log = (folder / "out.log").read_text()
    assert log.count("--torchcompile: compiled 3 blocks (2 different) into ") == 1
    assert "Recompiles" not in log
    assert losses(folder) == pytest.approx(losses(plain), rel=1e-4)
    assert weights(folder, "epoch_2.pt").keys() == weights(plain, "epoch_2.pt").keys()


@pytest.mark.parametrize(
    ("strategy", "what"), [("model", "the whole model"), ("task", "the model and the loss"), ("step", "the whole step")]
)
def test_runs_continue_between_a_strategy_and_uncompiled(inputs, plain, tmp_path, strategy, what, dynamo_restored):
    if strategy == "step":
        require("torch", "2.13", "older ones cannot compile the backward pass")
    compiling = ["--torchcompile", "--torchcompile-strategy", strategy, "--torchcompile-backend", "eager"]
    folder = train(inputs, tmp_path / "compiled", *compiling, "--val-data", inputs.csv)
    log = (folder / "out.log").read_text()
    assert f"--torchcompile: compiled {what} into 1 graphs. The warm-up took" in log
    assert "Recompiles" not in log
    assert len(results(folder)) == 2
    assert losses(folder) == pytest.approx(losses(plain), rel=1e-4)
    assert weights(folder, "epoch_2.pt").keys() == weights(plain, "epoch_2.pt").keys()
    saved = torch.load(folder / "checkpoints/epoch_1.pt", weights_only=True)["optimizer"]
    assert all(type(group["lr"]) is float for group in saved["param_groups"])
    uncompiled = train(inputs, tmp_path / "resumed", "--resume", folder / "checkpoints/epoch_1.pt")
    compiled = train(inputs, tmp_path / "compiled again", "--resume", plain / "checkpoints/epoch_1.pt", *compiling)
    for resumed in (uncompiled, compiled):
        found = scalars(resumed)["train/loss"]
        assert [found[step] for step in sorted(found)] == pytest.approx(losses(plain)[3:], rel=1e-4)


def test_steps_are_traced_into_the_run_s_folder(inputs, plain, tmp_path):
    folder = train(inputs, tmp_path, "--profile-steps", "1:5")  # over the end of an epoch, too
    assert len(list((folder / "profile").glob("*.json"))) == 1
    assert "Traced 4 step(s)" in (folder / "out.log").read_text()
    assert losses(folder) == pytest.approx(losses(plain), rel=1e-6)
    assert not (plain / "profile").exists()


def test_the_level_of_a_trace_is_the_profiler_s(inputs, tmp_path, monkeypatch):
    levels, original = [], devices.CpuDevice.profiler

    def profiler(self, folder, level, **schedule):
        levels.append(level)
        return original(self, folder, level=level, **schedule)

    monkeypatch.setattr(devices.CpuDevice, "profiler", profiler)
    folder = train(inputs, tmp_path, "--profile-steps", "1:2", "--profile-level", 1)
    assert levels == [1]
    (trace,) = (folder / "profile").glob("*.json")
    assert "Input Dims" in trace.read_text()


@pytest.fixture
def determinism_restored():
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_two_deterministic_runs_have_the_same_bits(inputs, plain, tmp_path, determinism_restored):
    first, second = (train(inputs, tmp_path / name, "--deterministic") for name in ("first", "second"))
    assert torch.are_deterministic_algorithms_enabled()
    assert losses(first) == losses(second)
    assert losses(first) == pytest.approx(losses(plain), rel=1e-4)
    one, other = (weights(folder, "epoch_2.pt") for folder in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "--deterministic: torch.use_deterministic_algorithms." in (first / "out.log").read_text()
    assert "--deterministic" not in (plain / "out.log").read_text()


def test_determinism_comes_before_the_device_is_used(inputs, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(devices.CpuDevice, "set_deterministic", lambda self: calls.append("deterministic"))
    monkeypatch.setattr(ranks, "set_device", lambda device: calls.append("device"))
    train(inputs, tmp_path, "--deterministic", "--epochs", 1)
    assert calls[:2] == ["deterministic", "device"]


def no_model(*_, **__):
    pytest.fail("a model was built")


def test_what_torch_compile_lacks_is_said_before_a_model_is_built(inputs, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(devices.CpuDevice, "why_not_compile", lambda self: "the compiler is missing.")
    monkeypatch.setattr(components, "build_model", no_model)
    with pytest.raises(ModuleNotFoundError, match="--torchcompile: the compiler is missing"):
        train(inputs, tmp_path / "logs", "--torchcompile")
    assert not (tmp_path / "logs").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_a_backend_that_torch_does_not_have_is_named_with_those_that_it_has(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(components, "build_model", no_model)
    with pytest.raises(ValueError, match=r"--torchcompile-backend 'indoctor' is not installed.* has .*inductor"):
        train(inputs, tmp_path / "logs", "--torchcompile", "--torchcompile-backend", "indoctor")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("world", "works on one process, and this run has 2"),
        ("scaler", "the gradient scaler of --precision amp"),
        ("device", "needs a device that keeps NaN"),
        ("torch", "needs a newer torch"),
    ],
)
def test_a_step_that_cannot_be_compiled_is_refused_before_a_model_is_built(broken, reason, monkeypatch):
    options = ["--torchcompile", "--torchcompile-strategy", "step", "--dataset-type", "synthetic"]
    cfg, cpu = sections(parse_args(options)), torch.device("cpu")
    monkeypatch.setattr(devices.CpuDevice, "saturates", broken == "device")
    monkeypatch.setattr(preflight.compilation, "can_trace_backward", lambda: broken != "torch")
    if broken == "scaler":
        monkeypatch.setattr(precision.Precision, "grad_scaler", lambda self: torch.amp.GradScaler("cpu"))
    world = ranks.World(0, 0, 2, cpu, "gloo") if broken == "world" else ranks.world()
    with pytest.raises(ValueError, match=reason):
        preflight.check_compiled_step(cfg, precision.create("amp", cpu), world)


def test_a_setting_that_ends_a_run_is_said_before_the_device_is_used(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(devices.CpuDevice, "environment_errors", lambda self: ["A and B are both set."])
    monkeypatch.setattr(ranks, "set_device", no_model)
    with pytest.raises(RuntimeError, match="A and B are both set"):
        train(inputs, tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


def test_what_the_device_has_to_say_is_in_the_log(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(devices.CpuDevice, "environment_warnings", lambda self: ["A is smaller than B."])
    monkeypatch.setattr(devices.CpuDevice, "notes", lambda self: ["Another name is used."])
    log = (train(inputs, tmp_path, "--epochs", 1) / "out.log").read_text()
    assert "A is smaller than B." in log
    assert "Another name is used." in log


@pytest.mark.parametrize("shortened", [False, True])
def test_a_known_code_in_an_error_gets_its_hint(inputs, tmp_path, monkeypatch, shortened):
    def fail(*_, **__):
        error = RuntimeError("HCCL function error, error code is 7\nEJ0001: Failed to initialize the HCCP process.")
        if shortened:
            raise RuntimeError("Joining the others failed (HCCL function ...)") from error
        raise error

    monkeypatch.setattr(components, "build_model", fail)
    with pytest.raises(RuntimeError):
        train(inputs, tmp_path)
    assert "Wait 10 s" in (tmp_path / "run/out.log").read_text()


@pytest.mark.parametrize(("flags", "fast"), [([], True), (["--fp32-matmul", "highest"], False)])
def test_fp32_products_are_fast_unless_told_otherwise(inputs, tmp_path, monkeypatch, flags, fast):
    asked = []
    monkeypatch.setattr(devices.CpuDevice, "set_fast_matmul", lambda self, enabled: asked.append(enabled))
    train(inputs, tmp_path, "--epochs", 1, *flags)
    assert asked == [fast]


def test_accumulation_counts_its_steps_as_open_clip_does(inputs, tmp_path):
    folder = train(inputs, tmp_path, "--batch-size", 2, "--accum-freq", 2, "--save-frequency", 0)
    assert len(losses(folder)) == 6
    checkpoint = torch.load(folder / "checkpoints/epoch_2.pt", weights_only=True)
    assert checkpoint["train_state"]["step"] == 6
    assert checkpoint["train_state"]["samples_seen"] == 24


def test_the_latest_checkpoint_continues_the_run_in_its_folder(inputs, plain, tmp_path):
    folder = train(inputs, tmp_path, "--resume", "latest")  # there is none yet: from the beginning
    (folder / "checkpoints/epoch_2.pt").unlink()
    train(inputs, tmp_path, "--resume", "latest")
    assert "Resumed from" in (folder / "out.log").read_text()
    assert losses(folder) == losses(plain)
    for key, value in weights(plain, "epoch_2.pt").items():
        assert torch.equal(weights(folder, "epoch_2.pt")[key], value), key
    train(inputs, tmp_path, "--resume", "latest")
    assert "already has 2 epochs" in (folder / "out.log").read_text()


def stopped(inputs: Inputs, logs: Path, *more: object) -> SystemExit:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as ended:
            train(inputs, logs, *more)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return ended.value


def test_a_run_that_is_told_to_stop_in_a_step_goes_on_after_it(inputs, plain, tmp_path, monkeypatch):
    step = components.Trainer.step

    def told(self, batches, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches, number)

    monkeypatch.setattr(components.Trainer, "step", told)
    assert stopped(inputs, tmp_path).code == 143
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("*.pt")] == ["epoch_0_step_2.pt"]
    train(inputs, tmp_path, "--resume", "latest")
    assert losses(tmp_path / "run") == losses(plain)
    printed = (tmp_path / "run/out.log").read_text()
    assert printed.count("Stopped by SIGTERM") == 1
    assert printed.count("has no pretrained weights") == 1, "only where the run started"


def test_a_run_that_waits_for_data_stops_before_the_step_whose_batches_are_incomplete(inputs, tmp_path, monkeypatch):
    """2 steps of 3 batches of 2 samples an epoch; the data stall in the second batch of the last step."""
    options = ["--batch-size", 2, "--accum-freq", 3, "--force-patch-dropout", "0.5"]
    unbroken = train(inputs, tmp_path / "unbroken", *options)
    load, calls = csv_data.load_image, []

    def stalling(*args):
        calls.append(args)
        if len(calls) == 12 + 6 + 2 + 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return load(*args)

    with monkeypatch.context() as patch:
        patch.setattr(csv_data, "load_image", stalling)
        assert stopped(inputs, tmp_path / "stopped", *options).code == 143
    folder = tmp_path / "stopped/run"
    assert {path.name for path in (folder / "checkpoints").glob("*.pt")} == {"epoch_1.pt", "epoch_1_step_3.pt"}
    train(inputs, tmp_path / "stopped", *options, "--resume", "latest")
    assert scalars(folder)["train/loss"] == scalars(unbroken)["train/loss"]
    for key, value in weights(unbroken, "epoch_2.pt").items():
        assert torch.equal(weights(folder, "epoch_2.pt")[key], value), key


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_told_to_stop_in_an_evaluation_it_saves_too(inputs, plain, tmp_path, monkeypatch, number, code):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *_, **__: os.kill(os.getpid(), number))
        assert stopped(inputs, tmp_path, "--save-frequency", 0).code == code
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("*.pt")] == ["epoch_1_step_3.pt"]
    train(inputs, tmp_path, "--resume", "latest")
    assert losses(tmp_path / "run") == losses(plain)


def test_told_to_stop_while_the_model_is_built_it_ends(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(components, "build_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped(inputs, tmp_path).code == 143
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_torchrun_s_restart_goes_on_in_the_folder(inputs, plain, tmp_path, monkeypatch):
    folder = train(inputs, tmp_path)
    (folder / "checkpoints/epoch_2.pt").unlink()
    (folder / "checkpoints/.epoch_2.pt.12345678.tmp").write_bytes(b"half")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(inputs, tmp_path, "--resume", plain / "checkpoints/epoch_2.pt")  # not again what it began with
    assert "Resumed from " + str(folder / "checkpoints/epoch_1.pt") in (folder / "out.log").read_text()
    assert losses(folder) == losses(plain)
    assert not list((folder / "checkpoints").glob(".*"))


def test_averaged_weights_are_evaluated_saved_and_loaded(inputs, plain, tmp_path):
    folder = train(inputs, tmp_path, "--ema-decay", 0.5, "--val-data", inputs.csv)
    assert losses(folder) == losses(plain)
    last = results(folder)[-1]
    assert last["ema_clip_val_loss"] != last["clip_val_loss"]
    assert sorted(scalars(folder)["val/ema_clip_val_loss"]) == [1, 2]
    saved = torch.load(folder / "checkpoints/epoch_2.pt", weights_only=True)
    assert saved["state_dict_ema"].keys() == saved["state_dict"].keys()
    torch.save(saved["state_dict_ema"], tmp_path / "ema.pt")
    model = open_clip.create_model(inputs.model, pretrained=str(tmp_path / "ema.pt"))
    assert torch.equal(model.visual.proj, saved["state_dict_ema"]["visual.proj"])


def test_a_run_whose_last_save_fails_is_an_error(inputs, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_utils, "pt_save", full)
    with pytest.raises(OSError, match="No space"):
        train(inputs, tmp_path)
    assert len(losses(tmp_path / "run")) == 6, "it went on after the first"
    with pytest.raises(OSError, match="No space"):
        train(inputs, tmp_path / "other", "--on-save-failure", "stop")
    assert len(scalars(tmp_path / "other/run")["train/loss"]) < 6


def test_a_run_without_a_name_has_that_of_open_clip(inputs, tmp_path):
    arguments = options(inputs, tmp_path, "--dataset-type", "synthetic", "--train-num-samples", 8, "--epochs", 1)
    arguments.append("--copy-codebase")
    position = arguments.index("--name")
    main.main(arguments[:position] + arguments[position + 2 :])
    (folder,) = tmp_path.iterdir()
    date, rest = folder.name.split("-model_")
    assert len(date) == len("2026_01_31-23_59_59")
    assert rest.startswith("local-dir--")
    assert rest.endswith("-lr_0.0005-b_4-j_0-p_fp32")
    assert (folder / "checkpoints/epoch_1.pt").exists()
    assert (folder / "code/training/main.py").exists()


def test_a_run_that_writes_nothing(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main.main(options(inputs, Path("none"), "--dataset-type", "synthetic", "--train-num-samples", 8, "--epochs", 1))
    assert list(tmp_path.iterdir()) == []


def test_the_code_is_copied(inputs, tmp_path):
    folder = train(inputs, tmp_path, "--copy-codebase", "--epochs", 0)
    for name in ("training/main.py", "training/data/__init__.py", "open_clip/factory.py"):
        assert (folder / "code" / name).read_text() == (Path(main.__file__).parents[1] / name).read_text()
    args = parse_args(["--output-dir", str(tmp_path), "--name", "other", "--dataset-type", "synthetic"])
    assert (Path(main.copy_codebase(args)) / "training/main.py").exists()


class NoProcess:
    started = ended = 0
    pid = None

    def start(self):
        NoProcess.started += 1

    def join(self, timeout):
        NoProcess.ended = 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_folder_is_copied_elsewhere_and_at_the_end_completely(inputs, tmp_path, monkeypatch, fails):
    pytest.importorskip("fsspec")
    NoProcess.started = NoProcess.ended = 0
    monkeypatch.setattr(file_utils, "start_sync_process", lambda *_: NoProcess())
    remote = tmp_path / "remote"
    sync = ["--remote-sync", f"file://{remote}", "--remote-sync-protocol", "fsspec"]
    if fails:
        with pytest.raises(ValueError, match="no column 'words'"):
            train(inputs, tmp_path, *sync, "--csv-caption-key", "words")
    else:
        train(inputs, tmp_path, *sync)
        assert (remote / "run/checkpoints/epoch_2.pt").exists()
    assert "params.txt" in {path.name for path in (remote / "run").iterdir()}
    assert NoProcess.started == NoProcess.ended == 1


def broken_csv(folder: Path, text: str) -> Path:
    path = folder / "broken.csv"
    path.write_text(text)
    return path


class Code:
    def __reduce__(self):
        return print, ("this ran",)


def pickle_with_code(folder: Path) -> Path:
    torch.save({"epoch": 1, "state_dict": Code()}, folder / "code.pt")
    return folder / "code.pt"


def other_checkpoint(folder: Path) -> Path:
    torch.save({"epoch": 1, "state_dict": torch.nn.Linear(2, 2).state_dict()}, folder / "other.pt")
    return folder / "other.pt"


# Those that are refused before the run's folder is made: the same --name can be used again.
BEFORE_THE_FOLDER = {"no data", "a missing CSV", "a device that is not there", "no checkpoint"}
REFUSED = {
    "no data": (lambda i, t: [], ValueError, "--val-data"),
    "a missing CSV": (lambda i, t: ["--train-data", "nowhere.csv"], FileNotFoundError, "nowhere.csv"),
    "a missing column": (lambda i, t: ["--train-data", i.csv, "--csv-caption-key", "words"], ValueError, "title"),
    "a wrong separator": (lambda i, t: ["--train-data", i.csv, "--csv-separator", ";"], ValueError, "separator"),
    "images that are not there": (
        lambda i, t: ["--train-data", broken_csv(t, "filepath\ttitle\n" + "no.png\tx\n" * 8)],
        ValueError, "no.png|missing_image",
    ),
    "fewer samples than a batch": (lambda i, t: ["--train-data", i.csv, "--batch-size", 64], ValueError, "12"),
    "fewer batches than a step": (lambda i, t: ["--train-data", i.csv, "--accum-freq", 4], ValueError, "accum-freq 4"),
    "shards without captions": (
        lambda i, t: ["--train-data", write_shards(t / "s", 2, 8, captions=False)], ValueError, "no_caption",
    ),
    "an unknown model": (lambda i, t: ["--train-data", i.csv, "--model", "ViT-B-23"], RuntimeError, "ViT-B-32"),
    "a device that is not there": (
        lambda i, t: ["--train-data", i.csv, "--device", "npu"], RuntimeError, "torch_npu|NPU",
    ),
    "no checkpoint": (lambda i, t: ["--train-data", i.csv, "--resume", "none.pt"], FileNotFoundError, "none.pt"),
    "another model's checkpoint": (
        lambda i, t: ["--train-data", i.csv, "--resume", other_checkpoint(t)], ValueError, "another model",
    ),
    "a pickle with code": (
        lambda i, t: ["--train-data", i.csv, "--resume", pickle_with_code(t)], ValueError, "no model weights",
    ),
    "classes without names": (
        lambda i, t: ["--train-data", i.csv, "--zeroshot-data", t], (ValueError, FileNotFoundError), "class",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_ends_with_a_sentence(inputs, tmp_path, name, capfd):
    more, error, words = REFUSED[name]
    arguments = options(inputs, tmp_path / "logs", *more(inputs, tmp_path))
    with pytest.raises(error, match=words) as caught:
        main.main(arguments)
    printed = capfd.readouterr()
    assert "this ran" not in printed.out
    if name in BEFORE_THE_FOLDER:
        assert not (tmp_path / "logs").exists()
    else:
        assert str(caught.value) in (tmp_path / "logs/run/out.log").read_text()


def test_a_device_that_is_not_there_ends_with_a_sentence(inputs, tmp_path, monkeypatch, capfd):
    words = ["--model", inputs.model, "--train-data", str(inputs.csv), "--logs", str(tmp_path), "--device", "nothing"]
    monkeypatch.setattr("sys.argv", ["main", *words])
    assert main.command() == 1
    assert "The run ends: " in capfd.readouterr().err


def test_the_exit_status_tells_errors_from_success(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main", *options(inputs, tmp_path, "--train-data", "nowhere.csv")])
    assert main.command() == 1
    monkeypatch.setattr("sys.argv", ["main", "--no-such-option"])
    with pytest.raises(SystemExit) as ended:
        main.command()
    assert ended.value.code == 2


def test_a_taken_name_is_refused_and_nothing_is_overwritten(inputs, plain):
    before = (plain / "out.log").read_text()
    with pytest.raises(FileExistsError, match="--resume latest"):
        main.main(options(inputs, plain.parent, "--train-data", inputs.csv))
    assert (plain / "out.log").read_text() == before


def test_an_evaluation_failing_after_an_epoch_loses_no_weights(inputs, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(loop, "evaluate", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(inputs, tmp_path, "--val-data", inputs.csv)
    assert (tmp_path / "run/checkpoints/epoch_1.pt").exists()


def test_evaluation_draws_leave_training_alone(inputs, plain, tmp_path, monkeypatch):
    def draws(*_, **__):
        torch.rand(100)
        return {"number": 1.0}

    monkeypatch.setattr(loop, "evaluate", draws)
    folder = train(inputs, tmp_path, "--force-patch-dropout", 0.5)
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: {})
    assert losses(folder) == losses(train(inputs, tmp_path / "quiet", "--force-patch-dropout", 0.5))
    assert results(folder) == [{"number": 1.0, "epoch": 1}, {"number": 1.0, "epoch": 2}]


def test_names_that_scripts_import():
    assert main.natural_key is natural_key
    assert main.get_latest_checkpoint("/nowhere") is None
    main.random_seed(3, 1)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(4))
    assert open_clip.get_input_dtype("fp32") is None
