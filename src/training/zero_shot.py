"""Names of open_clip_train.zero_shot, for scripts written for open_clip. Nothing else of this project imports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.evaluate import create_evaluators, evaluators_due
from training.evaluators.zero_shot import classify
from training.metrics import accuracy
from training.params import EvalConfig
from training.params.namespace import read_section
from training.script_options import precision_of, tokenizer_of

__all__ = ["accuracy", "run", "run_zero_shot_classifier", "zero_shot_eval"]


def run(
    model: nn.Module, classifier: Tensor, dataloader: Any, args: Any, name: str = "zero-shot data"
) -> tuple[float, float]:
    """Compute (top-1, top-5) accuracy over the images of all ranks, see `training.evaluators.zero_shot.classify`.

    Args:
        args: a namespace with `precision`.
    """

    def count(scores: Tensor, labels: Tensor, topk: Sequence[int]) -> Tensor:
        # By `accuracy` of this module, which programs replace.
        return torch.tensor([int(found) for found in accuracy(scores, labels, topk)], device=scores.device)

    return classify(model, classifier, dataloader, precision_of(args, classifier.device), name, count)


def run_zero_shot_classifier(
    model: nn.Module, classifier: Tensor, dataloader: Any, args: Any, use_fsdp_eval: bool = False
) -> tuple[float, float]:
    """Call `run`. This is its name in open_clip's main branch. `use_fsdp_eval` has no effect."""
    return run(model, classifier, dataloader, args)


def zero_shot_eval(
    model: nn.Module,
    data: Mapping[str, Any],
    epoch: int,
    args: Any,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
) -> dict[str, float]:
    """Compute top-1 and top-5 accuracy if due at `epoch`. Collective: every rank calls this.

    Args:
        data: any of "imagenet-val", "imagenet-v2" and "zeroshot", each with a `.dataloader`.
        epoch: number of completed epochs.
        args: a namespace with epochs, precision, zeroshot_frequency, and the name `model` if no tokenizer is given.

    Returns:
        Accuracies over all ranks. {} if nothing is due.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    labelled = {name: info for name, info in data.items() if name != "val"}
    if not labelled:
        return {}
    evaluators = create_evaluators(
        labelled,
        read_section(EvalConfig, args),
        precision_of(args, next(model.parameters()).device),
        tokenizer_of(args) if tokenizer is None else tokenizer,
    )
    metrics: dict[str, float] = {}
    for evaluator in evaluators_due(evaluators, epoch, is_last=epoch == args.epochs):
        metrics.update(evaluator.run(model, epoch))
    return metrics
