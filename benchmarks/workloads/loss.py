"""ClipLoss and SigLipLoss, forward and backward on pairs of width 512.

Seconds and the memory that is added, of 16384 pairs on the CPU. Operators of 32768 pairs on an accelerator with 64 GiB,
counted on meta tensors: every operator except views and empty allocations.
"""

import json
import resource
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from open_clip.loss import ClipLoss, SigLipLoss

PAIRS, WIDTH = 16384, 512
PAIRS_ON_ACCELERATOR = 32768
NO_WORK = {"aten::detach", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"}


def step(loss: torch.nn.Module, pairs: int) -> float:
    """Seconds of one forward and backward with fresh gradients."""
    image, text = (torch.empty(pairs, WIDTH) for _ in range(2))
    for features in (image, text):  # in place, so that the peak of the memory is that of the loss
        features.normal_().div_(WIDTH**0.5).requires_grad_()
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (100.0, -10.0))
    start = time.perf_counter()
    loss(image, text, scale, bias).backward()
    return time.perf_counter() - start


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class OperatorCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func.name().partition(".")[0] not in NO_WORK
        return func(*args, **(kwargs or {}))


def use_meta_as_accelerator() -> None:
    """Let meta tensors have the tiles of an accelerator with 64 GiB, if this open_clip has tiles."""
    try:
        from open_clip import device
    except ImportError:
        return

    class MetaDevice(device.Device):
        type = "meta"

        def memory(self, index: int | None = None) -> dict[str, int]:
            return {"total": 2**36}

    device.DEVICES["meta"] = MetaDevice()


def count_operators(loss: torch.nn.Module, precision: torch.dtype) -> int:
    """Count the operators of one forward and backward with features in this dtype."""
    shape = (PAIRS_ON_ACCELERATOR, WIDTH)
    image, text = (torch.empty(shape, device="meta", dtype=precision, requires_grad=True) for _ in range(2))
    scale, bias = (torch.empty((), device="meta", requires_grad=True) for _ in range(2))
    with OperatorCounter() as counter:
        loss(image, text, scale, bias).backward()
    return counter.count


torch.manual_seed(0)
figures = {}
use_meta_as_accelerator()
for loss in (ClipLoss(), SigLipLoss()):
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        figures[f"{type(loss).__name__}, {name} [operators]"] = count_operators(loss, dtype)
for loss in (ClipLoss(), SigLipLoss()):
    step(loss, 64)
features_mb = 2 * PAIRS * WIDTH * 4 / 2**20
for loss in (ClipLoss(), SigLipLoss()):
    before = peak_mb()
    seconds = statistics.median(step(loss, PAIRS) for _ in range(2))
    figures[f"{type(loss).__name__} [s]"] = seconds
    if isinstance(loss, ClipLoss):  # a process's peak shows one of them
        figures["ClipLoss, with its gradients [MB]"] = peak_mb() - before - features_mb
print(json.dumps(figures))
