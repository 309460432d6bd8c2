"""Signals that ask a run to stop: between two steps, with a checkpoint, on all ranks together.

SIGTERM and SIGUSR1 (what schedulers send before they take a machine) and the first Ctrl-C are noted while the run
trains, and stop it before its next step. Elsewhere (data and model are being built, an evaluation) they raise `Stopped`
at once. A second Ctrl-C always ends the process.

Python runs signal handlers only between two bytecodes of the main thread, so a wait in C++ (for another process, for a
device) delays them without limit. A thread therefore receives the signals too, and ends the process where the main
thread does not.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from training import children, distributed

logger = logging.getLogger(__name__)

EXIT_STATUS = 143  # 128 + SIGTERM: what schedulers know for "ended as it was told to"
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))

# Seconds.
_ANOTHER_CTRL_C = 1.0  # sooner it is the same one, delivered by the terminal and by the launcher
_TICK = 0.25  # between two looks of the thread
_DATA_MAY_COME = 1.0  # a wait for data is broken off when it lasts this long after a signal
_WARN_OF_WAIT = 60.0
_UNWIND = 2.0  # for the main thread to end by itself after a second Ctrl-C
_IN_CPP = 5.0  # without a sign of the main thread, and with nothing to save
_EXIT = 5.0  # for the interpreter to end after the run


class Stopped(SystemExit):
    """The run was told to stop by a signal, and does; its code is the exit status."""

    def __init__(self, number: int) -> None:
        super().__init__(_status(number))
        self.number = number
        self.name = signal.Signals(number).name


class StopSignals(contextlib.AbstractContextManager):
    """Listens to the signals while it is entered; not in a thread other than the main one, where Python cannot.

    received: number of the first signal; None before.
    told_elsewhere: asked in a long wait for data; number of a signal that another process got, or 0.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.told_elsewhere: Callable[[], int] = lambda: 0
        self._received_at = 0.0
        self._deferred = False
        self._may_have_to_save = False
        self._waiting_since: float | None = None
        self._break_wait = False
        self._main_thread = threading.get_ident()
        self._previous: dict[int, Any] = {}
        self._watcher: _Watcher | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
            self._watcher = _Watcher(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.close()
        # The launcher, seeing one process end, signals the others again while they are shutting down.
        ends = kind is not None and issubclass(kind, Stopped)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if ends and number != signal.SIGINT else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._break_wait:  # the thread sent this one
            self._break_wait = False
            if self._waiting_since is not None and self.received is not None:
                raise Stopped(self.received)
            return
        if self.received is not None:
            if number == signal.SIGINT and time.monotonic() - self._received_at > _ANOTHER_CTRL_C:
                raise KeyboardInterrupt
            return
        self._note(number)
        if not self._deferred:
            raise Stopped(number)

    def _note(self, number: int) -> None:
        self.received, self._received_at = number, time.monotonic()
        if self._deferred:
            # Not by the log, which this may have interrupted.
            name = signal.Signals(number).name
            key = "Another Ctrl-C" if number == signal.SIGINT else "Ctrl-C"
            os.write(2, f"{name}: saving after this step, then stopping. {key} stops at once.\n".encode())

    @contextlib.contextmanager
    def default_handlers(self) -> Iterator[None]:
        """Inside, a signal ends the process as if Python did not run: for waits in C++ with nothing to save."""
        for number in self._previous:
            signal.signal(number, signal.SIG_DFL)
        try:
            yield
        finally:
            for number in self._previous:
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted in `received`."""
        self._deferred = self._may_have_to_save = True
        try:
            yield
        finally:
            self._deferred = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside `deferred`, a part in which a signal raises Stopped again: one that came before it, too."""
        self._deferred = False
        try:
            if self.received is not None:
                raise Stopped(self.received)
            yield
        finally:
            self._deferred = True

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Inside `deferred`, a wait for a batch: Stopped is raised if the batch does not come soon after a signal."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None


class _Watcher:
    """The thread that receives the signals, through the file descriptor that Python's C handler writes them to."""

    def __init__(self, stop: StopSignals) -> None:
        self._stop = stop
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._first: int | None = None
        self._first_at = self._second_at = 0.0
        self._warned_of = (0.0, 0.0)  # start of a wait, and how long it was when it was logged
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stop-signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._previous)
        self._closed.set()
        self._sender.close()
        self._thread.join()
        self._receiver.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            if select.select([self._receiver], [], [], _TICK)[0]:
                for number in self._receiver.recv(4096):
                    self._receive(number)
            if not self._closed.is_set():
                self._look_after_main_thread()
                self._look_after_wait()

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None and number in _SIGNALS:
            self._first, self._first_at = number, now
        elif number == signal.SIGINT and now - self._first_at > _ANOTHER_CTRL_C:
            self._second_at = self._second_at or now

    def _look_after_main_thread(self) -> None:
        now, stop = time.monotonic(), self._stop
        if self._second_at and now - self._second_at > _UNWIND:
            end_now(_status(signal.SIGINT))
        unheard = self._first is not None and stop.received is None and now - self._first_at > _IN_CPP
        if unheard and not stop._may_have_to_save:
            assert self._first is not None
            end_now(_status(self._first))

    def _look_after_wait(self) -> None:
        stop, since, now = self._stop, self._stop._waiting_since, time.monotonic()
        if since is None or now - since < _DATA_MAY_COME:
            return
        if stop.received is None and (number := stop.told_elsewhere()):
            stop._note(number)
            stop._received_at -= _DATA_MAY_COME
        if stop.received is not None and now - stop._received_at >= _DATA_MAY_COME:
            stop._break_wait = True
            signal.pthread_kill(stop._main_thread, signal.SIGUSR1)
        logged = self._warned_of[1] if self._warned_of[0] == since else 0.0
        if now - since > max(_WARN_OF_WAIT, 2 * logged):
            self._warned_of = (since, now - since)
            logger.warning("No batch of training data has come for %.0f s.", now - since)


