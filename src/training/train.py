"""Names of open_clip_train.train, for scripts written for open_clip. Nothing else of this project imports them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training import evaluate as evaluation
from training import half_weights
from training.checkpoint.state import TrainState
from training.epoch import run_epoch, steps_per_epoch
from training.evaluators.retrieval import maybe_compute_generative_loss
from training.metrics import AverageMeter, get_clip_metrics
from training.objective import LossModule, Objective, Outputs
from training.params import EvalConfig, LoggingConfig
from training.params.namespace import read_section
from training.precision import DisabledScaler
from training.progress import Progress
from training.ranks import world
from training.scheduler import unchanged_lr
from training.script_options import precision_of, tokenizer_of
from training.trainer import Trainer, unwrap_model
from training.unpadding import Unpadding

__all__ = [
    "AverageMeter", "backward", "evaluate", "get_clip_metrics", "maybe_compute_generative_loss",
    "postprocess_clip_output", "train_one_epoch", "unwrap_model",
]  # fmt: skip

logger = logging.getLogger(__name__)


def postprocess_clip_output(model_out: Any) -> Outputs:
    """Return the first three outputs of a model by name: image_features, text_features, logit_scale."""
    return {name: model_out[index] for index, name in enumerate(("image_features", "text_features", "logit_scale"))}


def backward(total_loss: Tensor, scaler: Any) -> None:
    """Run the backward pass of the loss, scaled by the gradient scaler unless that is None."""
    (total_loss if scaler is None else scaler.scale(total_loss)).backward()


def evaluate(
    model: nn.Module,
    data: Mapping[str, Any],
    epoch: int,
    args: Any,
    tb_writer: Any = None,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
) -> dict[str, float]:
    """Run the evaluations that are due at `epoch`. The master logs and writes the metrics. Every rank calls this.

    Args:
        epoch: number of completed epochs.
        args: a namespace with epochs, precision, val_frequency, zeroshot_frequency; with save_logs and checkpoint_path
            to append to results.jsonl in that folder; and with the name `model` if no tokenizer is given.
        tb_writer: a writer of TensorBoard.

    Returns:
        Metrics over all ranks. {} if nothing is due.
    """
    model = unwrap_model(model)
    evaluators = evaluation.create_evaluators(
        data,
        read_section(EvalConfig, args),
        precision_of(args, next(model.parameters()).device),
        tokenizer_of(args) if tokenizer is None else tokenizer,
    )
    due = evaluation.evaluators_due(evaluators, epoch, is_last=epoch == args.epochs)
    metrics = evaluation.evaluate(model, due, epoch)
    if not metrics or not world().is_master:
        return metrics
    logger.info("Eval Epoch: %d %s", epoch, "\t".join(f"{name}: {value:.4f}" for name, value in metrics.items()))
    if tb_writer is not None:
        _ScalarWriter(tb_writer).write(metrics, epoch, "val")
    if getattr(args, "save_logs", False):
        with open(Path(args.checkpoint_path) / "results.jsonl", "a", encoding="utf-8") as results:
            results.write(json.dumps(metrics) + "\n")
    return metrics


class _ScalarWriter:
    """A TensorBoard writer with the interface of `training.progress.Writer`."""

    def __init__(self, tensorboard: Any) -> None:
        self._tensorboard = tensorboard

    def write(self, metrics: Mapping[str, float], step: int, prefix: str) -> None:
        for name, value in metrics.items():
            self._tensorboard.add_scalar(f"{prefix}/{name}", value, step)


def train_one_epoch(
    model: nn.Module,
    data: Mapping[str, Any],
    loss: Objective | nn.Module,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    scheduler: Callable[[int], Any] | None,
    dist_model: nn.Module | None,
    args: Any,
    tb_writer: Any = None,
) -> None:
    """Train one epoch with `training.epoch.run_epoch`.

    Steps with a loss that is not finite are not skipped.

    Args:
        loss: an objective, or a module from open_clip.create_loss.
        scaler: None: no gradient scaling.
        dist_model: teacher of a distillation loss.
        args: a namespace with device, precision, accum_freq, grad_clip_norm, log_every_n_steps, skip_scheduler.
            log_metric_every_n_steps and train_loss_ema_samples of open_clip's main branch are read if they are there.
        tb_writer: a writer of TensorBoard.
    """
    precision = precision_of(args, torch.device(args.device))
    bare = unwrap_model(model)
    trainer = Trainer(
        model=model,
        objective=loss if isinstance(loss, Objective) else LossModule(loss, dist_model),
        optimizer=optimizer,
        precision=precision,
        scaler=DisabledScaler() if scaler is None else scaler,
        scheduler=unchanged_lr(optimizer) if args.skip_scheduler or scheduler is None else scheduler,
        half_weights=half_weights.create(bare, precision),
        unpad=Unpadding([bare, dist_model], precision.device),
        accum_freq=args.accum_freq,
        grad_clip_norm=math.inf if args.grad_clip_norm is None else args.grad_clip_norm,
    )
    loader = data["train"].dataloader
    state = TrainState(
        model=bare,
        device=precision.device,
        steps_per_epoch=steps_per_epoch(loader, args.accum_freq),
        samples_per_epoch=loader.num_samples,
        epoch=epoch,
    )
    writer = None if tb_writer is None else _ScalarWriter(tb_writer)
    cfg = read_section(LoggingConfig, args)
    progress = Progress(
        precision.device,
        cfg.log_every_n_steps,
        writer,
        log_metric_every_n_steps=cfg.log_metric_every_n_steps,
        loss_average_samples=cfg.train_loss_ema_samples,
    )
    run_epoch(trainer, data["train"], state, progress)
