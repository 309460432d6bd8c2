"""Retrieval metrics and validation losses on --val-data.

The data are split over the ranks, which may have different numbers of batches, or none. In the loop over batches no
rank waits for another, unless the model is sharded. The results are combined after the loop. The host does not wait for
the device after each batch: losses are read after the loop, and features when there are many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import open_clip
from open_clip import collectives, progress
from open_clip.model_inputs import example_inputs
from open_clip.model_traits import traits_of
from training.batches import to_device
from training.metrics import AverageMeter, retrieval_metrics
from training.params import EvalConfig
from training.precision import Precision
from training.ranks import barrier, world
from training.sharding.in_step import batches_in_step
from training.unpadding import KEEP_TEXTS, Unpadding

_ROWS_ON_DEVICE = 8192  # of features, before they are moved to the host, which has more memory


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
        self.padding = KEEP_TEXTS
        self._gallery_rows = cfg.val_retrieval_chunk_size
        self._dtype = precision.compute_dtype if cfg.val_retrieval_precision == "model" else torch.float32

    def run(self, model: nn.Module, epoch: int) -> Iterator[tuple[str, float]]:
        here, device, loader = world(), self._precision.device, self._loader
        contrastive, unpad = open_clip.ClipLoss(), Unpadding([model], device, self.padding)
        losses = {name: _LossSums() for name in ("clip_val_loss", "val_generative_loss", "val_caption_loss")}
        pad_id = getattr(model, "pad_id", 0)
        image_features, text_features, image_ids = _HostRows(), _HostRows(), []
        total, normalization = getattr(loader, "num_samples", None), getattr(loader, "normalization", None)
        with progress.Task("Evaluating the validation data", total, "samples") as task:
            for batch in batches_in_step(loader, model, lambda: self._forward(model, example_inputs(model))):
                if isinstance(batch, Mapping) and "image_id" in batch:
                    image_ids.append(batch["image_id"])
                batch = to_device(batch, device, self._precision.input_dtype, normalization=normalization, unpad=unpad)
                outputs = self._forward(model, batch)
                image, text = outputs["image_features"].float(), outputs["text_features"].float()
                loss = contrastive(image, text, outputs["logit_scale"].float())
                losses["clip_val_loss"].add(loss, len(image))
                generative = maybe_compute_generative_loss(outputs)
                caption = maybe_compute_generative_loss(outputs, pad_id)
                if generative is not None and caption is not None:
                    losses["val_generative_loss"].add(generative, len(image))
                    losses["val_caption_loss"].add(caption, (outputs["labels"] != pad_id).sum())
                image_features.add(image)
                text_features.add(text)
                task.advance(len(image) * here.world_size)
        meters = {name: sums.read() for name, sums in losses.items()}
        averages, num_samples = _average_over_ranks(meters, device, here.distributed)
        if not num_samples:
            raise ValueError(f"{getattr(loader, 'source', 'The validation data')}: not one usable sample.")
        with progress.watch(f"Ranking {num_samples:,} pairs"):
            metrics = retrieval_metrics(
                image_features.read(),
                text_features.read(),
                device,
                here.distributed,
                torch.cat(image_ids) if image_ids else None,
                self._gallery_rows,
                self._dtype,
            )
        yield from (metrics | averages | {"epoch": epoch, "num_samples": num_samples}).items()

    def _forward(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        with self._precision.autocast():
            traits = traits_of(model)
            return traits.name_outputs(model(*traits.select_inputs(batch).values()))


class _LossSums:
    """Losses of batches. They stay on the device until they are read."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._counts: list[int | Tensor] = []

    def add(self, mean: Tensor, count: int | Tensor) -> None:
        """Add a scalar that is the mean over `count` elements."""
        self._values.append(mean)
        self._counts.append(count)

    def read(self) -> AverageMeter:
        """Return the average over the elements of all batches. Batches without elements do not count."""
        meter = AverageMeter()
        for value, count in zip(_read_scalars(self._values), _read_scalars(self._counts), strict=True):
            if count:
                meter.update(value, count)
        return meter


def _read_scalars(values: Sequence[int | Tensor]) -> list[float]:
    """Read scalars from the device with one copy."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(numbers) if isinstance(value, Tensor) else value for value in values]


class _HostRows:
    """Rows of features, which are moved to the host when there are many of them."""

    def __init__(self) -> None:
        self._on_device: list[Tensor] = []
        self._on_host: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        self._on_device.append(rows)
        if sum(map(len, self._on_device)) >= _ROWS_ON_DEVICE:
            self._move()

    def read(self) -> Tensor:
        """Return all rows [n, D] on the host; [0, 0] if there are none."""
        self._move()
        return torch.cat(self._on_host) if self._on_host else torch.zeros(0, 0)

    def _move(self) -> None:
        if self._on_device:
            self._on_host.append(torch.cat(self._on_device).cpu())
            self._on_device.clear()


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
