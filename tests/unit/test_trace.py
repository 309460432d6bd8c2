"""Tests of training.trace: which steps are traced, and a real trace on the CPU."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from open_clip import device as devices
from training.trace import StepTrace

CPU = torch.device("cpu")


class Profiler(list):
    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda: self.append(name)


@pytest.mark.parametrize(
    ("first", "end", "run", "warmup", "active", "steps"),
    [
        (3, 5, range(10), 1, 2, 3),
        (0, 2, range(10), 0, 2, 2),
        (1, 2, range(10), 1, 1, 2),
        (3, 9, range(6, 12), 0, 3, 3),  # a resumed run
        (8, 20, range(10), 1, 12, 3),  # a run that ends early
    ],
)
def test_the_profiler_sees_the_steps_asked_for_and_one_before(monkeypatch, tmp_path, first, end, run, warmup, active,
                                                              steps):  # fmt: skip
    profiler, asked = Profiler(), []
    monkeypatch.setattr(
        devices.CpuDevice, "profiler", lambda self, folder, **schedule: asked.append((folder, schedule)) or profiler
    )
    with StepTrace(CPU, tmp_path, first, end, level=2) as trace:
        for number in run:
            with trace.step(number):
                pass
    assert asked == [(str(tmp_path), {"wait": 0, "warmup": warmup, "active": active, "level": 2})]
    assert profiler == ["start", *["step"] * steps, "stop"]


def test_a_run_without_these_steps_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), StepTrace(CPU, tmp_path, 5, 6) as trace, trace.step(0):
        pass
    assert "--profile-steps 5:6" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("last", [5, 3])
def test_a_trace_has_the_steps(tmp_path, last):
    """The trace is also written if the run fails in one of these steps."""

    def run() -> None:
        with StepTrace(CPU, tmp_path, 2, 4) as trace:
            for number in range(last):
                with trace.step(number), torch.profiler.record_function(f"work {number}"):
                    torch.ones(2) + 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    (file,) = tmp_path.glob("*.json")
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert {name for name in names if str(name).startswith("work")} == {f"work {i}" for i in range(2, min(last, 4))}
