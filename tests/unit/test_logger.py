"""Tests of training.logger: the text log and the reports of metrics."""

from __future__ import annotations

import json
import logging
import socket
import sys
import types

import numpy as np
import pytest
import torch

from training import logger as run_logger
from training.logger import MetricsWriter, setup_logging
from training.params import LoggingConfig


@pytest.fixture
def root():
    """Yield the root logger and restore it afterwards."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield root
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    run_logger._handlers.clear()
    root.setLevel(level)


@pytest.fixture
def wandb(monkeypatch):
    """A fake of the package wandb that records its calls."""
    calls: list[tuple] = []
    run = types.SimpleNamespace(
        log=lambda metrics, step: calls.append(("log", metrics, step)), finish=lambda: calls.append(("finish",))
    )
    module = types.ModuleType("wandb")
    module.init = lambda **options: calls.append(("init", options)) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_lines_go_to_the_file_with_time_and_level(root, tmp_path):
    setup_logging(str(tmp_path / "out.log"), logging.INFO)
    logging.getLogger("a.b").info("Wörter %d", 3)
    logging.getLogger("a.b").debug("unseen")
    (line,) = (tmp_path / "out.log").read_text(encoding="utf-8").splitlines()
    time, level, text = line.split(" | ")
    assert (level, text) == ("INFO", "Wörter 3")
    assert len(time) == len("2026-01-01,00:00:00")


def test_debug_and_host(root, tmp_path):
    setup_logging(str(tmp_path / "out.log"), logging.DEBUG, include_host=True)
    logging.debug("seen")
    assert (tmp_path / "out.log").read_text().endswith(f" | {socket.gethostname()} | DEBUG | seen\n")


def test_a_second_setup_replaces_the_first_and_keeps_other_handlers(root, tmp_path):
    other = logging.NullHandler()
    root.addHandler(other)
    setup_logging(str(tmp_path / "a.log"), logging.INFO)
    logging.info("first")
    setup_logging(str(tmp_path / "b.log"), logging.INFO)
    logging.info("second")
    assert "second" not in (tmp_path / "a.log").read_text()
    assert (tmp_path / "b.log").read_text().count("second") == 1
    assert other in root.handlers


def test_a_resumed_run_appends_to_the_log(root, tmp_path):
    (tmp_path / "out.log").write_text("before\n")
    setup_logging(str(tmp_path / "out.log"), logging.INFO)
    logging.info("after")
    assert (tmp_path / "out.log").read_text().startswith("before\n")


def test_without_a_file_the_log_is_on_stderr(root, capsys):
    setup_logging(None, logging.INFO)
    logging.info("words")
    assert "INFO | words" in capsys.readouterr().err


def test_tensorboard_gets_numbers_under_their_prefix(tmp_path):
    with MetricsWriter(LoggingConfig(report_to="tensorboard"), tmp_path, True) as writer:
        writer.write({"loss": torch.tensor(0.5), "lr": 1e-3, "name": "x", "n": np.int64(3)}, 10, "train")
        writer.write({"loss": 0.25}, 20, "train")
        writer.write({"bare": 1}, 20)
    seen = scalars(tmp_path / "tensorboard")
    assert seen["train/loss"] == [(10, 0.5), (20, 0.25)]
    assert seen["train/n"] == [(10, 3.0)]
    assert set(seen) == {"train/loss", "train/lr", "train/n", "bare"}


def test_each_evaluation_appends_one_line_of_results(tmp_path):
    writer = MetricsWriter(LoggingConfig(), tmp_path, True)
    writer.write_results({"val_loss": torch.tensor(1.5), "image_to_text_R@1": np.float32(0.5), "num_samples": 7}, 1)
    path = tmp_path / "checkpoints" / "results.jsonl"
    assert len(path.read_text().splitlines()) == 1, "the line is there before the writer is closed"
    MetricsWriter(LoggingConfig(), str(tmp_path), True).write_results({"val_loss": 1.25}, 2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"val_loss": 1.5, "image_to_text_R@1": 0.5, "num_samples": 7, "epoch": 1},
        {"val_loss": 1.25, "epoch": 2},
    ]


def test_only_numbers_of_any_type_are_kept():
    metrics = {"f": 1.5, "i": 2, "b": True, "t": torch.tensor([2.5]), "n": np.float64(3.5), "a": np.array([[4.5]]),
               "vector": torch.ones(2), "empty": np.array([]), "none": None, "text": "x"}  # fmt: skip
    found = run_logger._keep_numbers(metrics)
    assert found == {"f": 1.5, "i": 2, "b": 1, "t": 2.5, "n": 3.5, "a": 4.5}
    assert {type(value) for value in found.values()} == {int, float}


def test_other_processes_and_runs_without_a_folder_write_nothing(tmp_path):
    everything = LoggingConfig(report_to="all")
    with MetricsWriter(everything, tmp_path, is_master=False) as writer:
        writer.write({"loss": 1.0}, 1, "train")
        writer.write_results({"loss": 1.0}, 1)
    with MetricsWriter(LoggingConfig(report_to="tensorboard"), None, is_master=True) as writer:
        writer.write({"loss": 1.0}, 1, "train")
        writer.write_results({"loss": 1.0}, 1)
    assert list(tmp_path.iterdir()) == []


def test_wandb_gets_options_and_numbers(tmp_path, wandb):
    cfg = LoggingConfig(report_to="wandb", wandb_notes="why", wandb_project_name="p")
    with MetricsWriter(cfg, tmp_path, True, run_config={"lr": 1}, resume=True, name="run") as writer:
        writer.write({"loss": 0.5}, 10, "train")
    (_, options), log, finish = wandb
    assert (options["project"], options["name"], options["id"], options["notes"]) == ("p", "run", "run", "why")
    assert (options["config"], options["resume"], options["dir"]) == ({"lr": 1}, "auto", str(tmp_path))
    assert log == ("log", {"train/loss": 0.5, "step": 10}, 10)
    assert finish == ("finish",)
    assert not (tmp_path / "tensorboard").exists()


def test_report_to_all_writes_to_both(tmp_path, wandb):
    with MetricsWriter(LoggingConfig(report_to="all"), tmp_path, True) as writer:
        writer.write({"loss": 0.5}, 10)
    assert [call[0] for call in wandb] == ["init", "log", "finish"]
    assert scalars(tmp_path / "tensorboard") == {"loss": [(10, 0.5)]}


def test_a_missing_package_is_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        MetricsWriter(LoggingConfig(report_to="tensorboard,wandb"), tmp_path, True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        MetricsWriter(LoggingConfig(report_to="tensorboard"), tmp_path, True)


def test_a_closed_writer_does_nothing(tmp_path):
    writer = MetricsWriter(LoggingConfig(report_to="tensorboard"), tmp_path, True)
    writer.close()
    writer.close()
    writer.write({"loss": 1.0}, 1)
    writer.write_results({"loss": 1.0}, 1)
    assert not (tmp_path / "checkpoints").exists()
