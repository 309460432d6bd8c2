"""Tests of training.signals: recorded signals, exceptions, and ranks that agree when to stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import processes
from gloo_ranks import run_ranks
from training import ranks, signals
from training.signals import Agreement, Stopped, StopSignals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
KINDS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


@pytest.fixture(autouse=True)
def restore_handlers():
    before = {number: signal.getsignal(number) for number in KINDS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), list(zip(KINDS, (143, 143, 130), strict=True)))
def test_a_signal_during_the_setup_ends_the_process(number, status):
    with pytest.raises(SystemExit) as stopped, StopSignals():
        send(number)
    assert isinstance(stopped.value, Stopped)
    assert (stopped.value.code, stopped.value.name) == (status, number.name)


@pytest.mark.parametrize("number", KINDS)
def test_a_signal_during_training_is_recorded_and_reported(number, capfd):
    with StopSignals() as stop, stop.deferred():
        send(number)
        assert stop.received == number
        send(signal.SIGTERM)  # sent by the launcher afterwards
        send(signal.SIGINT)  # one Ctrl-C, delivered by the terminal and by the launcher
        assert stop.received == number
    key = "Another Ctrl-C" if number == signal.SIGINT else "Ctrl-C"
    assert capfd.readouterr().err == f"{number.name}: saving after this step, then stopping. {key} stops at once.\n"


def test_a_second_ctrl_c_stops_immediately(monkeypatch):
    monkeypatch.setattr(signals, "_MIN_BETWEEN_CTRL_C", -1.0)
    with StopSignals() as stop, stop.deferred():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_signal_before_or_during_an_evaluation_ends_it_immediately():
    with StopSignals() as stop, stop.deferred():
        with pytest.raises(Stopped), stop.at_once():
            send(signal.SIGUSR1)
        with pytest.raises(Stopped), stop.at_once():
            pytest.fail("it does not begin")


def test_handlers_are_restored_unless_the_process_is_about_to_end():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(Stopped), StopSignals():
        send(signal.SIGTERM)
    send(signal.SIGTERM)  # torchrun ends the other processes when one ends: not a failure


def test_in_another_thread_signals_are_not_handled():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(StopSignals().__enter__()._previous))
    thread.start()
    thread.join()
    assert seen == [{}]


# The thread that receives signals while Python's handlers cannot run

DEAF = """
import os, sys, threading, time, datetime
import torch.distributed as dist
from training import signals
signals._HANDLER_GRACE = 1.0
def wait():  # in C++, where Python's signal handlers do not run
    print("waits", flush=True)
    dist.TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=datetime.timedelta(seconds=200))
with signals.StopSignals() as stop:
    {how}
"""


@pytest.mark.parametrize(
    ("how", "sent", "status"),
    [
        ("wait()", [signal.SIGTERM], 143),
        ("wait()", [signal.SIGINT], 130),
        ("with stop.default_handlers(): wait()", [signal.SIGTERM], -signal.SIGTERM),
        ("with stop.deferred(): wait()", [signal.SIGTERM, signal.SIGINT], 130),
        ("with stop.deferred(): wait()", [signal.SIGINT, signal.SIGINT], 130),
    ],
    ids=["nothing to save", "nothing to save, Ctrl-C", "default handlers", "second is Ctrl-C", "Ctrl-C twice"],
)
def test_a_wait_in_cpp_ends(how, sent, status):
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF.format(how=how)], env=processes.environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "waits\n"
        for number in sent:
            time.sleep(1.5)
            process.send_signal(number)
        assert process.wait(timeout=60) == status
    finally:
        process.kill()
        process.stdout.close()


EXITS = """
import sys, threading, time, multiprocessing
from torch.utils.data import DataLoader, Dataset
from training import signals
from training.data.loader import _init_worker
signals._EXIT_GRACE = 1.0
class Blocked(Dataset):
    __len__ = lambda self: 4
    __getitem__ = lambda self, index: time.sleep(200 * index)
