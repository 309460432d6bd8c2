"""Skip a step on all ranks when the loss or the gradient norm is not finite; abort after too many in a row.

If the loss of a rank is not finite, it is multiplied by NaN (otherwise by 1), so that all gradients of this rank are
NaN. DDP averages the gradients, which makes them NaN on all ranks. Therefore all ranks see the same gradient norm and
take the same decision, without extra communication.

Some optimizers can skip a step on the device: they read the decision from `found_inf` and do not change weights,
moments and step counts. These are FlatAdamW, and torch's AdamW(fused=True) on devices with `fused_adamw_skips`. For
other optimizers the host waits for the decision and does not call `step`.

Limitation: on chips that saturate (the first Ascend 910, 310P) an overflow becomes the largest number and NaN becomes
0, so no value is ever non-finite. There only the gradient scaler (--precision amp) skips steps: it reads the status
flag of the chip, and the guard counts its skips.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from open_clip import device as devices
from open_clip.formats.whole_file import write_text
from training import ranks
from training.flat_adamw import FlatAdamW
from training.gradients import gradient_norm

logger = logging.getLogger(__name__)

COUNTERS = ("skipped_steps", "bad_in_a_row", "scaler_overflows")


class TooManyBadSteps(ValueError):
    """Raised when too many steps were skipped because the loss or gradient was not finite."""


class NoGuard:
    """A guard that never skips a step. It has the interface of StepGuard."""

    decides_on_device = False
    bad: Tensor | bool = False
    skipped: Tensor | bool = False
    _zero = torch.zeros(())

    def begin(self, number: int, batches: Iterable[Mapping[str, Any]]) -> None:
        pass

    def mark(self, loss: Tensor) -> Tensor:
        return loss

    def norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Return 0, because `step` does not need the norm."""
        return self._zero

    def step(self, optimizer: torch.optim.Optimizer, scaler: Any, norm: Tensor) -> None:
        scaler.step(optimizer)

    def counters(self) -> dict[str, Tensor]:
        return {}

    def check(self, numbers: Mapping[str, float]) -> None:
        pass

    def check_run(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class StepGuard(NoGuard):
    """Decides whether to skip each step, and counts the skipped ones.

    After `max_in_a_row` bad steps in a row (0: no limit) every further step is skipped as well, so the weights have not
    changed when the host finds out in `check`.

    Attributes:
        decides_on_device: the optimizer skips steps on the device, so the host does not wait for the decision.
        bad: bool scalar on the device, whether the loss or gradient of the last step was not finite.
        skipped: bool scalar on the device, whether the last step was skipped.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        max_in_a_row: int = 10,
        folder: Path | None = None,
        remembered: int = 110,
    ) -> None:
        """Create the guard.

        Args:
            folder: folder of the run, for the file that lists the samples of bad steps. None: no file.
            remembered: number of last steps whose sample keys are kept.
        """
        self.max_in_a_row = max_in_a_row
        self.folder = folder
        is_flat, is_fused = isinstance(optimizer, FlatAdamW), bool(optimizer.defaults.get("fused"))
        self.decides_on_device = is_flat or (is_fused and devices.get(device).fused_adamw_skips)
        self._flag_dtype = torch.bool if is_flat else torch.float32  # of found_inf
        self._counts = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        self._steps = self._skipped_before = 0  # steps since the start or resume; skipped steps before that
        self._loss_is_bad = self.bad = self.skipped = torch.zeros((), dtype=torch.bool, device=device)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._statistics = [b for m in norms for b in m.buffers()]  # changed by the forward pass
        self._before: list[Tensor] = []
        self._one, self._nan = torch.tensor([1.0, torch.nan], device=device)  # made once to save launches
        self._keys: deque[tuple[int, list[str]]] = deque(maxlen=remembered)

    def begin(self, number: int, batches: Iterable[Mapping[str, Any]]) -> None:
        """Prepare step `number`; call this before its forward pass."""
        self._steps += 1
        self._keys.append((number, [key for batch in batches for key in batch.get("key", ())]))
        if self._statistics:
            self._before = [buffer.clone() for buffer in self._statistics]

    def mark(self, loss: Tensor) -> Tensor:
        """Return the loss times 1, or times NaN if it is not finite or the limit of bad steps is reached."""
        self._loss_is_bad = ~torch.isfinite(loss.detach())
        if self.max_in_a_row:
            self._loss_is_bad |= self._counts[1] >= self.max_in_a_row
        return loss * torch.where(self._loss_is_bad, self._nan, self._one)

    def norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Return the gradient norm, from which `step` decides."""
        return gradient_norm(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, scaler: Any, norm: Tensor) -> None:
        """Update the weights unless the gradient norm is not finite. All ranks decide the same.

        Args:
            scaler: a gradient scaler, after `unscale_` and before `update`. It may be disabled.
        """
        is_bad = ~torch.isfinite(norm)
        if scaler.is_enabled():
            is_bad, is_skipped = self._step_with_scaler(optimizer, scaler, is_bad)
        else:
            self._step_unless(is_bad, optimizer)
            is_skipped = is_bad
        self.bad, self.skipped = is_bad, is_skipped
        self._count(is_bad, is_skipped)

    def _step_unless(self, is_bad: Tensor, optimizer: Any) -> None:
        if self.decides_on_device:
            optimizer.found_inf = is_bad.to(self._flag_dtype)
            optimizer.step()
        elif not is_bad:
            optimizer.step()

    def _step_with_scaler(self, optimizer: Any, scaler: Any, overflows: Tensor) -> tuple[Tensor, Tensor]:
        """Let the scaler decide, which skips steps whose gradients overflow. Return (step is bad, step is skipped).

        A skipped step counts as an overflow. It counts as bad only if the loss of a rank is not finite or the scale has
        fallen to 1. A scaler with `overflowed` (open_clip.device.npu_scaler) may skip a step whose norm is finite.
        """
        loss_is_bad = self._loss_is_bad.float()
        if ranks.world().distributed:
            dist.all_reduce(loss_is_bad, dist.ReduceOp.MAX)
        factor = scaler.scale(torch.ones_like(loss_is_bad))
        scaler.step(optimizer)
        is_skipped = torch.ones_like(overflows) if getattr(scaler, "overflowed", False) else overflows
        return is_skipped & ((loss_is_bad > 0) | (factor <= 1)), is_skipped

    def _count(self, is_bad: Tensor, is_skipped: Tensor) -> None:
        skipped, in_a_row, overflows = self._counts.unbind()
        bad = is_bad.long()
        self._counts = torch.stack([skipped + bad, (in_a_row + 1) * bad, overflows + (is_skipped.long() - bad)])
        # `_before` is empty if `begin` was not called.
        for buffer, before in zip(self._statistics, self._before, strict=bool(self._before)):
            torch.where(is_skipped, before, buffer, out=buffer)

    def counters(self) -> dict[str, Tensor]:
        """Return scalars on the device by the names of COUNTERS: bad steps, those in a row, overflows of the scaler."""
        return dict(zip(COUNTERS, self._counts.unbind(), strict=True))

    def check_run(self) -> None:
        """Check at the end of a run whether all of its steps were skipped. Waits for the device.

        Raises:
            TooManyBadSteps: a loss or gradient was not finite. If the gradient scaler was only lowering its factor, as
                in a run of two steps, this is a warning.
        """
        bad, _, overflows = self._counts.tolist()
        if not self._steps or bad + overflows - self._skipped_before < self._steps:
            return
        if not bad:
            logger.warning(
                "All %d steps of this run were skipped while the gradient scaler lowered its factor, so the weights "
                "have not changed. Train for more steps, or with --precision amp_bf16, which needs no scaler.",
                self._steps,
            )
            return
        raise TooManyBadSteps(
            f"All {self._steps} steps of this run were skipped ({bad} had a loss or gradient that is not finite, "
            f"{overflows} an overflow of the gradient scaler), so the weights have not changed. If the data are right, "
            "try --precision amp_bf16 or fp32, or a lower --lr."
        )

    def check(self, numbers: Mapping[str, float]) -> None:
        """Raise TooManyBadSteps if the limit is reached. Each rank first writes the sample keys of these steps.

        Args:
            numbers: the values of `counters`, on the host.
        """
        bad_in_a_row = int(numbers["bad_in_a_row"])
        if not self.max_in_a_row or bad_in_a_row < self.max_in_a_row:
            return
        steps = list(self._keys)[-bad_in_a_row:][: self.max_in_a_row]
        where = ""
        if self.folder is not None:
            path = self.folder / f"bad_steps-{ranks.world().rank}.json"
            write_text(path, json.dumps(dict(steps), indent=1))
            where = f" {path} lists their samples on this process."
        raise TooManyBadSteps(
            f"{self.max_in_a_row} steps in a row had a loss or gradient that is not finite (--max-bad-steps). They did "
            f"not change the weights.{where} If the data are correct, try --precision amp_bf16 or fp32, a lower --lr, "
            "a longer --warmup, or --grad-clip-norm 1."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self._counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        bad, _, overflows = state_dict["counts"].tolist()
        self._steps, self._skipped_before = 0, bad + overflows
        self._counts = state_dict["counts"].to(self._counts.device)
