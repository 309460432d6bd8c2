"""Signals: noted while steps are made, an exception elsewhere; and ranks that agree when to stop."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch.distributed as dist

from gloo_ranks import run_ranks
from training import distributed, signals
from training.signals import Agreement, Stopped, StopSignals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
KINDS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


@pytest.fixture(autouse=True)
def handlers_as_before():
    before = {number: signal.getsignal(number) for number in KINDS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), list(zip(KINDS, (143, 143, 130), strict=True)))
def test_while_things_are_built_a_signal_ends_the_process(number, status):
    with pytest.raises(SystemExit) as stopped, StopSignals():
        send(number)
    assert isinstance(stopped.value, Stopped)
    assert (stopped.value.code, stopped.value.name) == (status, number.name)


@pytest.mark.parametrize("number", KINDS)
def test_while_steps_are_made_it_is_noted_and_said(number, capfd):
    with StopSignals() as stop, stop.deferred():
        send(number)
        assert stop.received == number
        send(signal.SIGTERM)  # the launcher's, afterwards
        send(signal.SIGINT)  # the same Ctrl-C, from the terminal and from the launcher
        assert stop.received == number
    assert capfd.readouterr().err == f"{number.name}: saving after this step, then stopping. Ctrl-C: at once.\n"


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    monkeypatch.setattr(signals, "_ANOTHER_CTRL_C", -1.0)
    with StopSignals() as stop, stop.deferred():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_an_evaluation_is_left_at_once_also_for_a_signal_that_came_before():
    with StopSignals() as stop, stop.deferred():
        with pytest.raises(Stopped), stop.at_once():
            send(signal.SIGUSR1)
        with pytest.raises(Stopped), stop.at_once():
            pytest.fail("it does not begin")


def test_handlers_are_put_back_unless_the_process_is_about_to_end():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(Stopped), StopSignals():
        send(signal.SIGTERM)
    send(signal.SIGTERM)  # torchrun ends the others when it sees one ended: this is no death


def test_another_thread_listens_to_nothing():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(StopSignals().__enter__()._previous))
    thread.start()
    thread.join()
    assert seen == [{}]


def test_alone_one_agrees_at_once():
    agreement = Agreement()
    assert [agreement.tell(number) for number in (0, 15, 0)] == [0, 15, 0]
    assert agreement.settle() == 0


def ranks_agree(rank: int, world_size: int) -> list:
    """Rank 1 is told at its step 3; every rank learns of it at the end of the same step, the next one."""
    agreement = Agreement()
    heard = [agreement.tell(15 if (rank, step) == (1, 3) else 0) for step in range(6)]
    last = agreement.settle()
    distributed._host_group = dist.new_group(backend="gloo")  # as `init` makes it
    agreement.tell(rank)
    heard += [agreement.settle(), distributed.broadcast_object(None, f"from {rank}")]
    distributed.barrier()
    return [*heard, last, agreement.settle()]


def test_ranks_agree_one_step_later(tmp_path):
    for rank in run_ranks(__file__, "ranks_agree", (3,), tmp_path)[3]:
        assert rank == [0, 0, 0, 0, 15, 0, 2, "from 0", 0, 0]
