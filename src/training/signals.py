"""Stop a run on a signal: between two steps, with a checkpoint, on all ranks at the same step.

During training, SIGTERM, SIGUSR1 (which schedulers send before they stop a job) and the first Ctrl-C are recorded and
stop the run before its next step. At other times (while data and model are built, in an evaluation) they raise
`Stopped` immediately. A second Ctrl-C always ends the process.

Python runs signal handlers only in the main thread and only between two bytecodes, so a wait in C++ (for another
process or a device) delays them without limit. Therefore a second thread receives the signals as well, and ends the
process if the main thread does not.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from open_clip.utils import exit_command
from training import children, ranks

logger = logging.getLogger(__name__)

EXIT_STATUS = 143  # 128 + SIGTERM: schedulers take it for a requested stop
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))

# Times in seconds.
_MIN_BETWEEN_CTRL_C = 1.0  # a second one within this time is a copy: terminal and launcher both deliver it
_POLL_INTERVAL = 0.25  # of the thread
_DATA_GRACE = 1.0  # a wait for data is interrupted this long after a signal
_WARN_AFTER_WAIT = 60.0
_UNWIND_GRACE = 2.0  # for the main thread to end by itself after a second Ctrl-C
_HANDLER_GRACE = 5.0  # for the main thread to run its handler, if there is nothing to save
_EXIT_GRACE = 5.0  # for the interpreter to end after the run


class Stopped(SystemExit):
    """Raised to stop the run because of a signal. Its code is the exit status."""

    def __init__(self, number: int) -> None:
        super().__init__(_exit_status(number))
        self.number = number
        self.name = signal.Signals(number).name


class StopSignals(contextlib.AbstractContextManager):
    """Handles the signals while its context is entered. In a thread other than the main one it does nothing.

    Attributes:
        received: number of the first signal, or None.
        signal_elsewhere: function that returns the number of a signal that another process received, or 0. It is
            called during long waits for data.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.signal_elsewhere: Callable[[], int] = lambda: 0
        self._received_at = 0.0
        self._deferred = False
        self._may_have_to_save = False
        self._waiting_since: float | None = None
        self._is_breaking_wait = False
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
        # torchrun re-sends the signal while the other ranks are shutting down.
        is_stopping = kind is not None and issubclass(kind, Stopped)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if is_stopping and number != signal.SIGINT else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_breaking_wait:  # sent by the thread
            self._is_breaking_wait = False
            if self._waiting_since is not None and self.received is not None:
                raise Stopped(self.received)
            return
        if self.received is not None:
            if number == signal.SIGINT and time.monotonic() - self._received_at > _MIN_BETWEEN_CTRL_C:
                raise KeyboardInterrupt
            return
        self._record(number)
        if not self._deferred:
            raise Stopped(number)

    def _record(self, number: int) -> None:
        self.received, self._received_at = number, time.monotonic()
        if self._deferred:
            # Do not use the logger: the handler may have interrupted it.
            name = signal.Signals(number).name
            key = "Another Ctrl-C" if number == signal.SIGINT else "Ctrl-C"
            os.write(2, f"{name}: saving after this step, then stopping. {key} stops at once.\n".encode())

    @contextlib.contextmanager
    def default_handlers(self) -> Iterator[None]:
        """Restore the default handlers, which end the process: for waits in C++ when there is nothing to save."""
        for number in self._previous:
            signal.signal(number, signal.SIG_DFL)
        try:
            yield
        finally:
            for number in self._previous:
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals in `received`."""
        self._deferred = self._may_have_to_save = True
        try:
            yield
        finally:
            self._deferred = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Stopped on signals again, inside `deferred`. A signal that was recorded before raises on entry."""
        self._deferred = False
        try:
            if self.received is not None:
                raise Stopped(self.received)
            yield
        finally:
            self._deferred = True

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Raise Stopped if the body, which waits for a batch inside `deferred`, does not end soon after a signal."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None


class _Watcher:
    """A thread that receives the signals through the file descriptor that Python's C handler writes to."""

    def __init__(self, stop: StopSignals) -> None:
        self._stop = stop
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._first: int | None = None
        self._first_at = self._second_at = 0.0
        self._last_warning = (0.0, 0.0)  # start of a wait, and its length when it was logged
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
            if select.select([self._receiver], [], [], _POLL_INTERVAL)[0]:
                for number in self._receiver.recv(4096):
                    self._receive(number)
            if not self._closed.is_set():
                self._check_main_thread()
                self._check_wait()

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None and number in _SIGNALS:
            self._first, self._first_at = number, now
        elif number == signal.SIGINT and now - self._first_at > _MIN_BETWEEN_CTRL_C:
            self._second_at = self._second_at or now

    def _check_main_thread(self) -> None:
        now, stop = time.monotonic(), self._stop
        if self._second_at and now - self._second_at > _UNWIND_GRACE:
            end_now(_exit_status(signal.SIGINT))
        is_unhandled = self._first is not None and stop.received is None and now - self._first_at > _HANDLER_GRACE
        if is_unhandled and not stop._may_have_to_save:
            assert self._first is not None
            end_now(_exit_status(self._first))

    def _check_wait(self) -> None:
        stop, since, now = self._stop, self._stop._waiting_since, time.monotonic()
        if since is None or now - since < _DATA_GRACE:
            return
        if stop.received is None and (number := stop.signal_elsewhere()):
            stop._record(number)
            stop._received_at -= _DATA_GRACE
        if stop.received is not None and now - stop._received_at >= _DATA_GRACE:
            stop._is_breaking_wait = True
            signal.pthread_kill(stop._main_thread, signal.SIGUSR1)
        logged = self._last_warning[1] if self._last_warning[0] == since else 0.0
        if now - since > max(_WARN_AFTER_WAIT, 2 * logged):
            self._last_warning = (since, now - since)
            logger.warning("No batch of training data has come for %.0f s.", now - since)


