"""Packed against padded sequences: seconds for forward and backward pass of transformer layers, and their ratio.

    python benchmarks/packing.py

Captions have about 60 of 256 tokens on average, images between 1/8 and all of 1024 patches. Padded batches have a mask
of the keys, or are causal. The forms alternate and the fastest of REPEATS counts. BENCHMARK_DEVICE and
BENCHMARK_PRECISION (fp32, bf16) choose where and in what it is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time

import torch
from torch import Tensor, nn

from open_clip import device as devices
from open_clip import packing

DEVICE = os.environ.get("BENCHMARK_DEVICE", "cpu")
PRECISION = os.environ.get("BENCHMARK_PRECISION", "fp32")
WIDTH, HEADS, LAYERS, REPEATS = 384, 6, 2, 3


class Layer(nn.Module):
    """Attention and SwiGLU with residuals, for tokens [..., width]."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.w12, self.w3 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, attend) -> Tensor:
        query, key, value = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        x = x + self.proj(attend(query, key, value).flatten(-2))
        return x + self.w3(devices.swiglu_linear(self.norms[1](x), self.w12))


def attend_packed(segments: packing.Segments, causal: bool):
    def attend(*qkv: Tensor) -> Tensor:
        return packing.attention(*qkv, segments, is_causal=causal)

    return attend


def attend_padded(valid: Tensor, causal: bool):
    mask = None if causal else valid[:, None, None]

    def attend(*qkv: Tensor) -> Tensor:
        return devices.attention(*(x.transpose(1, 2) for x in qkv), attn_mask=mask, is_causal=causal).transpose(1, 2)

    return attend


def measure(layers: nn.ModuleList, x: Tensor, attend) -> float:
    devices.get(DEVICE).synchronize()
    start = time.perf_counter()
    dtype = {"bf16": torch.bfloat16}.get(PRECISION)
    with devices.get(DEVICE).autocast(dtype) if dtype else contextlib.nullcontext():
        for layer in layers:
            x = layer(x, attend)
    x.float().square().mean().backward()
    devices.get(DEVICE).synchronize()
    return time.perf_counter() - start


def compare(name: str, lengths: list[int], longest: int, causal: bool) -> dict[str, float]:
    """Return seconds by form, and how many times packed sequences are faster."""
    layers = nn.ModuleList(Layer() for _ in range(LAYERS)).to(DEVICE)
    segments = packing.Segments.of(lengths)
    tokens = torch.randn(segments.total, WIDTH)
    forms = {"packed": (tokens.to(DEVICE), attend_packed(segments.to(DEVICE), causal))}
    for padded_to in sorted({max(lengths), longest}):
        valid = (torch.arange(padded_to) < torch.tensor(lengths)[:, None]).to(DEVICE)
        padded = packing.unpack(tokens, segments, padded_to).to(DEVICE)
        forms[f"padded to {padded_to}"] = (padded, attend_padded(valid, causal))
    seconds = dict.fromkeys(forms, float("inf"))
    for _ in range(REPEATS):
        for form, (x, attend) in forms.items():
            seconds[form] = min(seconds[form], measure(layers, x, attend))
    kind = f"{name}, {'causal' if causal else 'bidirectional'}"
    found = {f"{kind}: {form} [s]": round(value, 4) for form, value in seconds.items()}
    for form in list(seconds)[1:]:
        found[f"{kind}: packed is faster than {form} by"] = round(seconds[form] / seconds["packed"], 2)
    return found


def main() -> None:
    torch.manual_seed(0)
    generator = random.Random(0)
    captions = [min(256, max(8, round(generator.lognormvariate(3.9, 0.6)))) for _ in range(24)]
    images = [generator.randint(128, 1024) for _ in range(6)]
    results: dict[str, float] = {}
    for causal in (False, True):
        results |= compare(f"24 captions of {sum(captions) / len(captions):.0f} tokens", captions, 256, causal)
    results |= compare(f"6 images of {sum(images) / len(images):.0f} patches", images, 1024, causal=False)
    print(json.dumps(results, indent=4))


if __name__ == "__main__":
    main()
