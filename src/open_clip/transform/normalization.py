"""Normalization of pixels, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normalization:
    """Converts uint8 pixels to normalized floats on their device, like ToTensor and Normalize of torchvision.

    The float32 results are bit-identical, with three operators instead of four.

    Args:
        mean, std: per channel, for values from 0 to 1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._constants: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Convert uint8 [(batch,) channels, height, width] to float32 of the same shape."""
        if pixels.device not in self._constants:
            self._constants[pixels.device] = self._make_constants(pixels.device)
        minus_mean, levels, std = self._constants[pixels.device]
        return torch.addcdiv(minus_mean, pixels.float(), levels).div_(std)

    def _make_constants(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        # 255 is a tensor because CUDA divides by a Python number via its reciprocal, which may change the last bit.
        with torch.inference_mode(False):
            return (
                -torch.tensor(self.mean, dtype=torch.float32).view(-1, 1, 1).to(device),
                torch.tensor(255.0).to(device),
                torch.tensor(self.std, dtype=torch.float32).view(-1, 1, 1).to(device),
            )
