"""What an epoch has come to, for the log: losses, which stay on the device until a line is due, and the pace."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from open_clip import device as devices
from training.metrics import AverageMeter
from training.objective import Outputs
from training.ranks import world


@dataclass
class Progress:
    """What an epoch has come to: its losses, summed on the device, and its pace.

    Numbers are of the steps since the last `report`, averages of the epoch. `bad` of the steps were skipped by the
    guard: their losses count for nothing.
    """

    objective_losses: dict[str, AverageMeter] = field(default_factory=dict)
    sums: Outputs = field(default_factory=dict)
    bad: Tensor | float = 0
    steps: int = 0
    samples: int = 0
    data_seconds: float = 0.0
    save_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, losses: Outputs, samples: int, data_seconds: float, bad: Tensor | None = None) -> None:
        """One step: its losses on the device, its samples over all ranks, and how long it waited for data."""
        if bad is not None:
            losses = {name: torch.where(bad, 0, loss) for name, loss in losses.items()}
            self.bad = self.bad + bad
        self.sums = {name: self.sums[name] + loss if name in self.sums else loss for name, loss in losses.items()}
        self.steps += 1
        self.samples += samples
        self.data_seconds += data_seconds

    def report(self, logit_scale: Tensor | None, counters: Outputs | None = None) -> dict[str, float]:
        """The numbers by TensorBoard's names, losses as means over the steps. Waits for the device.

        counters: scalars on the device that are fetched with them.
        """
        good = self.steps - self.bad
        scalars = {name: value / good for name, value in self.sums.items()}
        if logit_scale is not None:
            scalars["scale"] = logit_scale.detach().exp().mean()
        if isinstance(self.bad, Tensor):
            scalars["bad"] = self.bad
        scalars |= counters or {}
        # one copy for all
        values = torch.stack([scalar.float() for scalar in scalars.values()]).tolist()
        fetched = dict(zip(scalars, values, strict=True))
        seconds = max(time.perf_counter() - self.started, 1e-9)
        counted = self.steps - int(fetched.pop("bad", 0))
        for name in self.sums if counted else ():
            self.objective_losses.setdefault(name, AverageMeter()).update(fetched[name], counted)
        numbers = {
            "data_time": self.data_seconds / self.steps,
            "batch_time": seconds / self.steps,
            "samples_per_second": self.samples / seconds,
            "samples_per_second_per_gpu": self.samples / seconds / world().world_size,
            **fetched,
        }
        if self.save_seconds:
            numbers["save_time"] = self.save_seconds
        self.sums, self.bad, self.steps, self.samples = {}, 0, 0, 0
        self.data_seconds, self.save_seconds = 0.0, 0.0
        self.started = time.perf_counter()
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to log what the unbroken one would have; its tensors are on the device."""
        return {
            "meters": {name: vars(meter).copy() for name, meter in self.objective_losses.items()},
            "sums": self.sums,
            "bad": self.bad,
            "steps": self.steps,
            "samples": self.samples,
            "data_seconds": self.data_seconds,
            "seconds": time.perf_counter() - self.started,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device) -> Progress:
        """From `state_dict`; a new one from an empty dict."""
        if not state:
            return cls()
        progress = cls(
            sums={name: value.to(device) for name, value in state["sums"].items()},
            bad=state["bad"].to(device) if isinstance(state["bad"], Tensor) else state["bad"],
            steps=state["steps"],
            samples=state["samples"],
            data_seconds=state["data_seconds"],
            started=time.perf_counter() - state["seconds"],
        )
        for name, values in state["meters"].items():
            vars(progress.objective_losses.setdefault(name, AverageMeter())).update(values)
        return progress


def format_line(
    numbers: dict[str, float],
    progress: Progress,
    state: Any,
    device: torch.device,
) -> str:
    """A line of log, in the form that open_clip's have."""
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
    for name, meter in progress.objective_losses.items():
        parts.append(f"{name.capitalize()}: {meter.val:#.5g} ({meter.avg:#.5g})")
    if "save_time" in numbers:
        parts.append(f"Save (t): {numbers['save_time']:.3f}")
    for name, words in (("skipped_steps", "Bad steps"), ("scaler_overflows", "Overflows")):
        if numbers.get(name):
            parts.append(f"{words}: {numbers[name]:.0f}")
    memory = devices.get(device).memory(device.index)
    if memory:
        parts.append(f"Memory: {memory['allocated'] / 2**30:.2f} GiB (peak {memory['peak'] / 2**30:.2f})")
    return " ".join(parts)
