"""The progress of an epoch for the log: losses, which stay on the device until a line is due, and speed."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from open_clip import device as devices
from training.metrics import AverageMeter
from training.objective import Outputs
from training.ranks import world

_NO_TOKENS: Mapping[str, int] = {}
_LARGE_SHARE = 0.2  # of the time of an epoch, from which `Progress.bottleneck` names a cause
_TOKENS = "_tokens_per_second_per_gpu"  # ends the names of speeds
_MOST_STEPS_AHEAD = 2  # if the host waits for the device for more steps, the device was never idle


class Writer(Protocol):
    """Reports metrics, such as `training.logger.MetricsWriter`."""

    def write(self, metrics: Mapping[str, float], step: int, prefix: str) -> None: ...


class NoWriter:
    """A writer that writes nothing."""

    def write(self, metrics: Mapping[str, float], step: int, prefix: str) -> None:
        pass


@dataclass
class _Window:
    """Figures of some steps, on the host. Losses are means over the good steps. Tokens are those of this process."""

    steps: int = 0
    good: int = 0
    samples: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    save_seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, other: _Window) -> None:
        """Add the figures of later steps."""
        self.steps += other.steps
        self.good += other.good
        self.samples += other.samples
        self.seconds += other.seconds
        self.data_seconds += other.data_seconds
        self.save_seconds += other.save_seconds
        self.tokens = dict(Counter(self.tokens) + Counter(other.tokens))
        for name, loss in other.losses.items():
            before = self.losses.get(name, 0.0)
            if other.good:
                weight = other.good / self.good
                self.losses[name] = loss if weight == 1 else before + (loss - before) * weight
            elif not self.good:
                self.losses[name] = loss  # nan

    def numbers(self, pairs_at_peak: float | None) -> dict[str, float]:
        """Return the figures by their names in TensorBoard."""
        per_device = self.samples / self.seconds / world().world_size
        numbers = {
            "data_time": self.data_seconds / self.steps,
            "batch_time": self.seconds / self.steps,
            "samples_per_second": self.samples / self.seconds,
            "samples_per_second_per_gpu": per_device,
            **{f"{name}{_TOKENS}": tokens / self.seconds for name, tokens in self.tokens.items()},
            **self.losses,
        }
        if self.save_seconds:
            numbers["save_time"] = self.save_seconds
        if pairs_at_peak is not None:
            numbers["mfu"] = per_device / pairs_at_peak
        return numbers


class Progress:
    """Losses and speed of an epoch. A resumed run continues from its state.

    `report` gives figures of the steps since the last report, and `point` of those since the last point. The meters
    have the averages of the epoch.

    Attributes:
        log_every_n_steps: a report is due after the first step of an epoch, and then after every n steps.
        log_metric_every_n_steps: the same for points; None: the reports are the points.
        writer: gets the numbers of each point.
        meters: losses by name.
    """

    def __init__(
        self,
        device: torch.device,
        log_every_n_steps: int = 100,
        writer: Writer | None = None,
        pairs_at_peak: float | None = None,
        log_metric_every_n_steps: int | None = None,
        loss_average_samples: int | None = None,
    ) -> None:
        """Create it.

        Args:
            writer: None: write nothing.
            pairs_at_peak: pairs per second that one device could train on, for the MFU; None: unknown.
            loss_average_samples: N of the moving averages of the losses, in which a loss from n samples ago has the
                weight exp(-n/N). None: there are none.
        """
        self.log_every_n_steps = log_every_n_steps
        self.log_metric_every_n_steps = log_metric_every_n_steps
        self.writer = NoWriter() if writer is None else writer
        self._device = device
        self._pairs_at_peak = pairs_at_peak
        self._loss_average_samples = loss_average_samples
        self._loss_averages: dict[str, float] = {}
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
        self._epoch_seconds = dict.fromkeys(("all", "data", "saving"), 0.0)  # not of the first window
        self._line, self._point = _Window(), _Window()
        self._latest: dict[str, float] = {}  # numbers that are not averaged
        self._start_window()

    def _start_window(self) -> None:
        self._sums: Outputs = {}  # of the losses of good steps, on the device
        self._bad: Tensor | int = 0  # number of steps that were not finite, whose losses do not count
        self._steps = 0
        self._samples = 0
        self._tokens: Counter[str] = Counter()
        self._data_seconds = 0.0
        self._save_seconds = 0.0

    def add(
        self,
        losses: Outputs,
        samples: int,
        data_seconds: float,
        bad: Tensor | bool = False,
        tokens: Mapping[str, int] = _NO_TOKENS,
    ) -> None:
        """Add a step.

        Args:
            losses: scalars on the device.
            samples: of all ranks.
            data_seconds: how long the step has waited for data.
            bad: whether the step does not count; a scalar on the device, or False.
            tokens: how many this process has computed, by the name of the input. Their speeds are then reported.
        """
        if isinstance(bad, Tensor):
            losses = {name: torch.where(bad, 0, loss) for name, loss in losses.items()}
            self._bad = self._bad + bad
        sums = self._sums
        self._sums = {name: sums[name] + loss if name in sums else loss for name, loss in losses.items()}
        self._steps += 1
        self._samples += samples
        self._tokens.update(tokens)
        self._data_seconds += data_seconds

    def add_saving(self, seconds: float) -> None:
        """Add the time for which the loop has waited for saving."""
        self._save_seconds += seconds

    def exclude(self, seconds: float) -> None:
        """Leave time out of the speeds, such as that of compiling."""
        self._started += seconds

    def is_line_due(self, step: int) -> bool:
        """Return whether a report is due after `step` steps of the epoch."""
        return (step - 1) % self.log_every_n_steps == 0

    def is_point_due(self, step: int) -> bool:
        """Return whether a point of --log-metric-every-n-steps is due after `step` steps of the epoch."""
        every = self.log_metric_every_n_steps
        return every is not None and (step - 1) % every == 0

    def report(self, logit_scale: Tensor | None = None, counters: Outputs | None = None) -> dict[str, float]:
        """Return the numbers by their names in TensorBoard, with losses as means over the steps. Waits for the device.

        Args:
            logit_scale: logarithm of the scale.
            counters: scalars on the device to add to the result.
        """
        self._fetch(logit_scale, counters)
        numbers = self._line.numbers(self._pairs_at_peak) | self._latest
        self._line = _Window()
        return numbers

    def point(self, logit_scale: Tensor | None = None, counters: Outputs | None = None) -> dict[str, float]:
        """Return the same for the steps since the last point."""
        self._fetch(logit_scale, counters)
        numbers = self._point.numbers(self._pairs_at_peak) | self._latest
        self._point = _Window()
        return numbers

    def _fetch(self, logit_scale: Tensor | None, counters: Outputs | None) -> None:
        """Copy the losses from the device, and add the steps since the last copy to the figures of the host."""
        if not self._steps:
            return
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
        losses = {name: fetched.pop(name) for name in self._sums}
        self._latest = fetched
        window = _Window(
            self._steps, counted, self._samples, seconds, self._data_seconds, self._save_seconds, losses,
            dict(self._tokens),
        )  # fmt: skip
        self._line.add(window)
        if self.log_metric_every_n_steps is not None:
            self._point.add(window)
        if counted:
            self._add_losses(window)
        self._start_window()
        self._started = time.perf_counter()

    def _add_losses(self, window: _Window) -> None:
        for name, loss in window.losses.items():
            self.meters.setdefault(name, AverageMeter()).update(loss, window.good)
            if self._loss_average_samples is not None:
                samples = window.samples * window.good / window.steps
                kept = math.exp(-samples / self._loss_average_samples)
                before = self._loss_averages.get(name, loss)
                self._loss_averages[name] = kept * before + (1 - kept) * loss

    def loss_average(self, name: str) -> float:
        """Return the moving average of a loss, or its average over the epoch if there are no moving averages."""
        return self._loss_averages.get(name, self.meters[name].avg)

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
        """Return the state. Between two epochs it has the moving averages only. Its tensors are on the device."""
        state: dict[str, Any] = {"loss_averages": self._loss_averages.copy()} if self._loss_averages else {}
        if not self._is_running:
            return state
        state |= {
            "meters": {name: vars(meter).copy() for name, meter in self.meters.items()},
            "sums": self._sums,
            "bad": self._bad,
            "steps": self._steps,
            "samples": self._samples,
            "data_seconds": self._data_seconds,
            "seconds": time.perf_counter() - self._started,
        }
        if self._tokens:
            state["tokens"] = dict(self._tokens)
        windows = {"line": self._line, "point": self._point}
        return state | {name: asdict(window) for name, window in windows.items() if window.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.end_epoch()
        if self._loss_average_samples is not None:
            self._loss_averages = dict(state_dict.get("loss_averages", {}))
        if "meters" not in state_dict:
            return
        bad = state_dict["bad"]
        self._sums = {name: value.to(self._device) for name, value in state_dict["sums"].items()}
        self._bad = bad.to(self._device) if isinstance(bad, Tensor) else bad
        self._steps = state_dict["steps"]
        self._samples = state_dict["samples"]
        self._tokens = Counter(state_dict.get("tokens", {}))
        self._data_seconds = state_dict["data_seconds"]
        self._seconds_before = state_dict["seconds"]
        self._started = time.perf_counter() - self._seconds_before
        self._line = _Window(**state_dict.get("line", {}))
        self._point = _Window(**state_dict.get("point", {}))
        self._is_running = True
        for name, values in state_dict["meters"].items():
            vars(self.meters.setdefault(name, AverageMeter())).update(values)


def _format_speeds(numbers: Mapping[str, float]) -> Iterator[str]:
    yield f"{numbers['samples_per_second']:.6g}/s"
    yield f"{numbers['samples_per_second_per_gpu']:.6g}/s/device"
    for name, speed in numbers.items():
        if name.endswith(_TOKENS):
            yield f"{speed:.6g} {name.removesuffix(_TOKENS)} tokens/s/device"


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
        ", ".join(_format_speeds(numbers)),
        f"LR: {numbers['lr']:.6g}",
    ]
    if "mfu" in numbers:
        parts.append(f"MFU: {numbers['mfu']:.1%}")
    if "scale" in numbers:
        parts.append(f"Logit Scale: {numbers['scale']:.3f}")
    for name, meter in progress.meters.items():
        loss = meter.val if math.isnan(numbers[name]) else numbers[name]  # no good step since the last line
        parts.append(f"{name.capitalize()}: {loss:#.5g} ({progress.loss_average(name):#.5g})")
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
