"""Small training runs with and without --fsdp, for processes of `gloo_ranks`. All runs use the same global batches."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import coca_cases
import hf_cases
import modern_text_cases
import tiny_clip
from open_clip import coca_model, create_model
from open_clip.deferred_init import DeferredInit
from open_clip.model import CLIP, CustomTextCLIP
from training import build, ranks
from training.objective import create_objective
from training.params import DistributedConfig, ObjectiveConfig, OptimConfig
from training.precision import Precision
from training.step_guard import StepGuard
from training.trainer import Trainer

BATCH = 16
CPU = torch.device("cpu")
_TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"}
_RESNET = {"layers": [2, 2, 1, 1], "width": 8, "head_width": 16}


def _clip(vision: dict | None = None, kind: Any = CLIP, **top: Any) -> nn.Module:
    return kind(**tiny_clip.config(vision, {"layers": 2}, **top), output_dict=True)


def _hugging_face() -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_position_embeddings": 16, **hf_cases.NO_DROPOUT["roberta"]}
        name = hf_cases.write_clip(Path(folder), "roberta", **options)
        return create_model(name, pretrained_text=False, output_dict=True)


def _tied() -> nn.Module:
    """Build a CLIP with parameters that are shared by two blocks, and by a block and the model."""
    model: Any = _clip({"layers": 4})
    first, second, third = model.visual.transformer.resblocks[:3]
    second.mlp.c_fc.weight = first.mlp.c_fc.weight
    third.ln_1.weight = model.visual.ln_pre.weight
    return model


MODELS = {
    "clip": lambda: _clip({"layers": 3}),
    "siglip": lambda: _clip({"layers": 2}, init_logit_bias=-10.0),
    "resnet": lambda: _clip(_RESNET),
    "timm": lambda: _clip(_TIMM, CustomTextCLIP),
    "hf": _hugging_face,
    "coca": lambda: coca_cases.build(coca_model),
    "tied": _tied,
    "modern": lambda: modern_text_cases.build(**modern_text_cases.EVERYTHING),
}


@dataclass(frozen=True)
class Case:
    """A run: `model` is a key of MODELS, `lock` freezes all blocks of the image tower but the last one."""

    model: str = "clip"
    steps: int = 3
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    precision: str = "fp32"
    opt: str = "adamw"
    image_layer_decay: float | None = None
    accum_freq: int = 1
    clip: float = 1.0
    ema_decay: float | None = None
    lock: bool = False
    checkpointing: bool = False
    bad_step: int = -1  # the number of a step in which rank 0 has an image of NaN
    loss_scale: float = 0.0  # initial loss scale of a gradient scaler


def create_trainer(case: Case) -> Trainer:
    """Build the trainer of a run, on this rank of the process group or in a single process."""
    world = ranks.world()
    torch.manual_seed(0)
    precision = Precision(case.precision, CPU)
    deferred = DeferredInit(smallest=1000) if case.distributed.fsdp and world.distributed else None
    if deferred is None:
        model = MODELS[case.model]()
    else:
        with deferred.offered() if case.model == "hf" else deferred.recording():
            model = MODELS[case.model]()
    model.train()
    if case.lock:
        model.lock_image_tower(unlocked_groups=2)
    if case.checkpointing:
        model.set_grad_checkpointing()
    is_siglip = case.model == "siglip"
    options = ObjectiveConfig(local_loss=not is_siglip, gather_with_grad=not is_siglip, siglip=is_siglip)
    objective = create_objective(options, model)
    sharding = build.shard(model, case.distributed, world, precision, deferred)
    # A large eps, because otherwise AdamW scales rounding errors of zero gradients up to the size of a normal step.
    decay = case.image_layer_decay
    cfg = OptimConfig(opt=case.opt, lr=1e-3, eps=1e-4, wd=0.2, image_layer_decay=decay)
    optimizer = sharding.create_optimizer(model, cfg, CPU)
    scaler = torch.amp.GradScaler("cpu", case.loss_scale, enabled=bool(case.loss_scale))
    return Trainer(
        model=build.parallelize(model, case.distributed, world, case.accum_freq),
        objective=objective,
        optimizer=optimizer,
        precision=precision,
        scaler=sharding.agree(scaler),
        accum_freq=case.accum_freq,
        grad_clip_norm=case.clip,
        guard=StepGuard(model, optimizer, CPU, 10),
        average=sharding.create_average(model, case.ema_decay),
        sharding=sharding,
    )


def batch(model: Any, number: int) -> dict[str, Tensor]:
    """Return this rank's part of a global batch."""
    here = ranks.world()
    generator = torch.Generator().manual_seed(number)
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(BATCH, 3, height, width, generator=generator)
    texts = torch.randint(2, 29, (BATCH, min(model.context_length, 12)), generator=generator)
    texts[:, -1] = 29  # the end of a text has the highest id
    share = BATCH // here.world_size
    part = slice(here.rank * share, (here.rank + 1) * share)
    return {"image": images[part], "text": texts[part]}


def train(case: Case) -> tuple[Trainer, list[float]]:
    """Train, and return the trainer and the losses, which are averages over the ranks."""
    trainer = create_trainer(case)
    model: Any = getattr(trainer.model, "module", trainer.model)
    losses = []
    for step in range(case.steps):
        batches = [batch(model, case.accum_freq * step + index) for index in range(case.accum_freq)]
        if step == case.bad_step and ranks.world().rank == 0:
            batches[0]["image"] = batches[0]["image"] * float("nan")
        losses.append(float(trainer.step(batches, step)["loss"]))
    by_rank = torch.tensor(ranks.all_gather_object(losses))
    return trainer, by_rank.mean(dim=0).tolist()
