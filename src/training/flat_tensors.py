"""Many tensors in one buffer, so that one operator processes all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Each tensor starts at a multiple of this number of elements, so that its memory is aligned for any dtype.
_ALIGNMENT = 128


class FlatTensors:
    """Tensors of one device and dtype, stored one after another in `buffer`.

    Attributes:
        buffer: 1-D; the gaps between tensors are zeros.
        views: the tensors, in the order and shapes of the tensors passed to the constructor.
    """

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
        """Allocate zeros for tensors like the given ones, in `dtype` (default: theirs). Copies no values."""
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT
        self.buffer = torch.zeros(size, dtype=dtype or tensors[0].dtype, device=tensors[0].device)
        self.views = [
            self.buffer[start : start + tensor.numel()].view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=True)
        ]

    def fill(self, tensors: Iterable[Tensor | None]) -> None:
        """Copy values into the views, in one launch if the device supports it. None fills a view with zeros."""
        pairs = [(view, tensor) for view, tensor in zip(self.views, tensors, strict=True) if tensor is not None]
        if len(pairs) < len(self.views):
            self.buffer.zero_()
        if pairs:
            # Some versions of op-plugin's _foreach_copy_ wait for the NPU unless non_blocking is set. Within a device
            # it makes no other difference.
            on_device = all(tensor.device == self.buffer.device for _, tensor in pairs)
            torch._foreach_copy_([view for view, _ in pairs], [tensor for _, tensor in pairs], non_blocking=on_device)


@torch.no_grad()
def flatten_parameters(parameters: Sequence[Tensor]) -> FlatTensors:
    """Move the memory of parameters of one device and dtype into one buffer. They stay the same Parameter objects."""
    flat = FlatTensors(parameters)
    flat.fill(parameters)
    for parameter, view in zip(parameters, flat.views, strict=True):
        parameter.data = view
    return flat
