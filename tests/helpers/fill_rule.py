"""How weights and inputs of the recorded answers are made: a formula of a name and a shape, no random generator.

u(name, n): n float64 numbers in [-1, 1). h = (i * 2654435761 + crc32(name)) mod 2^32 for i = 0..n-1, then twice
h ^= h >> 15, h = h * 2246822519 mod 2^32, h ^= h >> 13; u = h / 2^31 - 1.
"""

import math
import zlib

import numpy as np
import torch


def u(name, n):
    h = (np.arange(n, dtype=np.uint64) * 2654435761 + zlib.crc32(name.encode())) & 0xFFFFFFFF
    for _ in range(2):
        h ^= h >> 15
        h = (h * 2246822519) & 0xFFFFFFFF
        h ^= h >> 13
    return h.astype(np.float64) / 2**31 - 1


def value(name, shape):
    """The float32 tensor that a parameter (or running mean or variance) of this state-dict name and shape is given."""
    n = math.prod(shape)
    if name.endswith("logit_scale"):
        x = np.full(n, math.log(1 / 0.07))
    elif name.endswith("logit_bias"):
        x = np.full(n, -10.0)
    elif name.endswith("running_var"):
        x = 1 + 0.5 * u(name, n)
    elif len(shape) >= 2:  # variance 1 / fan-in, with fan-in = numel / shape[0]
        x = u(name, n) * math.sqrt(3 * shape[0] / n)
    elif name.endswith((".weight", ".gamma", ".lambda1")):  # gains
        x = 1 + 0.1 * u(name, n)
    else:  # biases, class tokens, scalars
        x = 0.1 * u(name, n)
    return torch.from_numpy(x.astype(np.float32)).reshape(shape)


@torch.no_grad()
def fill(model):
    """Fills every trainable parameter and every running mean and variance; other buffers and frozen filterbanks stay."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    named |= {n: b for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))}
    for name, tensor in named.items():
        tensor.copy_(value(name, tuple(tensor.shape)))
    return model


def uniform(name, shape):
    """An input: float32 in [-1, 1)."""
    return torch.from_numpy(u(name, math.prod(shape)).astype(np.float32)).reshape(shape)


def integers(name, shape, low, high):
    """An input: int64 in [low, high)."""
    x = np.floor((u(name, math.prod(shape)) + 1) / 2 * (high - low)).astype(np.int64) + low
    return torch.from_numpy(np.clip(x, low, high - 1)).reshape(shape)


def wave(samples, rate, base):
    """An input: a mono waveform [samples], three partials of `base` Hz that fade, and a little noise."""
    t = np.arange(samples, dtype=np.float64) / rate
    x = sum(np.sin(2 * np.pi * base * k * t) / k for k in (1, 2, 5)) * np.exp(-t * base / 880)
    return torch.from_numpy((0.3 * x + 0.01 * u(f"wave{base}", samples)).astype(np.float32))


def texts(name, lengths, total, low, high, pad_id, eos_id=None):
    """An input: ids [len(lengths), total]; row r has lengths[r] ids, the last of them eos_id, then pad_id."""
    ids = integers(name, (len(lengths), total), low, high)
    for row, length in enumerate(lengths):
        ids[row, length:] = pad_id
        if eos_id is not None and length:
            ids[row, length - 1] = eos_id
    return ids


def patches(name, grids, total, patch_dim):
    """An input: {"patches" [B, total, patch_dim], "patch_coord" [B, total, 2], "patch_valid" [B, total]}.

    Sample b has a grid of grids[b] = (rows, columns) patches in reading order; behind them all is zero and not valid.
    """
    x = uniform(name, (len(grids), total, patch_dim))
    coord = torch.zeros(len(grids), total, 2, dtype=torch.long)
    valid = torch.zeros(len(grids), total, dtype=torch.bool)
    for b, (rows, columns) in enumerate(grids):
        n = rows * columns
        x[b, n:] = 0
        valid[b, :n] = True
        coord[b, :n, 0] = torch.arange(n) // columns
        coord[b, :n, 1] = torch.arange(n) % columns
    return {"patches": x, "patch_coord": coord, "patch_valid": valid}
