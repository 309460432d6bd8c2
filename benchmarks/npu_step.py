"""Count operators of one training step on the emulated NPU, by phase, here and with open_clip_torch 3.3.0.

    python benchmarks/npu_step.py                                  # in the environment of `make test-npu`
    python benchmarks/npu_step.py --model ViT-B-16 --precision amp --batch-size 4
    python benchmarks/npu_step.py --device cpu                     # the same step on the CPU

Each side trains a model on synthetic data in a new process with its own `open_clip_train.main`, and the third step is
counted. The results are not times, and nothing was measured on an NPU.

A TorchDispatchMode sees every operator that reaches the backends in forward, backward and optimizer. The figures are:

- *operators*: all operators except views, `detach` and empty allocations, which compute nothing. A foreach operator
  counts as one, and so does reading a step count on the host (`_local_scalar_dense`).
- *launches*: the operators with a tensor on the device. A foreach operator is split as op-plugin splits it
  (op_plugin/utils/custom_functions/opapi/ForeachConstants.h: 48 tensors per launch, divided by the number of lists that
  the kernel takes); one that converts dtypes uses op-plugin's slow path, one launch per tensor
  (ForeachCopyKernelNpuOpApi.cpp). This is an estimate: op-plugin may launch several kernels for one operator.
- *casts*: launches that convert between dtypes: `_to_copy`, `copy_` and foreach copies.
- *host waits*: operators whose result the host needs, such as `item()`, and copies from the device to the host.

Operators that only the emulator decomposes (`scaled_dot_product_attention` becomes about 15 elementary operators) are
counted as the emulator runs them, on both sides.

Phases. *batch*: the host to device copies of images and texts. *forward*: everything else until the model returns,
including zeroing gradients and converting weights. *loss*: until the backward pass starts. *backward*:
until it returns. *update*: the rest, such as unscaling, clipping and the optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
SIDES = {"ours": HERE.parent / "src", "peer": HERE.parent / ".peer"}
PHASES = ("batch", "forward", "loss", "backward", "update")
COUNTED_STEP = 2  # from 0: earlier ones create the optimizer's state
FOREACH_TENSORS = 48

# They compute nothing. Operators that torch marks as views (`func.is_view`) are ignored as well.
NO_WORK = {
    "aten::detach", "aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::alias", "aten::empty",
    "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided", "aten::promote_types",
    "aten::resize_", "aten::set_", "aten::is_pinned", "aten::_pin_memory", "aten::record_stream", "aten::split",
    "aten::split_with_sizes", "aten::unbind",
}  # fmt: skip
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for element in value:
            yield from tensors_in(element)


class StepCounter(TorchDispatchMode):
    """Counts the operators of one step by phase.

    `phase` is None (not counting), "waiting" (for the batch of the step to count), or one of PHASES.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.phase: str | None = None
        self.is_arriving = False  # the model has not been called with the batch yet
        self.kinds: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}
        self.totals: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        if self.phase is not None and not func.is_view and name not in NO_WORK and not name.startswith("profiler::"):
            self._count(name, args, kwargs or {}, result)
        return result

    def start(self) -> None:
        """Start counting at the next batch of images."""
        self.phase = "waiting"

    def _count(self, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        copies = _copies(name, args, result)
        arrives = any(to.device.type == self.device != source.device.type for to, source in copies)
        if arrives and copies[0][1].dim() == 4:
            self._meet_images()
        phase = "batch" if arrives and self.is_arriving else self.phase
        if phase not in self.totals:
            return
        totals = self.totals[phase]
        self.kinds[phase][name] += 1
        totals["operators"] += 1
        given = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
        if not any(t.device.type == self.device for t in [*given, *tensors_in(result)]):
            return
        casts = sum(to.dtype != source.dtype for to, source in copies) + ("dtype_cast" in name)
        totals["casts"] += casts
        totals["launches"] += max(casts, _launches(name, args, result))
        if name in WAITS and self.device != "cpu":
            totals["host waits"] += given[0].device.type == self.device
        for to, source in copies:
            if to.device.type != source.device.type:
                to_host = to.device.type == "cpu"
                totals["bytes to host" if to_host else "bytes to device"] += source.numel() * source.element_size()
                totals["host waits"] += to_host

    def _meet_images(self) -> None:
        """Handle a batch of images from the host: a step starts, and the one before has ended."""
        if self.phase == "waiting":
            self.phase, self.is_arriving = "forward", True
            if self.device != "cpu":
                getattr(torch, self.device).reset_peak_memory_stats()
        elif self.phase == "update":
            if self.device != "cpu":
                self.peak = getattr(torch, self.device).max_memory_allocated()
            self.report()

    def report(self) -> None:
        """Print the counts as JSON and end the process."""
        print(json.dumps({"totals": self.totals, "kinds": self.kinds, "peak": self.peak}), flush=True)
        os._exit(0)


def _copies(name: str, args: Any, result: Any) -> list[tuple[Tensor, Tensor]]:
    """Return (to, from) of each tensor that an operator copies."""
    if name == "aten::_to_copy":
        return [(result, args[0])]
    if name == "aten::copy_":
        return [(args[0], args[1])]
    if name == "aten::_foreach_copy_":
        return list(zip(args[0], args[1], strict=True))
    return []


def _launches(name: str, args: Any, result: Any) -> int:
    if not name.startswith("aten::_foreach"):
        return 1
    lists = [value for value in args if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)]
    lists += [result] if isinstance(result, list | tuple) else []
    return -(-len(lists[0]) // (FOREACH_TENSORS // len(lists)))


def follow_phases(counter: StepCounter, model_types: list[type]) -> None:
    """Set the phase of the counter from the calls of the training loop."""
    call, backward = torch.nn.Module.__call__, torch.autograd.backward
    steps = 0

    def call_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter.is_arriving = False
        output = call(self, *args, **kwargs)
        if counter.phase == "forward":
            counter.phase = "loss"
        return output

    def call_backward(*args: Any, **kwargs: Any) -> None:
        nonlocal steps
        if counter.phase == "loss":
            counter.phase = "backward"
        backward(*args, **kwargs)
        if counter.phase == "backward":
            counter.phase = "update"
        steps += 1
        if steps == COUNTED_STEP:
            counter.start()

    for model_type in model_types:
        model_type.__call__ = call_model  # type: ignore[method-assign]
    torch.autograd.backward = call_backward


def measure(options: argparse.Namespace) -> None:
    """Train with the open_clip that is imported, and print the counts of one step as JSON."""
    from open_clip_train.main import main as train

    import open_clip

    counter = StepCounter(options.device)
    follow_phases(counter, [open_clip.CLIP, open_clip.CustomTextCLIP, open_clip.CoCa])
    steps = COUNTED_STEP + 2
    with tempfile.TemporaryDirectory() as folder, counter:
        train([
            "--model", options.model, "--precision", options.precision, "--device", options.device,
            "--dataset-type", "synthetic", "--train-num-samples", str(steps * options.batch_size),
            "--batch-size", str(options.batch_size), "--epochs", "1", "--workers", "1", "--logs", folder,
            "--log-every-n-steps", "1000", *options.extra,
        ])  # fmt: skip
    raise RuntimeError("The training loop ended before the step that counts.")


def run_side(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the counts of one side, from a new process."""
    environment = {**os.environ, "PYTHONPATH": str(SIDES[side]), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--measure"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"The step of {side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_table(results: dict[str, dict[str, Any]], shown: int) -> None:
    """Print one line per figure and phase with both sides, then the most common operators of each side."""
    sides = list(results)
    print(f"{'figure':16} {'phase':10}" + "".join(f"{side:>14}" for side in sides))
    for figure in ("operators", "launches", "casts", "host waits", "bytes to device", "bytes to host"):
        sums = [0] * len(sides)
        for phase in PHASES:
            values = [results[side]["totals"][phase].get(figure, 0) for side in sides]
            sums = [total + value for total, value in zip(sums, values, strict=True)]
            print(f"{figure:16} {phase:10}" + "".join(f"{value:14,}" for value in values))
        print(f"{figure:16} {'all':10}" + "".join(f"{value:14,}" for value in sums))
    print(f"{'peak bytes':16} {'all':10}" + "".join(f"{results[side]['peak']:14,}" for side in sides))
    for side in sides:
        for phase in PHASES:
            commonest = Counter(results[side]["kinds"][phase]).most_common(shown)
            print(f"{side} {phase}: " + ", ".join(f"{count} {name}" for name, count in commonest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--precision", default="amp_bf16")
    parser.add_argument("--device", default="npu", help="npu or cpu (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--shown", type=int, default=12, help="operators to list per phase (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="last: more options of the command")
    options = parser.parse_args()
    if options.measure:
        measure(options)
    results = {side: run_side(side, options) for side in options.sides}
    print_table(results, options.shown)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
