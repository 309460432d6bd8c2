"""Training steps on captions of mixed lengths: seconds per step, padded, grouped and packed.

    python benchmarks/variable_text.py

The text tower of a model with 256 tokens is trained with the project's Trainer, next to a very small image tower. The
captions have the lengths of descriptions of images, about 60 tokens on average. The forms alternate and the median
counts. BENCHMARK_DEVICE, BENCHMARK_MODEL, BENCHMARK_PRECISION and BENCHMARK_BATCH choose what is trained.
"""

from __future__ import annotations

import copy
import json
import os
import random
import statistics
import time

import torch
from torch import nn

import open_clip
from open_clip import device as devices
from training import precision
from training.batches import to_device
from training.objective import create_objective
from training.optim import create_optimizer
from training.params import ObjectiveConfig, OptimConfig
from training.trainer import Trainer
from training.unpadding import PaddingOptions, Unpadding

DEVICE = torch.device(os.environ.get("BENCHMARK_DEVICE", "cpu"))
MODEL = os.environ.get("BENCHMARK_MODEL", "moderntext-ViT-B-32-256")
PRECISION = os.environ.get("BENCHMARK_PRECISION", "fp32")
BATCH = int(os.environ.get("BENCHMARK_BATCH", 32))
REPEATS = 5
FORMS = {
    "padded to 256": PaddingOptions(max_groups=0, packing="off"),
    "padded to the longest": PaddingOptions(max_groups=1, packing="off"),
    "4 groups": PaddingOptions(max_groups=4, packing="off"),
    "packed": PaddingOptions(packing="on"),
}


def make_model() -> nn.Module:
    cfg = copy.deepcopy(open_clip.get_model_config(MODEL))
    assert cfg is not None, MODEL
    cfg["vision_cfg"] = {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32}
    torch.manual_seed(0)
    return open_clip.CustomTextCLIP(**cfg, output_dict=True).to(DEVICE).train()


def make_batch(model: nn.Module, seed: int) -> tuple[dict[str, torch.Tensor], float]:
    """Return a batch on the CPU, and the mean number of tokens of its captions."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tower = model.text
    lengths = [min(256, max(8, round(draw.lognormvariate(3.9, 0.6)))) for _ in range(BATCH)]
    text = torch.full((BATCH, 256), tower.pad_id)
    for row, length in enumerate(lengths):
        text[row, : length - 1] = torch.randint(0, 50000, (length - 1,), generator=generator)
        text[row, length - 1] = tower.eos_id
    return {"image": torch.randn(BATCH, 3, 32, 32, generator=generator), "text": text}, sum(lengths) / BATCH


def main() -> None:
    model = make_model()
    trainer = Trainer(
        model=model,
        objective=create_objective(ObjectiveConfig(), model),
        optimizer=create_optimizer(model, OptimConfig(lr=1e-4), DEVICE),
        precision=precision.create(PRECISION, DEVICE),
    )
    unpaddings = {name: Unpadding([model], DEVICE, options) for name, options in FORMS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    tokens = []
    for repeat in range(REPEATS + 1):  # the first one is a warm-up
        batch, mean_tokens = make_batch(model, repeat)
        tokens.append(mean_tokens)
        for name, unpad in unpaddings.items():
            devices.get(DEVICE).synchronize()
            start = time.perf_counter()
            trainer.step([to_device(batch, DEVICE, unpad=unpad)], 0)
            devices.get(DEVICE).synchronize()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    results: dict[str, float] = {"mean tokens of a caption": round(statistics.mean(tokens), 1)}
    results |= {f"{name} [s/step]": round(value, 3) for name, value in medians.items()}
    results |= {
        f"{name} is faster than padded to 256 by": round(medians["padded to 256"] / medians[name], 2)
        for name in list(FORMS)[1:]
    }
    print(json.dumps(results, indent=4))


if __name__ == "__main__":
    main()
