"""Make `torch_npu.optim.NpuFusedAdamW` usable like torch's AdamW.

NpuFusedAdamW copies parameters, gradients and moments into flat tensors, and the model's tensors become views of these.
Consequences, and how this module handles them:

* A parameter without a gradient at the time of the copy is never updated. Every parameter first gets a gradient of
  zeros. (So weight decay applies to parameters that the loss does not use. In torch's AdamW it does not.)
* Gradients must not be replaced. `zero_grad()` fills them with zeros by default, and `zero_grad(True)` raises. If a
  parameter or gradient was replaced, the next step raises.
* It has one step count for all parameters and copies the moments only once. After a state is loaded they are copied
  again.
* Its step count is a number, and that of torch is a tensor. Saved states have torch's form.
* It supports float32 and float16 parameters only. Other dtypes raise.
* It cannot skip a step on the device. training.step_guard waits for the decision and then does not call `step`.
"""

from __future__ import annotations

from typing import Any

import torch

_DTYPES = (torch.float32, torch.float16)


def make_safe(optimizer: Any) -> Any:
    """Prepare a new NpuFusedAdamW whose parameters are on their final device, and return it.

    Raises:
        ValueError: a parameter has a dtype that it does not support.
    """
    parameters = _parameters(optimizer)
    others = sorted({str(p.dtype) for p in parameters if p.dtype not in _DTYPES})
    if others:
        raise ValueError(
            f"--fused-optimizer npu supports float32 and float16 weights, and these are {', '.join(others)}. Use "
            "--fused-optimizer auto, or --precision amp_bf16, which keeps the weights in float32."
        )
    for p in parameters:
        p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
    optimizer.zero_grad(set_to_none=False)  # copies parameters and gradients into the flat tensors
    addresses = _addresses(parameters)

    def check_addresses(*_: Any) -> None:
        if _addresses(parameters) != addresses:
            raise RuntimeError(
                "A parameter or its gradient was replaced, so --fused-optimizer npu would not update it. Create the "
                "optimizer after the model is moved or cast, and set gradients to zero with optimizer.zero_grad()."
            )

    optimizer.register_step_pre_hook(check_addresses)
    optimizer.register_state_dict_post_hook(_to_torch)
    optimizer.register_load_state_dict_pre_hook(_from_torch)
    optimizer.register_load_state_dict_post_hook(_request_copy)
    return optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _addresses(parameters: list[torch.Tensor]) -> list[tuple[int, int]]:
    return [(p.data_ptr(), 0 if p.grad is None else p.grad.data_ptr()) for p in parameters]


def _to_torch(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Convert a state dict to the form of torch.optim.AdamW."""
    options = torch.optim.AdamW([torch.zeros(1)]).defaults
    state = {
        index: {**values, "step": torch.tensor(float(values["step"]))} for index, values in state_dict["state"].items()
    }
    groups = [{**options, **group} for group in state_dict["param_groups"]]
    return {**state_dict, "state": state, "param_groups": groups}


def _from_torch(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Convert a state dict of torch.optim.AdamW, or of this optimizer, to the form that this optimizer loads."""
    state = {index: {**values, "step": int(values["step"])} for index, values in state_dict["state"].items()}
    steps = {values["step"] for values in state.values()}
    if len(steps) > 1 or (state and len(state) != len(_parameters(optimizer))):
        raise ValueError(
            "its parameters are not all at the same step, which --fused-optimizer npu needs and the other forms do not"
        )
    return {**state_dict, "state": state}


def _request_copy(optimizer: Any) -> None:
    optimizer.is_states_combined = False