def _status(number: int) -> int:
    return 130 if number == signal.SIGINT else EXIT_STATUS


def end_now(status: int) -> NoReturn:
    """End the process and its children without unwinding."""
    os.write(2, b"Ended by a signal, without waiting for what the process was doing.\n")
    children.kill(multiprocessing.active_children())
    os._exit(status)


def exit_with(status: int) -> NoReturn:
    """End the process as `sys.exit` does, within seconds whatever its children and threads wait for.

    The process ends even if SystemExit is caught: call it as the last thing that a program does.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's raises for a worker that was killed
    children.end(multiprocessing.active_children(), 0 if status else _EXIT)
    if status:
        timer = threading.Timer(_EXIT, os._exit, [status])
        timer.daemon = True
        timer.start()
    sys.exit(status)


class _Told(NamedTuple):
    """What a rank tells the others, or the highest that any of them told."""

    signal: int = 0
    has_no_batch: int = 0
    waits_for_next: int = 0  # the batch after this one is not there yet


class Agreement:
    """The ranks agree, batch by batch, whether to go on; so that all of them stop between the same two steps.

    A rank that begins a step while another one still waits for its batch is stuck in the step's collectives, and its
    state is no longer one to save. So each rank takes a batch in two parts: it gets the batch, tells the others, and
    goes on when all have told. The exchange is between hosts: no device is waited for.

    It costs nothing where the next batches of all ranks are there already (prefetched by workers), which each rank
    tells with the batch before. Then nobody can be stuck, so the next batch is taken without waiting for the exchange,
    whose answer is read one batch later.
    """

    def __init__(self, signals: StopSignals | None = None) -> None:
        """signals: what stops the run. None: nothing does, and ranks only agree on an epoch's end where they must."""
        self._signals = signals
        self._told = torch.zeros(len(_Told._fields), dtype=torch.int64)
        self._underway: Any = None
        self._may_wait = True  # a rank may have to wait for the batch that comes next
        if signals is not None:
            signals.told_elsewhere = distributed.announced_stop

    def take(self, fetch: Callable[[], Any], is_next_ready: Callable[[], bool], may_end_early: bool) -> Any:
        """The next batch, from `fetch`; None at the end of the data, and where `may_end_early` at that of any rank's.

        Raises:
            Stopped: on all ranks before the same batch, after a signal to any of them.
        """
        if not distributed.world().distributed or (self._signals is None and not may_end_early):
            return self._take_alone(fetch)
        agreed = self._settle()
        if agreed.signal:
            raise Stopped(agreed.signal)
        together = self._may_wait or may_end_early
        batch, number = self._fetch(fetch, together)
        self._tell(_Told(number, batch is None, not is_next_ready()))
        if not together:
            return batch
        agreed = self._settle()
        if agreed.signal:
            raise Stopped(agreed.signal)
        return None if agreed.has_no_batch and may_end_early else batch

    def at_epoch_end(self) -> int:
        """The highest signal that any rank has received until now, or 0; the same on all ranks."""
        number = 0 if self._signals is None else self._signals.received or 0
        if not distributed.world().distributed:
            return number
        before = self._settle().signal
        self._tell(_Told(number))
        agreed = max(before, self._settle().signal)
        self._may_wait = True
        return agreed

    def _take_alone(self, fetch: Callable[[], Any]) -> Any:
        if self._signals is None:
            return fetch()
        batch, number = self._fetch(fetch, may_wait=True)
        if number:
            raise Stopped(number)
        return batch

    def _fetch(self, fetch: Callable[[], Any], may_wait: bool) -> tuple[Any, int]:
        """(the batch, or None where a signal has ended the wait for it; the signal's number or 0)."""
        if self._signals is None:
            return fetch(), 0
        batch = None
        with contextlib.suppress(Stopped):
            with self._signals.waiting_for_data() if may_wait else contextlib.nullcontext():
                if not (may_wait and self._signals.received):
                    batch = fetch()
        return batch, self._signals.received or 0

    def _tell(self, told: _Told) -> None:
        group = distributed.host_group()
        device = distributed.collective_device()
        self._told = torch.tensor(told, dtype=torch.int64, device=device)
        self._underway = dist.all_reduce(self._told, dist.ReduceOp.MAX, group=group, async_op=True)

    def _settle(self) -> _Told:
        """What was told last, by all ranks."""
        if self._underway is None:
            return _Told()
        distributed.wait(self._underway, "its next batch", self._announce)
        self._underway = None
        agreed = _Told(*self._told.tolist())
        self._may_wait = bool(agreed.waits_for_next)
        return agreed

    def _announce(self) -> None:
        """While it waits for the others, which may wait for data: tell them of a signal that only this rank got."""
        if self._signals is not None and self._signals.received is not None:
            distributed.announce_stop(self._signals.received)
