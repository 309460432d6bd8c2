"""Build what a run needs from its options: model and transforms, teacher, DDP, schedule."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import open_clip
from open_clip import device as devices
from open_clip import progress
from open_clip.deferred_init import DeferredInit
from open_clip.timm_model import TimmModel
from training import ranks, scheduler
from training.params import DistributedConfig, ModelConfig, ObjectiveConfig, OptimConfig, ScheduleConfig
from training.precision import Precision
from training.ranks import World
from training.sharding.part import NoSharding, Sharding
from training.sharding.units import shard_model

logger = logging.getLogger(__name__)

# Initial values of SigLIP (arXiv:2303.15343, section 3.2): temperature 10, and a bias that predicts almost all pairs as
# negative.
SIGLIP_INIT: dict[str, Any] = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}

Transform = Callable[[Any], torch.Tensor]


def build_model(
    cfg: ModelConfig, objective: ObjectiveConfig, precision: Precision, deferred: DeferredInit | None = None
) -> tuple[nn.Module, Transform, Transform]:
    """Build the model and its transforms.

    Towers are locked after their weights are loaded.

    Args:
        deferred: for a model that will be sharded. Its weights are on the CPU, or on the meta device until they are
            computed.

    Returns:
        The model on the device of `precision` (or see `deferred`), in training mode, with dict outputs; the training
        transform; the validation transform.
    """
    model: Any  # any class with the methods of CLIP
    offered = contextlib.nullcontext() if deferred is None else deferred.offered()
    with progress.watch(f"Building {cfg.model}"), offered:
        model, preprocess_train, preprocess_val = open_clip.create_model_and_transforms(
            cfg.model,
            cfg.pretrained,
            precision=precision.name,
            device=precision.device if deferred is None else "cpu",
            force_quick_gelu=cfg.force_quick_gelu,
            force_custom_text=cfg.force_custom_text,
            force_patch_dropout=cfg.force_patch_dropout,
            force_image_size=cfg.force_image_size,
            force_context_length=cfg.force_context_length,
            force_naflex_vision=cfg.force_naflex_vision,
            image_mean=cfg.image_mean,
            image_std=cfg.image_std,
            image_interpolation=cfg.image_interpolation,
            image_resize_mode=cfg.image_resize_mode,
            aug_cfg=cfg.aug_cfg,
            pretrained_image=cfg.pretrained_image,
            cache_dir=cfg.cache_dir,
            output_dict=True,
            **(SIGLIP_INIT if objective.siglip else {}),
        )
    with contextlib.nullcontext() if deferred is None else deferred.recording():
        _lock_towers(model, cfg)
    if cfg.grad_checkpointing:
        model.set_grad_checkpointing()
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%s: %.2f M parameters, %.2f M of them trainable.", cfg.model, total / 1e6, trainable / 1e6)
    logger.debug("%s", model)
    return model, preprocess_train, preprocess_val


def _lock_towers(model: Any, cfg: ModelConfig) -> None:
    if cfg.lock_image:
        model.lock_image_tower(
            unlocked_groups=cfg.lock_image_unlocked_groups, freeze_bn_stats=cfg.lock_image_freeze_bn_stats
        )
    if cfg.lock_text:
        model.lock_text_tower(
            unlocked_layers=cfg.lock_text_unlocked_layers, freeze_layer_norm=cfg.lock_text_freeze_layer_norm
        )


def start_logit_bias(model: Any) -> None:
    """Set the logit bias to SigLIP's initial value if the weights were trained without one.

    After loading such weights the bias is exactly 0, where easy negative pairs dominate the loss.
    """
    bias = model.logit_bias
    if bool((bias == 0).all()):
        with torch.no_grad():
            bias.fill_(SIGLIP_INIT["init_logit_bias"])
        if ranks.world().is_master:
            logger.warning(
                "--siglip: the weights have no logit_bias, so it starts at %g (arXiv:2303.15343, section 3.2).",
                SIGLIP_INIT["init_logit_bias"],
            )


def synchronize_batch_norms(model: nn.Module) -> nn.Module:
    """Convert batch norms to synchronized ones. timm's function keeps the activations inside timm's batch norms."""
    if isinstance(model.visual, TimmModel):
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def build_teacher(cfg: ObjectiveConfig, precision: Precision, cache_dir: str | None = None) -> nn.Module | None:
    """Build the teacher, frozen and in evaluation mode; None without --distill-model."""
    if cfg.distill_model is None:
        return None
    with progress.watch(f"Building the teacher {cfg.distill_model}"):
        teacher = open_clip.create_model(
            cfg.distill_model,
            cfg.distill_pretrained,
            precision=precision.name,
            device=precision.device,
            cache_dir=cache_dir,
            output_dict=True,
            require_pretrained=True,
        )
    return teacher.eval().requires_grad_(False)


def shard(
    model: nn.Module, cfg: DistributedConfig, world: World, precision: Precision, deferred: DeferredInit | None
) -> NoSharding:
    """Shard the model in place, if `deferred` says so. Call it before the optimizer is created.

    Args:
        deferred: of `build_model`. None: the model is not sharded.
    """
    if deferred is None:
        return NoSharding()
    gather_dtype = precision.compute_dtype if precision.is_autocast else None
    shard_model(model, cfg, world, gather_dtype, deferred.compute)
    return Sharding(model, world.device, cfg.fsdp_no_reshard_after_forward)


def parallelize(
    model: nn.Module, cfg: DistributedConfig, world: World, accum_freq: int = 1, steps_vary: bool = False
) -> nn.Module:
    """Wrap the model with DDP if there are several processes and it is not sharded.

    Call it after the optimizer was created.

    Gradients become views of DDP's buckets, which saves memory and copies, unless the optimizer has allocated them.

    Args:
        accum_freq: batches per step.
        steps_vary: the number of batches differs between steps.
    """
    if not world.distributed or cfg.fsdp:
        return model
    static_graph = cfg.ddp_static_graph and accum_freq == 1 and not steps_vary
    if cfg.ddp_static_graph and not static_graph and world.is_master:
        cause = "images of any size" if steps_vary else "--accum-freq"
        logger.warning("--ddp-static-graph has no effect, because the passes of a step differ with %s.", cause)
    indexed = devices.get(world.device).indexed
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if indexed else None,
        gradient_as_bucket_view=all(p.grad is None for p in model.parameters()),
        static_graph=static_graph,
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, cfg: ScheduleConfig, optim: OptimConfig, steps_per_epoch: int
) -> scheduler.Scheduler:
    """Build the learning rate schedule over all epochs. With --skip-scheduler it does not change the rates."""
    if cfg.skip_scheduler:
        return scheduler.unchanged_lr(optimizer)
    base_lr = scheduler.unscaled_lr(optimizer.param_groups[0]) if optim.lr is None else optim.lr
    steps = steps_per_epoch * cfg.epochs
    if cfg.lr_scheduler == "cosine":
        return scheduler.cosine_lr(optimizer, base_lr, cfg.warmup, steps)
    if cfg.lr_scheduler == "const":
        return scheduler.const_lr(optimizer, base_lr, cfg.warmup, steps)
    if cfg.lr_scheduler == "const-cooldown":
        assert cfg.epochs_cooldown is not None, "checked by training.params"
        cooldown_steps = steps_per_epoch * cfg.epochs_cooldown
        return scheduler.const_lr_cooldown(
            optimizer, base_lr, cfg.warmup, steps, cooldown_steps, cfg.lr_cooldown_power, cfg.lr_cooldown_end
        )
    raise ValueError(f"Unknown --lr-scheduler {cfg.lr_scheduler!r}. Use cosine, const or const-cooldown.")
