"""The operators that CLIP models use, on NPU and CPU, with the inputs of PyTorch's operator database."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

USED = {
    "abs", "add", "addmm", "all", "amax", "any", "arange", "argmax", "argsort", "baddbmm", "bmm", "cat", "chunk",
    "clamp", "clone", "contiguous", "cos", "cumsum", "diagonal", "div", "einsum", "eq", "exp", "expand", "eye",
    "flatten", "flip", "full_like", "gather", "ge", "gt", "index_select", "isfinite", "isinf", "isnan", "le",
    "linalg.vector_norm", "log", "log_softmax", "logical_and", "logical_not", "logical_or", "logsumexp", "lt",
    "masked_fill", "masked_select", "matmul", "max", "mean", "min", "mm", "movedim", "mul", "narrow", "ne", "neg",
    "norm", "permute", "pow", "repeat", "repeat_interleave", "reshape", "roll", "rsqrt", "scatter", "select",
    "sigmoid", "sin", "softmax", "sort", "split", "sqrt", "square", "squeeze", "stack", "std", "sub", "sum", "t",
    "tanh", "tile", "topk", "transpose", "tril", "triu", "unbind", "unflatten", "unsqueeze", "var", "view", "where",
    "zeros_like", "__getitem__", "nn.functional.adaptive_avg_pool2d", "nn.functional.avg_pool2d",
    "nn.functional.batch_norm", "nn.functional.binary_cross_entropy_with_logits", "nn.functional.conv2d",
    "nn.functional.cross_entropy", "nn.functional.embedding", "nn.functional.interpolate", "nn.functional.layer_norm",
    "nn.functional.linear", "nn.functional.logsigmoid", "nn.functional.mse_loss", "nn.functional.normalize",
    "nn.functional.pad", "nn.functional.relu", "nn.functional.scaled_dot_product_attention", "nn.functional.silu",
    "nn.functional.softplus",
}  # fmt: skip
OPS = [op for op in op_db if op.name in USED and torch.float32 in op.dtypes]


def to(value: object, device: str) -> object:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        return type(value)(to(element, device) for element in value)
    if isinstance(value, dict):
        return {key: to(element, device) for key, element in value.items()}
    return device if isinstance(value, (str, torch.device)) and str(value) == "cpu" else value


def leaves(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for element in value for tensor in leaves(element)]
    return []


def test_all_listed_operators_exist() -> None:
    assert {op.name for op in OPS} == USED


@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.name}.{op.variant_test_name}".rstrip("."))
def test_operator_equals_the_cpu_forward_and_backward(op: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANN_EMULATOR_STRICT", "0")  # some inputs are float64 or additive masks
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd))
    samples = [sample for sample in samples if not sample.kwargs.get("dropout_p")][:6]  # dropout differs per device
    assert samples
    for sample in samples:
        results = {}
        for device in ("cpu", "npu"):
            args = to([sample.input, *sample.args], device)
            outputs = leaves(op(*args, **to(sample.kwargs, device)))
            scalars = [out.sum() for out in outputs if out.requires_grad]
            if scalars:
                torch.stack(scalars).sum().backward()
            grads = [x.grad for x in leaves(args) if x.grad is not None]
            results[device] = ([x.detach().cpu() for x in outputs], [g.cpu() for g in grads])
        for ours, reference in zip(results["npu"], results["cpu"], strict=True):
            torch.testing.assert_close(ours, reference, rtol=2e-5, atol=1e-4, equal_nan=True)
