"""Short runs of the fault injection scripts in benchmarks/faults."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

import processes

sys.path.insert(0, str(processes.ROOT / "benchmarks/faults"))

import dead_rank
import full_disk
import kill
import kill_sharded
import malicious
import terminate
from harness import Runs


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(runs):
    figures, met = kill.measure(runs, kills=4, seed=1)
    assert met, figures
    assert figures["of them in a save"] == 1


def test_a_signal_to_one_rank_loses_no_step(runs):
    figures = terminate.stop(runs, "stopped", 2, [signal.SIGTERM], seed=0)
    assert set(figures.items()) == {
        ("signals", 1), ("steps lost", 0), ("exits with another status", 0), ("losses that differ", 0),
        ("tensors that differ", 0),
    }  # fmt: skip


NOTHING_LOST = {
    "steps lost": 0, "exits with another status": 0, "losses that differ": 0, "tensors that differ": 0
}  # fmt: skip


def test_a_signal_while_the_storage_stalls(runs):
    assert runs.run("unbroken-1").status == 0
    for number, workers in ((signal.SIGTERM, 0), (signal.SIGINT, 2)):
        figures = terminate.stop_stalled(runs, f"stalled-{workers}", number, workers=workers)
        assert NOTHING_LOST.items() <= figures.items()


def test_a_signal_while_the_storage_of_one_rank_stalls(runs):
    """The signal goes to torchrun, or to the rank that has data."""
    assert runs.run("unbroken-2", ranks=2).status == 0
    for signaled in (None, 0):
        figures = terminate.stop_stalled(runs, f"stalled-{signaled}", signal.SIGTERM, ranks=2, signaled=signaled)
        assert NOTHING_LOST.items() <= figures.items()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_processes_that_never_join(runs, number):
    figures = terminate.stop_waiting_for_others(runs, number)
    assert (figures["does not log what it waits for"], figures["exits with another status"]) == (0, 0)


def test_torchrun_restarts_all_ranks_after_one_died(runs):
    figures, met = dead_rank.measure(runs, ranks=2, timeout=30, seed=0)
    assert met, figures


def test_ranks_killed_during_a_sharded_save(runs):
    figures, met = kill_sharded.measure(runs, ranks=2, points=1, kills=1, seed=0)
    assert met, figures


@pytest.mark.slow
def test_a_full_disk(runs):
    figures, met = full_disk.measure(runs)
    assert met, figures


def test_ten_malicious_pickles(runs, capfd):
    figures, met = malicious.measure(runs)
    assert met, figures
