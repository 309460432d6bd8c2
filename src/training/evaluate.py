"""Evaluation of a model during training, by the evaluators that are due."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from open_clip.utils import evaluating
from training.evaluators.retrieval import RetrievalEvaluator
from training.evaluators.zero_shot import ImageNetEvaluator, ZeroShotEvaluator
from training.params import EvalConfig
from training.precision import Precision
from training.unpadding import KEEP_TEXTS, PaddingOptions


class Evaluator(Protocol):
    """Evaluates a model on data that were given to its constructor."""

    def run(self, model: nn.Module, epoch: int) -> Iterator[tuple[str, float]]:
        """Yield (name, value) of each metric, over all ranks. Collective: every rank calls this.

        Args:
            model: not wrapped by DDP, in evaluation mode.
            epoch: number of completed epochs.
        """
        ...


# All evaluators: (names of data sets, of which it needs at least one; the option with its frequency; its class).
EVALUATORS: tuple[tuple[tuple[str, ...], str, Callable[..., Evaluator]], ...] = (
    (("imagenet-val", "imagenet-v2"), "zeroshot_frequency", ImageNetEvaluator),
    (("zeroshot",), "zeroshot_frequency", ZeroShotEvaluator),
    (("val",), "val_frequency", RetrievalEvaluator),
)


@dataclass(frozen=True)
class ScheduledEvaluator:
    """An evaluator of some data sets that is due every `frequency` epochs; 0: never."""

    evaluator: Evaluator
    frequency: int
    data_names: tuple[str, ...]

    def is_due(self, epoch: int, is_last: bool) -> bool:
        return self.frequency > 0 and (is_last or epoch % self.frequency == 0)


def create_evaluators(
    data: Mapping[str, Any],
    cfg: EvalConfig,
    precision: Precision,
    tokenizer: Callable[[list[str]], Tensor],
    padding: PaddingOptions = KEEP_TEXTS,
) -> list[ScheduledEvaluator]:
    """Create the evaluators that have data.

    Args:
        data: any of "val", "imagenet-val", "imagenet-v2" and "zeroshot", each with a `.dataloader`.
        padding: how padding is removed from the batches, for evaluators that have an attribute `padding`.

    Raises:
        ValueError, FileNotFoundError: the data do not fit an evaluator, see there.
    """
    scheduled = []
    for names, frequency, create in EVALUATORS:
        found = tuple(name for name in names if name in data)
        if found:
            evaluator = create(data, cfg, precision, tokenizer)
            if hasattr(evaluator, "padding"):
                evaluator.padding = padding
            scheduled.append(ScheduledEvaluator(evaluator, getattr(cfg, frequency), found))
    return scheduled


def evaluators_due(scheduled: Sequence[ScheduledEvaluator], epoch: int, is_last: bool) -> list[Evaluator]:
    """Return the evaluators to run after `epoch` epochs. After the last epoch all are due that are ever due."""
    return [each.evaluator for each in scheduled if each.is_due(epoch, is_last)]


def evaluate(
    model: nn.Module,
    evaluators: Sequence[Evaluator],
    epoch: int,
    half_weights: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict[str, float]:
    """Run the evaluators. Collective: every rank calls this.

    The training mode of each module is restored afterwards.

    Args:
        model: not wrapped by DDP.
        epoch: number of completed epochs.
        half_weights: makes a context in which the model uses half precision copies of its weights, such as
            `training.half_weights.create` gives. They are converted once for all evaluators.

    Returns:
        The metrics over all ranks, by name.
    """
    metrics: dict[str, float] = {}
    with evaluating(model), torch.no_grad(), half_weights() if evaluators else contextlib.nullcontext():
        for evaluator in evaluators:
            metrics.update(evaluator.run(model, epoch))
    return metrics
