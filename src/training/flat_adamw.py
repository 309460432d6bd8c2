"""AdamW on flat buffers. It needs about twenty launches for all parameters, and the device can skip a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.flat_tensors import FlatTensors, flatten_parameters

_HALF = (torch.float16, torch.bfloat16)
_MASTER = "master_weight"  # in the state of a float16 or bfloat16 parameter, in addition to torch's three entries


class FlatAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) with the formula and the state dict of torch.optim.AdamW.

    The parameters are moved into one buffer per device and dtype; they stay the same Parameter objects. Moments are
    float32 buffers, and so is a master copy of the weights if the parameters are float16 or bfloat16.

    Attributes:
        found_inf: bool or float scalar on the device, None: 0. If it is not 0, the next `step` changes neither weights,
            moments nor step counts, for any gradients. The host does not wait for it. `step` resets it.
    """

    skips_on_device = True  # by `found_inf`; read by gradient scalers
    found_inf: Tensor | None = None
    # A gradient scaler of torch unscales `.grad`, then calls `step` if all of it is finite.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        """Create the optimizer. `params` are tensors or groups of them, with their final device and dtype."""
        if not eps > 0:
            raise ValueError(f"eps={eps} must be more than 0, because the update divides by it while moments are 0.")
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._buffers: list[_Buffer] = []
        self._gathered = False
        self._norm: Tensor | None = None  # of the gathered gradients
        self._factor: Tensor | None = None  # of the gathered gradients; applied by `step`
        super().__init__(params, torch.optim.AdamW([torch.zeros(1)]).defaults | given)
        self._flatten(range(len(self.param_groups)))

    @property
    def flats(self) -> list[FlatTensors]:
        """Weights, one entry per device and dtype. The views are in the order of `flat_parameters`."""
        return [buffer.weights for buffer in self._buffers]

    @property
    def flat_parameters(self) -> list[list[Tensor]]:
        """Parameters of each entry of `flats`."""
        return [buffer.parameters for buffer in self._buffers]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._buffers:  # otherwise the constructor flattens all groups together
            self._flatten([len(self.param_groups) - 1])

    def _flatten(self, group_indices: Iterable[int]) -> None:
        members: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, int]]] = {}
        for index in group_indices:
            for p in self.param_groups[index]["params"]:
                members.setdefault((p.device, p.dtype), []).append((p, index))
        self._buffers += [_Buffer([p for p, _ in pairs], [index for _, index in pairs]) for pairs in members.values()]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._gathered = False
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Copy the gradients into the flat buffers. `.grad` is not read again before `step` or `zero_grad`."""
        if not self._gathered:
            for buffer in self._buffers:
                buffer.gather_gradients()
            self._gathered, self._norm, self._factor = True, None, None

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Compute the global 2-norm of the gradients times the factors of `scale_gradients`: a scalar on the device."""
        self.gather_gradients()
        if self._norm is None:
            norms = [torch.linalg.vector_norm(b.gradients.buffer, dtype=b.moment_dtype) for b in self._buffers]
            self._norm = norms[0]
            if len(norms) > 1:
                self._norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))
        return self._norm if self._factor is None else self._norm * self._factor

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply the gathered gradients by a scalar on the device, such as the inverse of a loss scale."""
        self.gather_gradients()
        self._factor = factor if self._factor is None else self._factor * factor

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have gradients.

        Raises:
            RuntimeError: a parameter was moved or replaced after the optimizer was made.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.gather_gradients()
        for buffer in self._buffers:
            if not torch.compiler.is_compiling():  # which sees no addresses
                buffer.check_memory()
            for p in buffer.stepped_parameters():
                if p not in self.state:
                    self.state[p] = buffer.state_of(p)
            buffer.update(self.param_groups, self.found_inf, self._factor)
        self.found_inf, self._norm, self._factor, self._gathered = None, None, None, False
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class or of torch.optim.AdamW.

        Raises:
            ValueError: the state is of other parameters, or of AdamW with amsgrad or maximize.
        """
        saved_groups = state_dict["param_groups"]
        for option in ("amsgrad", "maximize"):
            if any(group.get(option) for group in saved_groups):
                raise ValueError(f"The saved optimizer has {option}=True, which only torch.optim.AdamW supports.")
        super().load_state_dict({**state_dict, "state": {}})  # checks and replaces the groups, runs the hooks
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        keys = [key for group in saved_groups for key in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        saved = {p: state_dict["state"][key] for key, p in zip(keys, own, strict=True) if key in state_dict["state"]}
        for p, state in saved.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != p.shape:
                    raise ValueError(f"a moment is {list(state[name].shape)} and its parameter {list(p.shape)}")
        for buffer in self._buffers:
            buffer.load(saved)
            self.state.update({p: buffer.state_of(p) for p in buffer.parameters if p in saved})


@dataclass
class _Segment:
    """Adjacent parameters of one group that have gradients and were updated in the same steps so far.

    Attributes:
        start, stop: range of elements in the buffers.
        first: index of the first parameter.
        group: index of the parameter group.
        history: number of the history, see `_Buffer`.
    """

    start: int
    stop: int
    first: int
    group: int
    history: int


class _Buffer:
    """Weights, moments, step counts and gradients of the parameters of one device and dtype."""

    def __init__(self, parameters: list[Tensor], groups: list[int]) -> None:
        """Allocate the buffers. `groups` has the index of each parameter's group."""
        self.parameters = parameters
        self._groups = groups
        self._index = {p: index for index, p in enumerate(parameters)}
        self.weights = flatten_parameters(parameters)
        dtype = self.weights.buffer.dtype
        self.moment_dtype = torch.float32 if dtype in _HALF else dtype
        self.gradients = FlatTensors(parameters)
        self._exp_avg = FlatTensors(parameters, self.moment_dtype)
        self._exp_avg_sq = FlatTensors(parameters, self.moment_dtype)
        self._master: FlatTensors | None = None
        if self.moment_dtype != dtype:
            self._master = FlatTensors(parameters, self.moment_dtype)
            self._master.buffer.copy_(self.weights.buffer)
        self._steps = torch.zeros(len(parameters), device=self.weights.buffer.device)
        self._step_views = list(self._steps.unbind())
        self._starts = [int(view.storage_offset()) for view in self.weights.views]
        # Parameters with the same number were updated in the same steps, so they have the same step count.
        self._histories = [0] * len(parameters)
        self._has_gradient: list[bool] = []
        self._counted: Tensor | None = None  # 1 for each parameter with a gradient; None: all have one
        self._segments: list[_Segment] = []

    def check_memory(self) -> None:
        if any(p.data_ptr() != view.data_ptr() for p, view in zip(self.parameters, self.weights.views, strict=True)):
            raise RuntimeError(
                "A parameter was moved, cast or replaced after FlatAdamW was created, which updates its old memory. "
                "Move and cast the model before you create the optimizer."
            )

    def state_of(self, p: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter in the form of torch.optim.AdamW. Its tensors are views of the buffers."""
        index = self._index[p]
        state = {
            "step": self._step_views[index],
            "exp_avg": self._exp_avg.views[index],
            "exp_avg_sq": self._exp_avg_sq.views[index],
        }
        return state if self._master is None else {**state, _MASTER: self._master.views[index]}

    def load(self, saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Load the states of the parameters. Those without a saved state start from zero."""
        states = [saved.get(p, {}) for p in self.parameters]
        self._exp_avg.fill([state.get("exp_avg") for state in states])
        self._exp_avg_sq.fill([state.get("exp_avg_sq") for state in states])
        if self._master is not None:
            self._master.buffer.copy_(self.weights.buffer)
            for view, state in zip(self._master.views, states, strict=True):
                if _MASTER in state:
                    view.copy_(state[_MASTER])
        steps = [float(state.get("step", 0)) for state in states]
        self._steps.copy_(torch.tensor(steps))
        self._histories = _number_values(steps)
        self._has_gradient = []

    def gather_gradients(self) -> None:
        gradients = [p.grad for p in self.parameters]
        has_gradient = [gradient is not None for gradient in gradients]
        if has_gradient != self._has_gradient:
            self._has_gradient = has_gradient
            self._find_segments()
        self.gradients.fill(gradients)

    def stepped_parameters(self) -> list[Tensor]:
        return [p for p, has in zip(self.parameters, self._has_gradient, strict=True) if has]

    def _find_segments(self) -> None:
        """Find the segments of the parameters that have gradients now."""
        self._counted = None
        if not all(self._has_gradient):
            self._counted = torch.tensor(self._has_gradient, dtype=self._steps.dtype, device=self._steps.device)
        self._histories = _number_values(list(zip(self._histories, self._has_gradient, strict=True)))
        stops = [*self._starts[1:], self.weights.buffer.numel()]
        self._segments = []
        for index, has_gradient in enumerate(self._has_gradient):
            start, stop, group, history = self._starts[index], stops[index], self._groups[index], self._histories[index]
            last = self._segments[-1] if self._segments else None
            if not has_gradient:
                continue
            if last is not None and (last.stop, last.group, last.history) == (start, group, history):
                last.stop = stop
            else:
                self._segments.append(_Segment(start, stop, index, group, history))

    def update(self, groups: Sequence[Mapping[str, Any]], found_inf: Tensor | None, factor: Tensor | None) -> None:
        """Do one step of AdamW with the gathered gradients times `factor`. Nothing changes if `found_inf` is not 0.

        To skip a step, its coefficients are multiplied by 0 and its gradients are replaced by 0. A skipped step thus
        does the same operations as any other step, and all values stay the same.
        """
        gradient = self.gradients.buffer.to(self.moment_dtype)
        if factor is not None:
            gradient.mul_(factor)
        if found_inf is None:
            counts = torch.ones((), dtype=self.moment_dtype, device=gradient.device)
        else:
            is_bad = found_inf.to(gradient.device, torch.bool)
            gradient.masked_fill_(is_bad, 0)
            counts = (~is_bad).to(self.moment_dtype)
        self._update_master()
        weights = self.weights.buffer if self._master is None else self._master.buffer
        for segment in self._segments:
            group = groups[segment.group]
            if group["weight_decay"]:
                decay = group["lr"] * group["weight_decay"]
                _part(weights, segment).mul_(1 - counts * decay)
        for run in _join_segments(self._segments, groups, ("betas", "eps")):
            self._update_run(run, weights, gradient, counts, groups)
        self._steps.add_(counts if self._counted is None else counts * self._counted)
        if self._master is not None:
            self.weights.buffer.copy_(self._master.buffer)

    def _update_run(
        self, run: _Segment, weights: Tensor, all_gradients: Tensor, counts: Tensor, groups: Sequence[Mapping[str, Any]]
    ) -> None:
        """Do the operations of torch.optim.AdamW in the same order, after the decay. Overwrites the gradients.

        Learning rates may differ within the run (layer decay), so only the last operation is done per rate.

        counts: scalar on the device; 1, or 0 to keep weights and moments unchanged.
        """
        beta1, beta2 = groups[run.group]["betas"]
        gradient = _part(all_gradients, run)
        exp_avg, exp_avg_sq = _part(self._exp_avg.buffer, run), _part(self._exp_avg_sq.buffer, run)
        step = (self._step_views[run.first] + 1).to(self.moment_dtype)
        exp_avg.lerp_(gradient, counts * (1 - beta1))
        exp_avg_sq.mul_(1 - counts * (1 - beta2)).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = torch.sqrt(exp_avg_sq, out=gradient)
        denominator.div_(_bias_correction(beta2, step).sqrt_()).add_(groups[run.group]["eps"])
        torch.div(exp_avg, denominator, out=gradient)
        correction = _bias_correction(beta1, step)
        members = [segment for segment in self._segments if run.start <= segment.start < run.stop]
        for part in _join_segments(members, groups, ("lr",)):
            factor = counts * -groups[part.group]["lr"] / correction
            _part(weights, part).addcmul_(_part(all_gradients, part), factor)

    def _update_master(self) -> None:
        """Copy weights that were changed since the last step (by a clamp or a loaded model) to the master copy."""
        if self._master is not None:
            weights, master = self.weights.buffer, self._master.buffer
            master.copy_(torch.where(weights == master.to(weights.dtype), master, weights.to(master.dtype)))


def _bias_correction(beta: float, step: Tensor) -> Tensor:
    """Compute 1 - beta ** step without cancellation in float32 for beta near 1."""
    return torch.expm1(step * (math.log(beta) if beta else -math.inf)).neg_()


def _join_segments(
    segments: Iterable[_Segment], groups: Sequence[Mapping[str, Any]], options: Sequence[str]
) -> list[_Segment]:
    """Join adjacent segments that have the same step count and the same values of these options."""
    runs: list[_Segment] = []
    for segment in segments:
        last = runs[-1] if runs else None
        if last is not None and last.stop == segment.start and last.history == segment.history:
            ours, theirs = groups[segment.group], groups[last.group]
            if all(_is_same(ours[name], theirs[name]) for name in options):
                last.stop = segment.stop
                continue
        runs.append(_Segment(**vars(segment)))
    return runs


def _is_same(ours: Any, theirs: Any) -> bool:
    """Compare options of groups. Tensors (learning rates of a captured step) are the same if they are one object."""
    return ours is theirs or (not isinstance(ours, Tensor) and ours == theirs)


def _part(buffer: Tensor, segment: _Segment) -> Tensor:
    return buffer if segment.stop - segment.start == buffer.numel() else buffer[segment.start : segment.stop]


def _number_values(values: Sequence[Any]) -> list[int]:
    """Number the distinct values from 0; equal values get the same number."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]
