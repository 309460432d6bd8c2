"""Signals that ask a run to stop: at the end of a step, with a checkpoint, on all ranks together.

SIGTERM and SIGUSR1 (what schedulers send before they take a machine) and the first Ctrl-C are only noted while steps
are made; elsewhere (data and model are being built) they end the process at once, by an exception. A second Ctrl-C
always does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from training import distributed

EXIT_STATUS = 143  # 128 + SIGTERM: what schedulers know for "ended as it was told to"
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
_ANOTHER_CTRL_C = 1.0  # seconds; sooner it is the same, delivered by the terminal and by the launcher


class Stopped(SystemExit):
    """The run was told to stop by a signal, and does; its code is the exit status."""

    def __init__(self, number: int) -> None:
        super().__init__(130 if number == signal.SIGINT else EXIT_STATUS)
        self.name = signal.Signals(number).name


class StopSignals(contextlib.AbstractContextManager):
    """Listens to the signals while it is entered; not in a thread other than the main one, where Python cannot."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The launcher, seeing one process end, tells the others once more, who are about to. Python ends with its own
        # handlers taken down: only what the system ignores is ignored to the last.
        ends = kind is not None and issubclass(kind, Stopped)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if ends and number != signal.SIGINT else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None and time.monotonic() - self._since > _ANOTHER_CTRL_C
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if self.received is not None:
            return
        self.received, self._since = number, time.monotonic()
        if not self._deferred:
            raise Stopped(number)
        # Not by the log, which this may have interrupted.
        os.write(2, f"{Stopped(number).name}: saving after this step, then stopping. Ctrl-C: at once.\n".encode())

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted in `received`."""
        self._deferred = True
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


class Agreement:
    """A number that the ranks agree on at every step: the highest that any of them told, known to all one step later.

    A rank may get a signal that the others do not get, or not in the same step. The exchange is between hosts and runs
    beside the step: neither device nor host waits for it, unless a rank is a whole step behind.
    """

    def __init__(self) -> None:
        self._told = torch.zeros(1, dtype=torch.int64)
        self._underway: Any = None

    def tell(self, number: int) -> int:
        """At the end of a step, on every rank; what was agreed on at the end of the one before. Alone: `number`."""
        if not distributed.world().distributed:
            return number
        agreed = self.settle()
        self._told = torch.tensor([number])
        group = distributed.host_group()
        self._underway = dist.all_reduce(self._told, dist.ReduceOp.MAX, group=group, async_op=True)
        return agreed

    def settle(self) -> int:
        """What was told last, now; 0 where nothing is underway."""
        if self._underway is None:
            return 0
        self._underway.wait()
        self._underway = None
        return int(self._told)
