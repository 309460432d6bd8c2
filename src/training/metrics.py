"""Running averages, accuracy, and retrieval among all pairs without the matrix of all their similarities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from open_clip import collectives

GALLERY_ROWS = 8192  # candidates that are compared at once,
QUERY_ROWS = 512  # with this many queries: similarities of 16 MiB


class AverageMeter:
    """The last value, and the average of all, weighted."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.val = 0.0
        self.avg = 0.0
        self.sum = 0.0
        self.count = 0.0

    def update(self, val: float, n: float = 1) -> None:
        """val: an average over n things."""
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count if self.count else 0.0


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """For each k the number of samples whose class is among the k best: counts, not shares.

    output: scores [B, classes]; target: labels [B]. A k above the number of classes counts as that number.
    """
    best = output.topk(min(max(topk), output.shape[1]), dim=1).indices
    correct = best == target.unsqueeze(1)
    return [float(correct[:, :k].sum().item()) for k in topk]


def get_clip_metrics(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float = 1.0
) -> dict[str, float]:
    """`retrieval_metrics` by its name in open_clip. A positive logit_scale changes no rank."""
    return retrieval_metrics(image_features, text_features)


def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    device: torch.device | None = None,
    distributed: bool = False,
) -> dict[str, float]:
    """How the right text ranks for each image and the right image for each text: means, medians, and R@1, R@5, R@10.

    image_features, text_features: [n, D], normalised, row i of each a pair; they may stay on the host.
    device: where to compare them (default: where they are).
    distributed: the pairs are spread over the ranks of the process group, unevenly or not, and every rank calls this
    and gets the metrics of all pairs. Each ranks its own queries while blocks of every rank's candidates come by.

    Ranks count from 1. Candidates as similar as the right one rank as in a stable sort of the pairs' order, so that
    features which are all alike give the metrics of chance.
    """
    device = device or image_features.device
    ranks = _ranks(image_features, text_features, device, distributed)
    if distributed:
        ranks = collectives.gather_rows(ranks)
    metrics = {}
    for name, column in zip(("image_to_text", "text_to_image"), ranks.cpu().unbind(1), strict=True):
        if not len(column):
            raise ValueError("There is no pair of an image and a text to rank.")
        ordered = column.sort().values
        middle = (ordered[(len(ordered) - 1) // 2].item() + ordered[len(ordered) // 2].item()) / 2
        metrics[f"{name}_mean_rank"] = column.double().mean().item() + 1
        metrics[f"{name}_median_rank"] = float(math.floor(middle) + 1)
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = (column < k).double().mean().item()
    return metrics


def _ranks(image_features: Tensor, text_features: Tensor, device: torch.device, distributed: bool) -> Tensor:
    """int64 [n, 2], from 0, for each pair here: the rank of its text for its image, and the other way round."""
    pairs = _Pairs(image_features, text_features, device, distributed)
    gallery_rows, query_rows = _block_sizes(max(pairs.counts))
    # A similarity must have the same bits wherever it is computed, or equal candidates would not be equal. So all
    # products are of blocks of one size, and the right candidate's similarity is taken out of such a product, too.
    starts = range(0, pairs.count, query_rows)
    right = []
    for start in starts:
        home = start // gallery_rows * gallery_rows
        similarities = _similarities(pairs.block(start, query_rows), pairs.block(home, gallery_rows))
        right.append(similarities.diagonal(start - home, 1, 2).unsqueeze(2).clone())
    better = torch.zeros(2, len(starts) * query_rows, dtype=torch.int64, device=device)
    for gallery, first, count in pairs.galleries(gallery_rows):
        candidates = torch.arange(first, first + count, device=device)
        for own_similarity, start in zip(right, starts, strict=True):
            similarities = _similarities(pairs.block(start, query_rows), gallery)[:, :, :count]
            own = torch.arange(start, start + query_rows, device=device).unsqueeze(1) + pairs.first
            before = (similarities == own_similarity) & (candidates < own)
            before |= similarities > own_similarity
            better[:, start : start + query_rows] += before.sum(2)
    return better[:, : pairs.count].T.contiguous()


def _block_sizes(rows: int) -> tuple[int, int]:
    """Sizes of the blocks of candidates and of queries, for at most `rows` pairs a rank; one divides the other."""
    blocks = max(1, math.ceil(rows / GALLERY_ROWS))
    size = max(1, math.ceil(rows / blocks))
    unit = min(QUERY_ROWS, math.ceil(size / 64) * 64)  # whole tiles of a matrix product, whatever its kernel
    size = math.ceil(size / unit) * unit
    return size, unit


def _similarities(queries: Tensor, gallery: Tensor) -> Tensor:
    """Images with texts, and texts with images: [2, size of queries, size of gallery]."""
    return queries @ gallery.flip(0).transpose(1, 2)


class _Pairs:
    """This rank's pairs among those of all ranks, in blocks on the device."""

    def __init__(self, image_features: Tensor, text_features: Tensor, device: torch.device, distributed: bool):
        if image_features.shape != text_features.shape or image_features.ndim != 2:
            raise ValueError(
                f"Image features {list(image_features.shape)} and text features {list(text_features.shape)} must both "
                "be [pairs, embedding] of one size."
            )
        self.features = (image_features, text_features)
        self.device = device
        self.distributed = distributed
        self.rank = torch.distributed.get_rank() if distributed else 0
        shape = torch.tensor([list(image_features.shape)], device=device)
        shapes = (collectives.all_gather(shape) if distributed else shape).tolist()
        self.counts = [count for count, _ in shapes]
        self.width = max(width for _, width in shapes)  # a rank without pairs does not know it
        self.count = self.counts[self.rank]
        self.first = sum(self.counts[: self.rank])

    def block(self, start: int, size: int) -> Tensor:
        """fp32 [2, size, width]: images and texts from row `start` of this rank's, zeros beyond the last."""
        padded = torch.zeros(2, size, self.width, device=self.device)
        for number, features in enumerate(self.features):
            part = features[start : start + size]
            padded[number, : len(part)] = part.to(self.device, torch.float32)
        return padded

    def galleries(self, size: int) -> Iterator[tuple[Tensor, int, int]]:
        """All ranks' pairs, on every rank at the same time: (block, number of its first pair, how many are in it)."""
        first = 0
        for source, count in enumerate(self.counts):
            for start in range(0, count, size):
                if source == self.rank:
                    block = self.block(start, size)
                else:
                    block = torch.empty(2, size, self.width, device=self.device)
                if self.distributed:
                    block = collectives.broadcast(block, source)
                yield block, first + start, min(size, count - start)
            first += count
