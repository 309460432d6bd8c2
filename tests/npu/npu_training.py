"""Training steps of a tiny CLIP on deterministic data with the project's Trainer, on any device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import open_clip
import tiny_clip
from open_clip import device as devices
from open_clip.deferred_init import DeferredInit
from training import build, half_weights, precision, ranks
from training.objective import create_objective
from training.optim import create_optimizer
from training.params import DistributedConfig, ObjectiveConfig, OptimConfig
from training.step_guard import StepGuard
from training.trainer import Trainer

GLOBAL_BATCH = 8
CPU = torch.device("cpu")
NPU = torch.device("npu", 0)


def make_model(seed: int = 0, **changes: Any) -> open_clip.CLIP:
    """Build a tiny CLIP on the CPU, so that its weights are the same for every device.

    Args:
        changes: see tiny_clip.config.
    """
    torch.manual_seed(seed)
    return open_clip.CLIP(**tiny_clip.config(**changes), output_dict=True)


def make_batch(step: int, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
    """Return this rank's part of the global batch of a step, on the CPU. Images and texts of a pair are correlated."""
    generator = torch.Generator().manual_seed(1000 + step)
    kind = torch.randint(0, 50, (GLOBAL_BATCH, 1), generator=generator)
    texts = (kind + torch.arange(12)).remainder(60)
    texts[:, -1] = 63
    noise = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=generator)
    images = 0.3 * noise + (kind.float() * 0.4 + torch.arange(3)).sin()[:, :, None, None]
    part = slice(GLOBAL_BATCH * rank // world_size, GLOBAL_BATCH * (rank + 1) // world_size)
    return {"image": images[part], "text": texts[part]}


def move(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy a batch to the device as training does: from pinned memory, without waiting."""
    if devices.get(device).pin_memory:
        batch = {name: value.pin_memory() for name, value in batch.items()}
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def make_trainer(
    device: torch.device, chosen: str = "fp32", fused_optimizer: str = "auto", linked: bool = False,
    model: torch.nn.Module | None = None, **scaler: Any,
) -> Trainer:  # fmt: skip
    """Create a Trainer.

    Args:
        chosen: the precision.
        linked: train with DDP, --local-loss and --gather-with-grad in the process group of training.ranks.
        scaler: arguments of the gradient scaler.
    """
    model = (make_model() if model is None else model).to(device).train()
    objective = create_objective(ObjectiveConfig(local_loss=linked, gather_with_grad=linked), model)
    # A large eps, because otherwise AdamW scales rounding errors of zero gradients up to the size of a normal step.
    cfg = OptimConfig(lr=2e-3, eps=1e-4, fused_optimizer=fused_optimizer)
    optimizer = create_optimizer(model, cfg, device)
    kind = precision.create(chosen, device)
    return Trainer(
        model=build.parallelize(model, DistributedConfig(), ranks.world()) if linked else model,
        objective=objective,
        optimizer=optimizer,
        precision=kind,
        scaler=kind.grad_scaler(**scaler),
        half_weights=half_weights.create(model, kind, getattr(optimizer, "flats", ())),
        grad_clip_norm=1.0,
    )


def make_sharded_trainer(world: ranks.World, cfg: DistributedConfig, chosen: str = "fp32") -> Trainer:
    """Create a Trainer of a model with blocks, sharded in the process group of training.ranks."""
    deferred = DeferredInit(smallest=100)
    torch.manual_seed(0)
    with deferred.recording():
        model = open_clip.CLIP(**tiny_clip.config({"layers": 2}, {"layers": 2}), output_dict=True)
    objective = create_objective(ObjectiveConfig(local_loss=True, gather_with_grad=True), model)
    kind = precision.create(chosen, world.device)
    sharding = build.shard(model, cfg, world, kind, deferred)
    optimizer = sharding.create_optimizer(model, OptimConfig(lr=2e-3, eps=1e-4), world.device)
    return Trainer(
        model=build.parallelize(model, cfg, world),
        objective=objective,
        optimizer=optimizer,
        precision=kind,
        scaler=sharding.agree(kind.grad_scaler()),
        grad_clip_norm=1.0,
        guard=StepGuard(model, optimizer, world.device),
        average=sharding.create_average(model, 0.5),
        sharding=sharding,
    )


def train(trainer: Trainer, steps: int, rank: int = 0, world_size: int = 1) -> list[float]:
    """Train for `steps` steps, and return the losses over the global batch."""
    losses = []
    for step in range(steps):
        loss = trainer.step([move(make_batch(step, rank, world_size), trainer.device)], step)["loss"]
        losses.append(loss.detach().clone())
    found = torch.stack(losses)
    if world_size > 1:
        torch.distributed.all_reduce(found)
        found /= world_size
    return found.tolist()


def encode(model: open_clip.CLIP, device: torch.device) -> list[torch.Tensor]:
    """Return the normalized features of an image batch and a text batch, on the CPU."""
    batch = make_batch(0)
    model = model.to(device).eval()
    with torch.no_grad():
        features = [model.encode_image(batch["image"].to(device)), model.encode_text(batch["text"].to(device))]
    return [F.normalize(feature, dim=-1).cpu() for feature in features]


def replace_fused_adamw() -> torch.library.Library:
    """Register a `_fused_adamw_` for the NPU that ignores found_inf and grad_scale, as op-plugin's does.

    Source: op_plugin/ops/opapi/FusedAdamWKernelNpuOpApi.cpp. `_destroy()` of the result removes it.
    """

    def fused_adamw(
        parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, *, lr, beta1, beta2, weight_decay, eps,
        amsgrad, maximize, grad_scale=None, found_inf=None,
    ):  # fmt: skip
        states = zip(parameters, gradients, exp_avgs, exp_avg_sqs, steps, strict=True)
        for parameter, gradient, exp_avg, exp_avg_sq, step in states:
            parameter.mul_(1 - lr * weight_decay)
            exp_avg.lerp_(gradient, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
            parameter.addcdiv_(exp_avg / (1 - beta1**step), root, value=-lr)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_adamw_", fused_adamw, "PrivateUse1")
    return library


# Operators whose result is a number or has a data-dependent size, so that the host waits for it.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}


class Calls(TorchDispatchMode):
    """Counts the called operators, and in `waits` those for which the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        self.counts[name] += 1
        source = args[1] if name == "aten::copy_" else args[0] if args else None
        if isinstance(source, torch.Tensor) and source.device.type == "npu":
            to_host = isinstance(result, torch.Tensor) and result.device.type == "cpu"
            by_mask = name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
            self.waits += to_host or by_mask or name in WAITING
        return result


# Configurations in which an additive mask or a copy to the host is likely by mistake.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "patch_dropout": {"vision": {"patch_dropout": 0.5}},
    "padding mask, class token": {"text": {"embed_cls": True, "pad_id": 0}},
    "no causal mask": {"text": {"no_causal_mask": True, "pool_type": "last"}},
    "attention pool": {"vision": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}},
    "layer scale, average": {"vision": {"ls_init_value": 0.1, "pool_type": "avg", "pos_embed_type": "sin_cos_2d"}},
}


def for_each_configuration(use: Callable[[str, open_clip.CLIP], None]) -> None:
    for name, changes in CONFIGURATIONS.items():
        use(name, make_model(**changes))
