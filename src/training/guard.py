"""Steps whose numbers are no numbers: skipped on all ranks together, counted, and in the end a reason to stop.

A loss that is not finite makes every gradient of its rank NaN, by a factor of 1 or NaN; the average over the ranks,
which there is anyway, makes it NaN on all. So all ranks see the same norm of the gradient and decide alike, without a
word between them. The decision stays on the device: torch's fused optimizers take it as `found_inf` and then leave
weights, moments and step count as they are. For other optimizers the host waits for it, as with a gradient scaler.
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

from open_clip.whole_file import write_text
from training import distributed

logger = logging.getLogger(__name__)

COUNTERS = ("skipped_steps", "bad_in_a_row", "scaler_overflows")


class TooManyBadSteps(ValueError):
    """So many steps in a row had a loss or gradient that is not finite that the run cannot go on by itself."""


class StepGuard:
    """Decides on each step, and counts. `skipped` is whether the last one was none: a bool scalar on the device.

    After `max_in_a_row` bad steps in a row (0: however many) it lets none through any more, so that the weights are
    those from before them when the host learns of it, by `check`.
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
        """folder: of the run, for the file that names the samples. remembered: steps whose samples it can name."""
        self.max_in_a_row = max_in_a_row
        self.folder = folder
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._on_device = bool(optimizer.defaults.get("fused"))
        self._counts = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        self._loss_is_bad = self.bad = self.skipped = torch.zeros((), dtype=torch.bool, device=device)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._statistics = [b for m in norms for b in m.buffers()]  # which a forward pass changes
        self._before: list[Tensor] = []
        self._one, self._nan = torch.tensor([1.0, torch.nan], device=device)  # here: in a step each would be a launch
        self._keys: deque[tuple[int, list[str]]] = deque(maxlen=remembered)

    def begin(self, number: int, batches: Iterable[Mapping[str, Any]]) -> None:
        """Before the forward pass of step `number`."""
        self._keys.append((number, [key for batch in batches for key in batch.get("key", ())]))
        if self._statistics:
            self._before = [buffer.clone() for buffer in self._statistics]

    def marked(self, loss: Tensor) -> Tensor:
        """The loss, whose backward pass gives NaN everywhere if it is not finite (or no step is let through)."""
        self._loss_is_bad = ~torch.isfinite(loss.detach())
        stopped = self._counts[1] >= self.max_in_a_row if self.max_in_a_row else torch.zeros_like(self._loss_is_bad)
        return loss * torch.where(self._loss_is_bad | stopped, self._nan, self._one)

    def norm(self) -> Tensor:
        """Of all gradients (times the scaler's factor where they are still scaled)."""
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def step(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """The optimizer's step, unless the gradient's norm is not finite; the same on all ranks."""
        self.bad = self.skipped = ~torch.isfinite(norm)
        if self._on_device:
            optimizer.found_inf = self.bad.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif not self.bad:
            optimizer.step()
        self._count()

    def scaled_step(self, optimizer: torch.optim.Optimizer, scaler: Any, norm: Tensor) -> None:
        """The same with a gradient scaler, which sees by itself that there are infinities and skips them.

        They are its own affair, unless a rank's loss is not finite, or its factor is no more than 1 already.
        """
        self.skipped = ~torch.isfinite(norm)
        loss_is_bad = self._loss_is_bad.float()
        if distributed.world().distributed:
            dist.all_reduce(loss_is_bad, dist.ReduceOp.MAX)
        factor = scaler.scale(torch.ones_like(loss_is_bad))
        self.bad = self.skipped & ((loss_is_bad > 0) | (factor <= 1))
        scaler.step(optimizer)
        scaler.update()
        self._count()

    def _count(self) -> None:
        skipped, in_a_row, overflows = self._counts.unbind()
        bad = self.bad.long()
        self._counts = torch.stack([skipped + bad, (in_a_row + 1) * bad, overflows + (self.skipped.long() - bad)])
        for buffer, before in zip(self._statistics, self._before, strict=bool(self._before)):
            torch.where(self.skipped, before, buffer, out=buffer)

    def counters(self) -> dict[str, Tensor]:
        """Scalars on the device, by COUNTERS: steps skipped, how many of them at the end, overflows of the scaler."""
        return dict(zip(COUNTERS, self._counts.unbind(), strict=True))

    def check(self, bad_in_a_row: int) -> None:
        """Raises TooManyBadSteps, after writing down which samples they had; each rank writes its own."""
        if not self.max_in_a_row or bad_in_a_row < self.max_in_a_row:
            return
        steps = list(self._keys)[-bad_in_a_row:][: self.max_in_a_row]
        where = ""
        if self.folder is not None:
            path = self.folder / f"bad_steps-{distributed.world().rank}.json"
            write_text(path, json.dumps(dict(steps), indent=1))
            where = f" The samples of these steps on this process are in {path}."
        raise TooManyBadSteps(
            f"{self.max_in_a_row} steps in a row had a loss or gradient that is not finite (--max-bad-steps). None of "
            f"them has changed the weights.{where} If the data are right, try --precision amp_bf16 or fp32, a lower "
            "--lr, a longer --warmup, or --grad-clip-norm 1."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._counts = state["counts"].to(self._counts.device)
