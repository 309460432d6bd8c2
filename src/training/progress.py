"""The progress of an epoch for the log: losses, which stay on the device until a line is due, and speed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from open_clip import device as devices
from training.metrics import AverageMeter
from training.objective import Outputs
from training.ranks import world

_LARGE_SHARE = 0.2  # of the time of an epoch, from which `Progress.bottleneck` names a cause
_MOST_STEPS_AHEAD = 2  # if the host waits for the device for more steps, the device was never idle


class Writer(Protocol):
    """Reports metrics, such as `training.logger.MetricsWriter`."""

    def write(self, metrics: Mapping[str, float], step: int, prefix: str) -> None: ...


class NoWriter:
    """A writer that writes nothing."""

    def write(self, metrics: Mapping[str, float], step: int, prefix: str) -> None:
        pass


class Progress:
    """Losses and speed of an epoch. A resumed run continues from its state.

    `report` gives figures of the steps since the last report. The meters have the averages of the epoch.

    Attributes:
        log_every_n_steps: a report is due after the first step of an epoch, and then after every n steps.
        writer: gets the numbers of each report.
        meters: losses by name.
    """

    def __init__(
        self,
        device: torch.device,
        log_every_n_steps: int = 100,
        writer: Writer | None = None,
        pairs_at_peak: float | None = None,
    ) -> None:
        """Create it.

        Args:
            writer: None: write nothing.
            pairs_at_peak: pairs per second that one device could train on, for the MFU; None: unknown.
        """
        self.log_every_n_steps = log_every_n_steps
        self.writer = NoWriter() if writer is None else writer
        self._device = device
        self._pairs_at_peak = pairs_at_peak
        self.end_epoch()

    def start_epoch(self) -> None:
        """Start the clock. The time from the loaded state, if any, is added."""
        self._is_running = True
        self._started = time.perf_counter() - self._seconds_before

    def end_epoch(self) -> None:
        """Forget the epoch."""
        self.meters: dict[str, AverageMeter] = {}
        self._is_running = False
        self._seconds_before = 0.0
        self._started = time.perf_counter()
        self._epoch_seconds = dict.fromkeys(("all", "data", "saving"), 0.0)  # not of the first report
        self._start_report()

    def _start_report(self) -> None:
        self._sums: Outputs = {}  # of the losses of good steps, on the device
        self._bad: Tensor | int = 0  # number of steps that were not finite, whose losses do not count
        self._steps = 0
        self._samples = 0
        self._data_seconds = 0.0
        self._save_seconds = 0.0

    def add(self, losses: Outputs, samples: int, data_seconds: float, bad: Tensor | bool = False) -> None:
        """Add a step.

        Args:
            losses: scalars on the device.
            samples: of all ranks.
            data_seconds: how long the step has waited for data.
            bad: whether the step does not count; a scalar on the device, or False.
        """
        if isinstance(bad, Tensor):
            losses = {name: torch.where(bad, 0, loss) for name, loss in losses.items()}
            self._bad = self._bad + bad
        sums = self._sums
        self._sums = {name: sums[name] + loss if name in sums else loss for name, loss in losses.items()}
        self._steps += 1
        self._samples += samples
        self._data_seconds += data_seconds

    def add_saving(self, seconds: float) -> None:
        """Add the time for which the loop has waited for saving."""
        self._save_seconds += seconds

    def exclude(self, seconds: float) -> None:
        """Leave time out of the speeds, such as that of compiling."""
        self._started += seconds

    def report(self, logit_scale: Tensor | None = None, counters: Outputs | None = None) -> dict[str, float]:
        """Return the numbers by their names in TensorBoard, with losses as means over the steps. Waits for the device.

        Args:
            logit_scale: logarithm of the scale.
            counters: scalars on the device to add to the result.
        """
        good = self._steps - self._bad
        scalars = {name: value / good for name, value in self._sums.items()}
        if logit_scale is not None:
            scalars["scale"] = logit_scale.detach().exp().mean()
        if isinstance(self._bad, Tensor):
            scalars["bad"] = self._bad
        scalars |= counters or {}
        # one copy for all
        stacked = torch.stack([scalar.float() for scalar in scalars.values()])
        asked = time.perf_counter()
        fetched = dict(zip(scalars, stacked.tolist(), strict=True))
        now = time.perf_counter()
        seconds = max(now - self._started, 1e-9)
        self._add_to_epoch(seconds, waited_for_device=now - asked)
        counted = self._steps - int(fetched.pop("bad", 0))
        for name in self._sums if counted else ():
            self.meters.setdefault(name, AverageMeter()).update(fetched[name], counted)
        per_device = self._samples / seconds / world().world_size
        numbers = {
            "data_time": self._data_seconds / self._steps,
            "batch_time": seconds / self._steps,
            "samples_per_second": self._samples / seconds,
            "samples_per_second_per_gpu": per_device,
            **fetched,
        }
        if self._save_seconds:
            numbers["save_time"] = self._save_seconds
        if self._pairs_at_peak is not None:
            numbers["mfu"] = per_device / self._pairs_at_peak
        self._start_report()
        self._started = time.perf_counter()
        return numbers

    def _add_to_epoch(self, seconds: float, waited_for_device: float) -> None:
        totals = self._epoch_seconds
        if not totals["all"]:
            totals["all"] = 1e-9  # the first report includes the start of the workers and compilation
            return
        totals["all"] += seconds
        totals["saving"] += self._save_seconds
        if waited_for_device <= _MOST_STEPS_AHEAD * seconds / self._steps:
            totals["data"] += self._data_seconds

    def bottleneck(self) -> str:
        """Return a sentence if waiting for data or for saving took a large part of the epoch, otherwise ""."""
        data, saving = (
            self._epoch_seconds[name] / max(self._epoch_seconds["all"], 1e-9) for name in ("data", "saving")
        )
        if max(data, saving) < _LARGE_SHARE:
            return ""
        if saving > data:
            return f"Waiting for saving took {saving:.0%} of the epoch. Save less often, or without --sync-save."
        return f"Waiting for data took {data:.0%} of the epoch. Use more --workers or faster storage."

    def state_dict(self) -> dict[str, Any]:
        """Return the state, {} between two epochs. Its tensors are on the device."""
        if not self._is_running:
            return {}
        return {
            "meters": {name: vars(meter).copy() for name, meter in self.meters.items()},
            "sums": self._sums,
            "bad": self._bad,
            "steps": self._steps,
            "samples": self._samples,
            "data_seconds": self._data_seconds,
            "seconds": time.perf_counter() - self._started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.end_epoch()
        if not state_dict:
            return
        bad = state_dict["bad"]
        self._sums = {name: value.to(self._device) for name, value in state_dict["sums"].items()}
        self._bad = bad.to(self._device) if isinstance(bad, Tensor) else bad
        self._steps = state_dict["steps"]
        self._samples = state_dict["samples"]
        self._data_seconds = state_dict["data_seconds"]
        self._seconds_before = state_dict["seconds"]
        self._started = time.perf_counter() - self._seconds_before
        self._is_running = True
        for name, values in state_dict["meters"].items():
            vars(self.meters.setdefault(name, AverageMeter())).update(values)


def format_line(numbers: Mapping[str, float], progress: Progress, state: Any) -> str:
    """Format a log line as open_clip does.

    Args:
        numbers: the result of `Progress.report`, and "lr".
        state: the TrainState.
    """
    total = str(state.samples_per_epoch)
    percent = 100 * state.epoch_step / state.steps_per_epoch
    parts = [
        f"Train Epoch: {state.epoch} [{state.epoch_samples:>{len(total)}}/{total} ({percent:.0f}%)]",
        f"Data (t): {numbers['data_time']:.3f}",
        f"Batch (t): {numbers['batch_time']:.3f},",
        f"{numbers['samples_per_second']:.6g}/s, {numbers['samples_per_second_per_gpu']:.6g}/s/device",
        f"LR: {numbers['lr']:.6g}",
    ]
    if "mfu" in numbers:
        parts.append(f"MFU: {numbers['mfu']:.1%}")
    if "scale" in numbers:
        parts.append(f"Logit Scale: {numbers['scale']:.3f}")
    for name, meter in progress.meters.items():
        parts.append(f"{name.capitalize()}: {meter.val:#.5g} ({meter.avg:#.5g})")
    if "save_time" in numbers:
        parts.append(f"Save (t): {numbers['save_time']:.3f}")
    for name, words in (
        ("skipped_steps", "Bad steps"),
        ("scaler_overflows", "Overflows"),
        ("recompiles", "Recompiles"),
    ):
        if numbers.get(name):
            parts.append(f"{words}: {numbers[name]:.0f}")
    device = state.device
    memory = devices.get(device).memory(device.index)
    if memory:
        parts.append(f"Memory: {memory['allocated'] / 2**30:.2f} GiB (peak {memory['peak'] / 2**30:.2f})")
    return " ".join(parts)
