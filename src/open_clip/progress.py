"""Progress of work that takes longer than a few seconds: a bar on a terminal, otherwise a log line every 30 seconds.

Nothing is shown unless a command enables it with `showing`; with several processes, only the first one should.
`Task` counts the items of a loop. `watch` follows a single call, such as writing a file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

logger = logging.getLogger(__name__)

DELAY = 3.0  # seconds before anything is shown
LOG_SECONDS = 30.0  # between two log lines
_POLL_SECONDS = 0.5  # between two updates of `watch`

_is_shown = False
_bars: set[Any] = set()  # currently on the terminal


@contextlib.contextmanager
def showing(is_shown: bool = True) -> Iterator[None]:
    """Context in which tasks show their progress or, with False, do not."""
    global _is_shown
    before, _is_shown = _is_shown, is_shown
    try:
        yield
    finally:
        _is_shown = before


class Task:
    """Work whose progress is shown. Use it as a context manager, which removes the bar on exit.

    Args:
        description: such as "Evaluating imagenet-val".
        total: number of items; None or 0 if it is unknown.
        unit: name of the items in the plural; "B" for bytes.
        is_shown: whether to show progress; None: as set by `showing`.
        delay: seconds before anything is shown.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        unit: str = "",
        is_shown: bool | None = None,
        delay: float = DELAY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description = description
        self.total = total or None
        self.unit = unit
        self.count = 0
        self._is_shown = _is_shown if is_shown is None else is_shown
        self._clock = clock
        self._started = clock()
        self._next_bar = self._started + delay
        self._next_line = self._started + LOG_SECONDS
        self._bar: Any = None

    def advance(self, items: int = 1) -> None:
        """Add to the number of finished items."""
        self.move_to(self.count + items)

    def move_to(self, count: int) -> None:
        """Set the number of finished items, at most `total`."""
        self.count = count if self.total is None else min(count, self.total)
        if not self._is_shown:
            return
        now = self._clock()
        if now >= self._next_bar and _is_terminal():
            self._draw(now)
        if now >= self._next_line:
            self._next_line = now + LOG_SECONDS
            logger.info("%s", self.format_line(now - self._started), extra={"is_progress": True})

    def format_line(self, seconds: float) -> str:
        """Format the log line after `seconds` seconds."""
        parts = [_format_amount(self.count, self.unit)] if self.count else []
        if self.total is not None:
            done = _format_amount(self.count, "B") if self.unit == "B" else f"{self.count:,}"
            parts = [f"{done} of {_format_amount(self.total, self.unit)} ({100 * self.count / self.total:.0f}%)"]
        parts.append(_format_duration(seconds))
        if self.total is not None and 0 < self.count < self.total:
            parts.append(f"about {_format_duration(seconds * (self.total - self.count) / self.count)} left")
        return f"{self.description}: {', '.join(parts)}"

    def _draw(self, now: float) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total,
                desc=self.description,
                unit="B" if self.unit == "B" else f" {self.unit}",
                unit_scale=self.unit == "B",
                bar_format=None if self.total or self.unit else "{desc}: {elapsed}",
                leave=False,
                ncols=None if _has_width() else 80,
                dynamic_ncols=_has_width(),
                file=sys.stderr,
            )
            # Let the bar show the time since the start of the task.
            self._bar.start_t -= now - self._started
            self._bar.last_print_t = self._bar.start_t
            _bars.add(self._bar)
        if self.count == self._bar.n:
            self._bar.refresh()  # only the elapsed time has changed
        else:
            self._bar.update(self.count - self._bar.n)

    def close(self) -> None:
        """Remove the bar. Nothing is shown afterwards."""
        self._is_shown = False
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.close()
            _bars.discard(bar)

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def watch(
    description: str,
    measure: Callable[[], int] | None = None,
    total: int | None = None,
    unit: str = "",
) -> Iterator[None]:
    """Context that shows the progress of its body, from a thread.

    Args:
        description: see `Task`.
        measure: returns the amount done, such as the size of the file being written. None: only the time is shown.
        total: see `Task`.
        unit: see `Task`.
    """
    if not _is_shown:
        yield
        return
    is_over = threading.Event()
    with Task(description, total, unit) as task:

        def poll() -> None:
            done = 0
            while not is_over.wait(_POLL_SECONDS):
                with contextlib.suppress(OSError):  # the measured file may not exist yet, or no longer
                    done = 0 if measure is None else measure()
                task.move_to(done)

        thread = threading.Thread(target=poll, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


class LogHandler(logging.StreamHandler):
    """Handler that writes log lines to stderr without breaking bars, and drops progress lines while a bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        if not _bars:
            super().emit(record)
        elif not getattr(record, "is_progress", False):
            from tqdm import tqdm

            with tqdm.external_write_mode(file=self.stream):
                super().emit(record)


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # stderr is missing or closed
        return False


def _has_width() -> bool:
    """Whether the terminal reports its width. tqdm draws nothing if it reports 0."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # stderr is not a terminal
        return False


def _format_amount(count: int, unit: str) -> str:
    if unit != "B":
        return f"{count:,} {unit}".rstrip()
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _format_duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
