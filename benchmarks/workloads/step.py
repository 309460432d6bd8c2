"""Training steps on captions of usual length, by the training function of both packages: samples per second.

BENCHMARK_DEVICE, BENCHMARK_MODEL, BENCHMARK_PRECISION and BENCHMARK_BATCH choose what is trained.
"""

import json
import logging
import os
import time
from types import SimpleNamespace

import torch
from inputs import captions
from open_clip_train.params import parse_args
from open_clip_train.train import train_one_epoch

import open_clip

MODEL = os.environ.get("BENCHMARK_MODEL", "ViT-B-32")
DEVICE = os.environ.get("BENCHMARK_DEVICE", "cpu")
PRECISION = os.environ.get("BENCHMARK_PRECISION", "fp32")
BATCH = int(os.environ.get("BENCHMARK_BATCH", 16))
WARM_UP, STEPS = 1, 4


class Batches:
    """A data loader of batches in memory, which notes when each one was asked for."""

    def __init__(self, size: int, tokenizer) -> None:
        self.num_batches, self.num_samples = WARM_UP + STEPS, (WARM_UP + STEPS) * BATCH
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(BATCH, 3, size, size, generator=generator), tokenizer(captions(BATCH, seed)))
            for seed in range(self.num_batches)
        ]
        self.times: list[float] = []

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self):
        for batch in self.batches:
            self.note()
            yield batch
        self.note()

    def note(self) -> None:
        if torch.device(DEVICE).type != "cpu":
            torch.accelerator.synchronize()
        self.times.append(time.perf_counter())


logging.disable(logging.CRITICAL)
args = parse_args(["--model", MODEL, "--precision", PRECISION, "--batch-size", str(BATCH), "--device", DEVICE])
for name, value in {
    "distributed": False, "rank": 0, "local_rank": 0, "world_size": 1, "distill": False, "wandb": False,
    "tensorboard": False, "horovod": False, "skip_scheduler": True, "save_logs": False, "log_every_n_steps": 1000,
}.items():  # fmt: skip
    setattr(args, name, value)
torch.manual_seed(0)
model = open_clip.create_model(MODEL, output_dict=True, device=DEVICE)
batches = Batches(model.visual.image_size[0], open_clip.get_tokenizer(MODEL))
data = {"train": SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
scaler = torch.amp.GradScaler(DEVICE) if PRECISION == "amp" and DEVICE != "cpu" else None
loss = open_clip.loss.ClipLoss(cache_labels=True)
train_one_epoch(model, data, loss, 0, optimizer, scaler, None, None, args)
seconds = batches.times[-1] - batches.times[WARM_UP]
print(json.dumps({f"{MODEL} {PRECISION} on {DEVICE} [s/1000 samples]": 1000 * seconds / (STEPS * BATCH)}))
