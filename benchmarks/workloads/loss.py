"""ClipLoss and SigLipLoss, forward and backward on 8192 pairs of width 512: seconds, and the memory that is added."""

import json
import resource
import statistics
import time

import torch
import torch.nn.functional as F

from open_clip.loss import ClipLoss, SigLipLoss

PAIRS, WIDTH = 8192, 512


def step(loss: torch.nn.Module, pairs: int) -> float:
    """Seconds of one forward and backward with fresh gradients."""
    image, text = (F.normalize(torch.randn(pairs, WIDTH), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (100.0, -10.0))
    start = time.perf_counter()
    loss(image, text, scale, bias).backward()
    return time.perf_counter() - start


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


torch.manual_seed(0)
figures = {}
for loss in (ClipLoss(), SigLipLoss()):
    step(loss, 64)
features_mb = 2 * PAIRS * WIDTH * 4 / 2**20
for loss in (ClipLoss(), SigLipLoss()):
    before = peak_mb()
    seconds = statistics.median(step(loss, PAIRS) for _ in range(3))
    figures[f"{type(loss).__name__} [s]"] = seconds
    if isinstance(loss, ClipLoss):  # a process's peak shows one of them
        figures["ClipLoss, with its gradients [MB]"] = peak_mb() - before - features_mb
print(json.dumps(figures))
