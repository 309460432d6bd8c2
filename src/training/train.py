"""Names of open_clip_train.train, for scripts written for open_clip. Nothing else of this project imports them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import open_clip
from training import evaluate as evaluation
from training import half_weights
from training import precision as precisions
from training.batches import TextGrouping
from training.checkpoint.state import TrainState
from training.epoch import run_epoch
from training.evaluate import maybe_compute_generative_loss
from training.metrics import AverageMeter, get_clip_metrics
from training.objective import LossModule, Objective, Outputs
from training.ranks import world
from training.trainer import Trainer, unwrap_model

__all__ = [
    "AverageMeter", "backward", "evaluate", "get_clip_metrics", "maybe_compute_generative_loss",
    "postprocess_clip_output", "train_one_epoch", "unwrap_model",
]  # fmt: skip

logger = logging.getLogger(__name__)


def postprocess_clip_output(model_out: Any) -> Outputs:
    """The first three of a model's tuple by name: image_features, text_features, logit_scale."""
    return {name: model_out[index] for index, name in enumerate(("image_features", "text_features", "logit_scale"))}


def backward(total_loss: Tensor, scaler: Any) -> None:
    """The backward pass, of the scaled loss where there is a gradient scaler."""
    (total_loss if scaler is None else scaler.scale(total_loss)).backward()


def evaluate(
    model: nn.Module,
    data: Mapping[str, Any],
    epoch: int,
    args: Any,
    tb_writer: Any = None,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
) -> dict[str, float]:
    """`training.evaluate.evaluate`, whose metrics the master also logs and writes.

    Every rank calls it: evaluation is spread over them.

    args: as there, and save_logs, checkpoint_path: whether and in which folder results.jsonl gets a line.
    tb_writer: of TensorBoard.
    """
    metrics = evaluation.evaluate(unwrap_model(model), data, epoch, args, tokenizer)
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
    """A TensorBoard writer with MetricsWriter's `write`."""

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
    """`run_epoch` with the parameters that it has in open_clip_train, for scripts.

    loss: an objective, or a module of open_clip.create_loss, with `dist_model` as the teacher of a distillation loss.
    args: device, precision, accum_freq, grad_clip_norm, log_every_n_steps, skip_scheduler. tb_writer: of TensorBoard.
    """
    device = torch.device(args.device)
    precision = precisions.resolve(args.precision, device)
    trainer = Trainer(
        model=model,
        objective=loss if isinstance(loss, Objective) else LossModule(loss, dist_model),
        optimizer=optimizer,
        device=device,
        scaler=scaler,
        scheduler=None if args.skip_scheduler else scheduler,
        autocast=precisions.get_autocast(precision, device.type),
        half_weights=half_weights.create(unwrap_model(model), precision, device),
        input_dtype=open_clip.get_input_dtype(args.precision),
        group_text=TextGrouping([unwrap_model(model), dist_model], device),
        accum_freq=args.accum_freq,
        grad_clip_norm=args.grad_clip_norm,
    )
    loader = data["train"].dataloader
    state = TrainState(
        model=unwrap_model(model),
        device=device,
        steps_per_epoch=loader.num_batches // args.accum_freq,
        samples_per_epoch=loader.num_samples,
        epoch=epoch,
    )
    writer = None if tb_writer is None else _ScalarWriter(tb_writer)
    run_epoch(trainer, data["train"], state, args.log_every_n_steps, writer)
