"""Make `torch_npu.optim.NpuFusedAdamW` usable like torch's AdamW.

It moves parameters, gradients and moments into flat tensors and computes on those; the model's tensors become views of
them. What follows from that, and what is done about it:

* A parameter without a gradient when it combines them is never updated. Here every parameter gets a gradient of zeros
  first. (So a parameter that the loss does not reach decays, which torch's AdamW leaves alone.)
* Gradients must stay where they are. `zero_grad()` fills them with zeros by default; `zero_grad(True)` raises. If a
  parameter or a gradient was replaced, the next step raises.
* It has one step count for all parameters and combines the moments once. Here loading a state combines them again.
* Its step count is a number and torch's is a tensor. Saved states are torch's.
* It takes float32 and float16 parameters only; other dtypes are refused.
* It cannot skip a step on the device. training.guard waits for the decision and then does not call `step`.
"""
from __future__ import annotations

from typing import Any

import torch

_DTYPES = (torch.float32, torch.float16)


def make_safe(optimizer: Any) -> Any:
    """Prepare and return a new NpuFusedAdamW whose parameters are where they will be trained.

    Raises:
        ValueError: parameters in a dtype that it does not take.
    """
    parameters = _parameters(optimizer)
    others = sorted({str(p.dtype) for p in parameters if p.dtype not in _DTYPES})
    if others:
        raise ValueError(
            f"--fused-optimizer npu takes weights in float32 or float16, and these are in {', '.join(others)}. Use "
            "--fused-optimizer auto, or --precision amp_bf16, which keeps the weights in float32."
        )
    for p in parameters:
        p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
    optimizer.zero_grad(set_to_none=False)  # combines parameters and gradients, now that there are all
    places = _places(parameters)

    def check_places(*_: Any) -> None:
        if _places(parameters) != places:
            raise RuntimeError(
                "A parameter or its gradient is another tensor than the one that --fused-optimizer npu updates. Make "
                "the optimizer after the model is moved or cast, and set gradients to zero by optimizer.zero_grad()."
            )

    optimizer.register_step_pre_hook(check_places)
    optimizer.register_state_dict_post_hook(_to_torch)
    optimizer.register_load_state_dict_pre_hook(_from_torch)
    optimizer.register_load_state_dict_post_hook(_combine_again)
    return optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _places(parameters: list[torch.Tensor]) -> list[tuple[int, int]]:
    return [(p.data_ptr(), 0 if p.grad is None else p.grad.data_ptr()) for p in parameters]


def _to_torch(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict as torch.optim.AdamW gives it."""
    options = torch.optim.AdamW([torch.zeros(1)]).defaults
    state = {
        index: {**of_one, "step": torch.tensor(float(of_one["step"]))} for index, of_one in state_dict["state"].items()
    }
    groups = [{**options, **group} for group in state_dict["param_groups"]]
    return {**state_dict, "state": state, "param_groups": groups}


def _from_torch(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict of torch.optim.AdamW, or of this optimizer, as this optimizer takes it."""
    state = {index: {**of_one, "step": int(of_one["step"])} for index, of_one in state_dict["state"].items()}
    steps = {of_one["step"] for of_one in state.values()}
    if len(steps) > 1 or (state and len(state) != len(_parameters(optimizer))):
        raise ValueError(
            "its parameters are not all at the same step, which --fused-optimizer npu needs and the other forms do not"
        )
    return {**state_dict, "state": state}


def _combine_again(optimizer: Any) -> None:
    optimizer.is_states_combined = False
