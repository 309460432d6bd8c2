"""open_clip.progress: when a bar or a log line appears, what it shows, and that exceptions are not lost."""

from __future__ import annotations

import io
import logging
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from open_clip import progress
from open_clip.zero_shot_classifier import build_zero_shot_classifier


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))  # pytest replaces sys.stderr
    return stream


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="open_clip.progress")
    return lambda: [record.getMessage() for record in caplog.records]


def advance(task: progress.Task, clock: Clock, seconds: float, items: int) -> None:
    """Advance by one item per second."""
    for _ in range(int(seconds)):
        clock.now += 1
        task.advance(items)


def test_a_log_line_every_30_seconds(clock, lines):
    with progress.showing(), progress.Task("Evaluating imagenet-val", 50_000, "images", clock=clock) as task:
        advance(task, clock, 29, 100)
        assert lines() == []
        advance(task, clock, 61, 100)
    assert lines()[0] == "Evaluating imagenet-val: 3,000 of 50,000 images (6%), 30 s, about 7 min 50 s left"
    assert len(lines()) == 3


@pytest.mark.parametrize(
    ("total", "unit", "count", "expected"),
    [
        (None, "rows", 2_400_000, "Work: 2,400,000 rows, 45 s"),
        (0, "rows", 0, "Work: 45 s"),
        (None, "", 0, "Work: 45 s"),
        (8, "models", 2, "Work: 2 of 8 models (25%), 45 s, about 2 min 15 s left"),
        (8, "models", 9, "Work: 8 of 8 models (100%), 45 s"),
        (4_000_000_000, "B", 1_000_000_000, "Work: 1.00 GB of 4.00 GB (25%), 45 s, about 2 min 15 s left"),
        (None, "B", 5_000_000, "Work: 5.0 MB, 45 s"),
    ],
)
def test_the_line_shows_what_is_known(total, unit, count, expected):
    task = progress.Task("Work", total, unit)
    task.move_to(count)
    assert task.format_line(45.0) == expected


@pytest.mark.parametrize("seconds", [4, 100])
def test_a_library_is_silent(clock, terminal, lines, seconds):
    with progress.Task("Work", 100, "items", clock=clock) as task:
        advance(task, clock, seconds, 1)
    assert terminal.getvalue() == ""
    assert lines() == []


def test_other_ranks_are_silent(clock, terminal, lines):
    with progress.showing(), progress.showing(False), progress.Task("Work", 100, "items", clock=clock) as task:
        advance(task, clock, 100, 1)
    assert terminal.getvalue() == ""
    assert lines() == []


def test_short_work_shows_nothing_on_a_terminal(clock, terminal, lines):
    with progress.showing(), progress.Task("Work", 100, "items", clock=clock) as task:
        advance(task, clock, 2, 50)
    assert terminal.getvalue() == ""


def test_a_bar_on_a_terminal_is_removed_at_the_end(clock, terminal, lines):
    with progress.showing(), progress.Task("Work", 100, "items", clock=clock) as task:
        advance(task, clock, 6, 10)
        assert "Work:" in terminal.getvalue()
        assert "100" in terminal.getvalue()
        assert len(progress._bars) == 1
    assert not progress._bars
    last = terminal.getvalue().split("\r")
    assert last[-1].strip() == "", "the terminal's line is cleared"
    assert "\n" not in terminal.getvalue()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_exception_is_raised_and_the_bar_removed(clock, terminal, error):
    def work() -> None:
        with progress.showing(), progress.Task("Work", 100, "items", clock=clock) as task:
            advance(task, clock, 6, 10)
            assert progress._bars
            raise error

    with pytest.raises(error):
        work()
    assert not progress._bars
    with progress.Task("Work", clock=clock) as task:
        advance(task, clock, 100, 1)
    assert not progress._bars, "the switch is off again"


def test_log_lines_do_not_break_the_bar_and_progress_is_shown_once(clock, terminal):
    handler, logger = progress.LogHandler(terminal), logging.getLogger("test_progress.line")
    file = logging.StreamHandler(io.StringIO())
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers[:] = [handler, file]
    root.setLevel(logging.INFO)
    try:
        with progress.showing(), progress.Task("Work", 100, "items", clock=clock) as task:
            advance(task, clock, 6, 10)
            logger.info("a line of log")
            advance(task, clock, 30, 1)
    finally:
        root.handlers[:], root.level = before
    shown = terminal.getvalue()
    start = shown.index("a line of log\n")
    assert shown[:start].endswith("\r"), "the bar is cleared before the line"
    assert "about" not in shown, "the terminal has the bar"
    assert file.stream.getvalue().splitlines() == ["a line of log", "Work: 84 of 100 items (84%), 30 s, about 6 s left"]


def test_watch_measures_a_call_and_ends_with_it(monkeypatch, lines):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.05)
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.02)
    with progress.showing(), progress.watch("Saving w.pt", lambda: 3_000_000, 6_000_000, "B"):
        time.sleep(0.3)
    assert lines()
    assert lines()[0].startswith("Saving w.pt: 3.0 MB of 6.0 MB (50%), 0 s")
    count = len(lines())
    time.sleep(0.1)
    assert len(lines()) == count
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_watch_of_a_failing_call_or_without_display(monkeypatch):
    with pytest.raises(OSError, match="full"), progress.showing(), progress.watch("Saving"):
        raise OSError("full")
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
    with progress.watch("Saving"):
        assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_failing_measure_does_not_end_the_call(monkeypatch, lines):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.02)
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.01)

    def gone() -> int:
        raise FileNotFoundError("renamed")

    with progress.showing(), progress.watch("Saving", gone):
        time.sleep(0.1)
    assert lines()[0] == "Saving: 0 s"


def test_no_stderr(monkeypatch, clock):
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=None))
    with progress.showing(), progress.Task("Work", 100, clock=clock) as task:
        advance(task, clock, 6, 10)


def test_advancing_is_cheap():
    with progress.showing(), progress.Task("Work", 10**9, "items") as task:
        start = time.perf_counter()
        for _ in range(10_000):
            task.advance()
    assert time.perf_counter() - start < 0.5, "under 50 microseconds each on any host"


class Texts:
    def encode_text(self, tokens, normalize=False):
        return torch.nn.functional.normalize(tokens.float(), dim=-1)


def tokenizer(captions):
    return torch.tensor([[len(caption), 1] for caption in captions])


@pytest.mark.parametrize("use_tqdm", [False, True])
@pytest.mark.parametrize("is_shown", [False, True])
def test_a_classifier_is_the_same_with_and_without_progress(terminal, monkeypatch, capsys, use_tqdm, is_shown):
    monkeypatch.setattr(progress.Task.__init__, "__defaults__", (None, "", None, 0.0, time.monotonic))
    names, templates = [f"class {number}" for number in range(23)], ["a {}", "the {} itself"]
    plain = build_zero_shot_classifier(Texts(), tokenizer, names, templates)
    with progress.showing(is_shown):
        found = build_zero_shot_classifier(Texts(), tokenizer, names, templates, use_tqdm=use_tqdm)
    assert torch.equal(found, plain)
    assert ("zero-shot classifier" in capsys.readouterr().err) == use_tqdm, "open_clip's bar"
    assert ("Building the zero-shot classifier" in terminal.getvalue()) == (is_shown and not use_tqdm), "ours"