def _exit_status(number: int) -> int:
    return 130 if number == signal.SIGINT else EXIT_STATUS


def end_now(status: int) -> NoReturn:
    """End the process and its children without unwinding."""
    os.write(2, b"Ended by a signal, without waiting for what the process was doing.\n")
    children.kill(multiprocessing.active_children())
    os._exit(status)


def exit_with(status: int) -> NoReturn:
    """End the process like `sys.exit`, within a few seconds even if its children or threads are blocked.

    The process ends even if SystemExit is caught, so this must be the last call of a program.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler raises if a worker was killed
    children.end(multiprocessing.active_children(), 0 if status else _EXIT_GRACE)
    if status:
        timer = threading.Timer(_EXIT_GRACE, os._exit, [status])
        timer.daemon = True
        timer.start()
    exit_command(status)


class _Status(NamedTuple):
    """Status of a rank, or the maximum of each field over all ranks."""

    signal: int = 0
    has_no_batch: int = 0
    waits_for_next: int = 0  # the batch after this one is not loaded yet


class Agreement:
    """Makes the ranks agree before each batch whether to continue, so that all of them stop between the same two steps.

    A rank that starts a step while another one still waits for its batch blocks in the collectives of the step, and
    its state can no longer be saved. Therefore each rank gets its batch, sends its status to the others, and continues
    when all have done so. The exchange is between hosts and does not wait for a device.

    If the workers have already prefetched the next batch of every rank, no rank can block. Each rank reports this with
    the batch before. Then the next batch is taken without waiting for the exchange, whose result is read one batch
    later.
    """

    def __init__(self, signals: StopSignals | None = None) -> None:
        """Create it for the signals that stop the run. None: the ranks only agree on the end of an epoch if needed."""
        self._signals = signals
        self._status = torch.zeros(len(_Status._fields), dtype=torch.int64)
        self._work: Any = None
        self._may_wait = True  # a rank may have to wait for the next batch
        if signals is not None:
            signals.signal_elsewhere = ranks.announced_stop

    def take(self, fetch: Callable[[], Any], is_next_ready: Callable[[], bool], may_end_early: bool) -> Any:
        """Take the next batch from `fetch`.

        Args:
            fetch: returns the next batch of this rank, or None at the end of its data.
            is_next_ready: returns whether the batch after it is already loaded.
            may_end_early: end the epoch on all ranks when the data of one rank end.

        Returns:
            The batch; None at the end of the data.

        Raises:
            Stopped: a rank received a signal. Raised on all ranks before the same batch.
        """
        if not ranks.world().distributed or (self._signals is None and not may_end_early):
            return self._take_alone(fetch)
        agreed = self._receive_status()
        if agreed.signal:
            raise Stopped(agreed.signal)
        together = self._may_wait or may_end_early
        batch, number = self._fetch(fetch, together)
        self._send_status(_Status(number, batch is None, not is_next_ready()))
        if not together:
            return batch
        agreed = self._receive_status()
        if agreed.signal:
            raise Stopped(agreed.signal)
        return None if agreed.has_no_batch and may_end_early else batch

    def at_epoch_end(self) -> int:
        """Return the highest signal that any rank has received so far, or 0. The result is the same on all ranks."""
        number = 0 if self._signals is None else self._signals.received or 0
        if not ranks.world().distributed:
            return number
        before = self._receive_status().signal
        self._send_status(_Status(number))
        agreed = max(before, self._receive_status().signal)
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
        """Return (the batch, or None if a signal interrupted the wait; the signal's number or 0)."""
        if self._signals is None:
            return fetch(), 0
        batch = None
        with contextlib.suppress(Stopped):
            with self._signals.waiting_for_data() if may_wait else contextlib.nullcontext():
                if not (may_wait and self._signals.received):
                    batch = fetch()
        return batch, self._signals.received or 0

    def _send_status(self, status: _Status) -> None:
        group = ranks.host_group()
        device = ranks.collective_device()
        self._status = torch.tensor(status, dtype=torch.int64, device=device)
        self._work = dist.all_reduce(self._status, dist.ReduceOp.MAX, group=group, async_op=True)

    def _receive_status(self) -> _Status:
        """Wait for the last exchange and return the maximum over all ranks."""
        if self._work is None:
            return _Status()
        ranks.wait(self._work, "its next batch", self._announce_signal)
        self._work = None
        agreed = _Status(*self._status.tolist())
        self._may_wait = bool(agreed.waits_for_next)
        return agreed

    def _announce_signal(self) -> None:
        """Tell the other ranks, which may wait for data, about a signal that only this rank received."""
        if self._signals is not None and self._signals.received is not None:
            ranks.announce_stop(self._signals.received)
