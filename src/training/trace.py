"""Tracing of some steps of a run with the profiler of the device."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from open_clip import device as devices

logger = logging.getLogger(__name__)


class StepTrace(contextlib.AbstractContextManager):
    """Traces the steps `first` to `end` - 1 of a run into `folder`. The run takes place in its context.

    Args:
        level: how much is traced, see `Device.profiler`.
    """

    def __init__(self, device: torch.device, folder: Path, first: int, end: int, level: int = 0) -> None:
        self._device, self._folder, self._level = device, folder, level
        self._first, self._end = first, end
        self._profiler: Any = None
        self._traced = 0

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace step `number` if it is due. The profiler warms up in the step before the first traced one."""
        if self._profiler is None and self._first - 1 <= number < self._end:
            warmup = max(self._first - number, 0)
            active = self._end - number - warmup
            self._profiler = devices.get(self._device).profiler(
                str(self._folder), wait=0, warmup=warmup, active=active, level=self._level
            )
            self._profiler.start()
        yield
        if self._profiler is not None:
            self._traced += self._first <= number
            self._profiler.step()  # writes the trace after the last step
            if number + 1 >= self._end:
                self._stop()

    def _stop(self) -> None:
        self._profiler.stop()
        self._profiler = None
        logger.info("Traced %d step(s) into %s.", self._traced, self._folder)

    def __exit__(self, *exception: Any) -> None:
        if self._profiler is not None:
            self._stop()
        if not self._traced:
            logger.warning("--profile-steps %d:%d: the run did not make any of these steps.", self._first, self._end)
