"""A gradient scaler for NPUs that decides on the device whether to skip a step, if the optimizer supports it.

torch_npu's scaler (torch_npu/npu/amp/grad_scaler.py) waits for the NPU three times per step: twice for the overflow
check, and once for the number of steps since the last change of the scale.
"""

from __future__ import annotations

from typing import Any

import torch


def create(scaler_class: type, saturates: bool, **options: Any) -> Any:
    """Create a subclass instance of torch_npu's scaler that does not wait for optimizers with `skips_on_device`.

    Such optimizers have `gradient_norm`, `scale_gradients` and `found_inf` (training.flat_adamw). With other
    optimizers, with dynamic=False, and on chips that saturate (the first 910, 310P), it works exactly as torch_npu's
    scaler: saturating chips report overflows in their status flag only.

    Args:
        scaler_class: torch_npu's GradScaler.
        saturates: `Device.saturates`, so that a step need not query it.
        options: of the scaler.
    """
    return type("GradScaler", (_DeviceDecision, scaler_class), {"_saturates": saturates})(**options)


class _DeviceDecision:
    """Overrides of torch_npu's GradScaler."""

    _saturates: bool
    _dynamic: bool
    _has_overflow: bool
    _scale: torch.Tensor
    _growth_tracker: torch.Tensor
    _growth_factor: float
    _backoff_factor: float
    _growth_interval: int
    _found: torch.Tensor | None = None  # whether this step is skipped; None if the host decides

    @property
    def overflowed(self) -> bool:
        """Whether the host found an overflow in this step. Valid between `step` and `update`."""
        return self._has_overflow

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        if not self._leaves_decision_to(optimizer):
            torch_npu_scaler: Any = super()
            return torch_npu_scaler._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        found = ~torch.isfinite(optimizer.gradient_norm())
        optimizer.scale_gradients(inv_scale)
        self._found = found if self._found is None else self._found | found
        return {found.device: found}

    def _maybe_opt_step(self, optimizer: Any, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not self._leaves_decision_to(optimizer):
            torch_npu_scaler: Any = super()
            return torch_npu_scaler._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)
        (optimizer.found_inf,) = optimizer_state["found_inf_per_device"].values()
        return optimizer.step(*args, **kwargs)

    def _npu_update_scale(self) -> None:
        """Lower the scale after an overflow, and raise it after `growth_interval` steps without one."""
        if self._found is None or self._has_overflow:
            torch_npu_scaler: Any = super()
            torch_npu_scaler._npu_update_scale()
        else:
            steps = self._growth_tracker + 1
            is_due = steps == self._growth_interval
            higher = self._scale * self._growth_factor
            scale = torch.where(is_due & torch.isfinite(higher), higher, self._scale)
            self._scale = torch.where(self._found, self._scale * self._backoff_factor, scale)
            self._growth_tracker = steps.masked_fill_(self._found | is_due, 0)
        self._found = None

    def _leaves_decision_to(self, optimizer: Any) -> bool:
        return bool(getattr(optimizer, "skips_on_device", False) and self._dynamic and not self._saturates)
