"""Fork worker processes, and fork again if a child does not start. For systems that can fork.

A fork copies only the thread that calls it. A lock that another thread holds at that moment, inside the interpreter or
a library, stays locked in the child, which may wait for it before it runs any Python, and a data loader waits for its
workers without a limit. Before Python 3.10.15 and 3.11.10, a thread of gloo that frees a tensor is enough
(https://github.com/python/cpython/issues/112275).
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.popen_fork
from typing import Any

logger = logging.getLogger(__name__)

_START_TIMEOUTS = (5.0, 10.0, 20.0, 40.0)  # seconds, of each attempt; a child needs milliseconds


class _Process(multiprocessing.context.ForkProcess):
    """A process that writes to `started` when it runs."""

    started: multiprocessing.connection.Connection

    @staticmethod
    def _Popen(process: Any) -> _Popen:  # the name that multiprocessing calls
        return _Popen(process)

    def _bootstrap(self, *args: Any, **options: Any) -> int:
        with self.started:
            self.started.send_bytes(b"1")
        return super()._bootstrap(*args, **options)  # type: ignore[misc]


class _Popen(multiprocessing.popen_fork.Popen):
    """Forks again, after killing the child, if it does not start.

    Raises:
        RuntimeError: no child has started.
    """

    def _launch(self, process: _Process) -> None:
        for seconds in _START_TIMEOUTS:
            if self._starts(process, seconds):
                return
            logger.warning("A worker process did not start within %g s. It was killed.", seconds)
        raise RuntimeError(
            f"A worker process did not start in {len(_START_TIMEOUTS)} attempts. A thread of this process may hold a "
            "lock that it needs. Use --workers 0 to load the data without workers."
        )

    def _starts(self, process: _Process, seconds: float) -> bool:
        """Fork, and return whether the child runs within `seconds`. If not, or after an exception, kill it."""
        reader, writer = multiprocessing.Pipe(duplex=False)
        process.started = writer
        with reader:
            with writer:
                super()._launch(process)  # type: ignore[misc]
            is_started = False
            try:
                is_started = reader.poll(seconds)  # also True if the child has ended, which the loader reports
            finally:
                if not is_started:
                    self._end()
        return is_started

    def _end(self) -> None:
        self.kill()
        self.wait()
        self.close()  # the pipes to the child
        self.returncode = None


class ForkContext(multiprocessing.context.ForkContext):
    """A context for a DataLoader, whose workers are started again if they do not start."""

    Process = _Process