batches = iter(DataLoader(Blocked(), num_workers=1, worker_init_fn=_init_worker, collate_fn=lambda samples: 0))
next(batches)
threading.Thread(target=time.sleep, args=(200,)).start()  # which the interpreter would wait for
print("exits", flush=True)
signals.exit_with(143)
"""


def test_the_process_exits_with_blocked_workers_and_threads():
    done = subprocess.run(
        [sys.executable, "-c", EXITS], env=processes.environment(), capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (143, "exits\n", "")


def test_a_wait_for_data_is_interrupted_after_a_signal():
    def wait(stop: StopSignals) -> None:
        with stop.deferred(), stop.waiting_for_data():
            send(signal.SIGTERM)
            time.sleep(60)

    with StopSignals() as stop:
        with pytest.raises(Stopped) as stopped:
            wait(stop)
    assert stopped.value.code == 143


def test_a_batch_that_arrives_soon_after_a_signal_is_returned():
    with StopSignals() as stop, stop.deferred():
        with stop.waiting_for_data():
            send(signal.SIGTERM)
        time.sleep(1.5)
    assert stop.received == signal.SIGTERM


def test_a_signal_to_another_process_interrupts_a_wait_for_data():
    def wait(stop: StopSignals) -> None:
        with stop.deferred(), stop.waiting_for_data():
            time.sleep(60)

    with StopSignals() as stop:
        stop.signal_elsewhere = lambda: signal.SIGINT
        with pytest.raises(Stopped) as stopped:
            wait(stop)
    assert stopped.value.code == 130


def test_a_long_wait_for_data_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(signals, "_DATA_GRACE", 0.0)
    monkeypatch.setattr(signals, "_WARN_AFTER_WAIT", 0.1)
    with StopSignals() as stop, stop.waiting_for_data():
        deadline = time.monotonic() + 30
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "No batch of training data has come for" in caplog.text


# Ranks


def take(agreement: Agreement, batch: object, next_is_ready: bool, may_end_early: bool = False) -> object:
    try:
        return agreement.take(lambda: batch, lambda: next_is_ready, may_end_early)
    except Stopped as stopped:
        return stopped.name


def test_with_one_process_a_signal_stops_before_the_next_batch():
    with StopSignals() as stop, stop.deferred():
        agreement = Agreement(stop)
        assert take(agreement, 1, False) == 1
        send(signal.SIGUSR1)
        assert take(agreement, 2, True) == "SIGUSR1"
        assert agreement.at_epoch_end() == signal.SIGUSR1


def test_without_signals_nothing_is_exchanged(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: SimpleNamespace(distributed=True))
    assert take(Agreement(), 1, False) == 1


def ranks_agree(rank: int, world_size: int) -> list:
    """Return what each rank gets: if batches may be late, if all are loaded, and at the end of an epoch."""
    found: list = []
    for is_ready in (False, True):
        with StopSignals() as stop, stop.deferred():
            agreement = Agreement(stop)
            found.append([take(agreement, number, is_ready) for number in range(2)])
            dist.barrier()
            if rank == 1:
                send(signal.SIGTERM)
            found[-1] += [take(agreement, number, is_ready) for number in (2, 3)]
    with StopSignals() as stop, stop.deferred():
        agreement = Agreement(stop)
        if rank == 2:
            send(signal.SIGINT)
        found.append([agreement.at_epoch_end(), ranks.broadcast_object(f"from {rank}")])
    ends = Agreement()
    found.append([take(ends, None if rank == 0 and number == 1 else number, True, True) for number in range(2)])
    ranks.barrier()
    return found


def test_ranks_stop_before_the_same_batch(tmp_path):
    """If all batches are loaded, the run stops one batch after a rank received the signal."""
    for rank in run_ranks(__file__, "ranks_agree", (3,), tmp_path)[3]:
        assert rank[0] == [0, 1, "SIGTERM", "SIGTERM"]
        assert rank[1] == [0, 1, 2, "SIGTERM"]
        assert rank[2] == [signal.SIGINT, "from 0"]
        assert rank[3] == [0, None]


def a_rank_waits(rank: int, world_size: int) -> list:
    """Rank 1 arrives after the time limit of a wait."""
    ranks._joined.timeout = 1.0
    if rank == 1:
        time.sleep(3)
    try:
        agreement = Agreement(StopSignals())
        agreement.take(lambda: 1, lambda: False, False)
    except RuntimeError as error:
        return [str(error)]
    return []


def test_the_wait_for_another_rank_s_batch_has_a_limit(tmp_path):
    ranks = run_ranks(__file__, "a_rank_waits", (2,), tmp_path)[2]
    assert re.match(r"Another process has waited \d+ s for its next batch, longer than --dist-timeout 1", ranks[0][0])


def a_rank_is_interrupted(rank: int, world_size: int) -> list:
    """Rank 0 receives a signal in a barrier that rank 1 enters later."""
    found = []
    if rank == 1:
        time.sleep(3)
        ranks.barrier()
    else:
        threading.Timer(1.0, send, [signal.SIGTERM]).start()
        try:
            with StopSignals():
                ranks.barrier()
        except Stopped as stopped:
            found = [stopped.name]
    dist.barrier()
    return found


def test_a_signal_ends_the_wait_in_a_barrier(tmp_path):
    assert run_ranks(__file__, "a_rank_is_interrupted", (2,), tmp_path)[2] == [["SIGTERM"], []]
