"""Retrieval metrics and validation losses on --val-data.

The data are split over the ranks. In the loop over batches no rank waits for another, so the ranks may have different
numbers of batches, or none. The results are combined after the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import open_clip
from open_clip import collectives, progress
from training.batches import to_device
from training.metrics import AverageMeter, retrieval_metrics
from training.objective import as_outputs
from training.params import EvalConfig
from training.precision import Precision
from training.ranks import barrier, world


class RetrievalEvaluator:
    """Computes retrieval metrics, losses, num_samples and epoch, with the names of open_clip.

    clip_val_loss is the contrastive loss within each batch, averaged over the samples, so it depends on the batch size.
    Captioners have two more losses. val_generative_loss includes padding, as in open_clip, although captioners are not
    trained to predict it. val_caption_loss is the mean over the tokens of the captions, as in training.
    """

    def __init__(
        self, data: Mapping[str, Any], cfg: EvalConfig, precision: Precision, tokenizer: Callable[..., Any]
    ) -> None:
        self._loader = data["val"].dataloader
        self._precision = precision

    def run(self, model: nn.Module, epoch: int) -> Iterator[tuple[str, float]]:
        here, device, loader = world(), next(model.parameters()).device, self._loader
        contrastive = open_clip.ClipLoss()
        losses = {name: AverageMeter() for name in ("clip_val_loss", "val_generative_loss", "val_caption_loss")}
        pad_id = getattr(model, "pad_id", 0)
        image_features, text_features, image_ids = [], [], []
        total, normalization = getattr(loader, "num_samples", None), getattr(loader, "normalization", None)
        with progress.Task("Evaluating the validation data", total, "samples") as task:
            for batch in loader:
                if isinstance(batch, Mapping) and "image_id" in batch:
                    image_ids.append(batch["image_id"])
                batch = to_device(batch, device, self._precision.input_dtype, normalization=normalization)
                with self._precision.autocast():
                    outputs = as_outputs(model(batch["image"], batch["text"]))
                image, text = outputs["image_features"].float(), outputs["text_features"].float()
                loss = contrastive(image, text, outputs["logit_scale"].float())
                losses["clip_val_loss"].update(loss.item(), len(image))
                generative = maybe_compute_generative_loss(outputs)
                if generative is not None:
                    losses["val_generative_loss"].update(generative.item(), len(image))
                    num_tokens = int((outputs["labels"] != pad_id).sum())
                    caption = maybe_compute_generative_loss(outputs, pad_id)
                    if caption is not None and num_tokens:
                        losses["val_caption_loss"].update(caption.item(), num_tokens)
                # On the host, which has more memory.
                image_features.append(image.cpu())
                text_features.append(text.cpu())
                task.advance(len(image) * here.world_size)
        averages, num_samples = _average_over_ranks(losses, device, here.distributed)
        if not num_samples:
            raise ValueError(f"{getattr(loader, 'source', 'The validation data')}: not one usable sample.")
        none = torch.zeros(0, 0)
        with progress.watch(f"Ranking {num_samples:,} pairs"):
            metrics = retrieval_metrics(
                torch.cat(image_features) if image_features else none,
                torch.cat(text_features) if text_features else none,
                device,
                here.distributed,
                torch.cat(image_ids) if image_ids else None,
            )
        yield from (metrics | averages | {"epoch": epoch, "num_samples": num_samples}).items()


def maybe_compute_generative_loss(model_out: Mapping[str, Tensor], pad_id: int | None = None) -> Tensor | None:
    """Compute the cross entropy of a captioner; None for other models.

    Args:
        model_out: with "logits" [B, L, vocabulary] and "labels" [B, L] if the model is a captioner.
        pad_id: label to ignore.
    """
    if "logits" not in model_out or "labels" not in model_out:
        return None
    logits = model_out["logits"].float().transpose(1, 2)
    return F.cross_entropy(logits, model_out["labels"], ignore_index=-100 if pad_id is None else pad_id)


def _average_over_ranks(
    losses: Mapping[str, AverageMeter], device: torch.device, distributed: bool
) -> tuple[dict[str, float], int]:
    """Return the averages over all ranks of the losses with samples, and the number of samples of the first loss."""
    sums = torch.tensor([meter.sum for meter in losses.values()], dtype=torch.float32, device=device)
    counts = torch.tensor([int(meter.count) for meter in losses.values()], dtype=torch.int64, device=device)
    if distributed:
        barrier()  # wait for slower ranks first, because collectives of the device have a time limit
        sums, counts = collectives.all_reduce(sums), collectives.all_reduce(counts)
    pairs = zip(losses, sums.tolist(), counts.tolist(), strict=True)
    averages = {name: total / count for name, total, count in pairs if count}
    return averages, int(counts[0])
