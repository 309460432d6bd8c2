"""Running averages, accuracy, and retrieval metrics that do not need the whole similarity matrix."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from open_clip import collectives

logger = logging.getLogger(__name__)

GALLERY_ROWS = 8192  # candidates per block
QUERY_ROWS = 512  # queries per block; the similarities of a block take 16 MiB


class AverageMeter:
    """The last value (`val`) and the weighted average of all values (`avg`)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.val = 0.0
        self.avg = 0.0
        self.sum = 0.0
        self.count = 0.0

    def update(self, val: float, n: float = 1) -> None:
        """Add a value that is the average over `n` samples."""
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count if self.count else 0.0


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Count, for each k, the samples whose class is among the k highest scores. The results are not fractions.

    Args:
        output: scores [B, classes].
        target: labels [B].
        topk: values of k. Those above the number of classes are reduced to it.
    """
    return [float(count) for count in count_correct(output, target, topk).tolist()]


def count_correct(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> Tensor:
    """Count as `accuracy` does, without waiting for the device: int64 [len(topk)] there."""
    best = output.topk(min(max(topk), output.shape[1]), dim=1).indices
    correct = best == target.unsqueeze(1)
    return torch.stack([correct[:, :k].sum() for k in topk])


def get_clip_metrics(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float = 1.0
) -> dict[str, float]:
    """Call `retrieval_metrics`. This is its name in open_clip. A positive logit_scale has no effect on the ranks."""
    return retrieval_metrics(image_features, text_features)


def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    device: torch.device | None = None,
    distributed: bool = False,
    image_ids: Tensor | None = None,
    gallery_rows: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Compute mean rank, median rank, R@1, R@5 and R@10 of image-to-text and text-to-image retrieval.

    Pairs with equal `image_ids` are one image with several correct captions, as in the COCO protocol. Each image is a
    query once, ranked by the best of its captions, and each caption is ranked among the images. The features of an
    image are those of its first pair.

    Ranks start at 1. Candidates that are as similar as the correct one are ranked in the order of the pairs, so if all
    features are equal, the metrics are those of chance.

    Args:
        image_features, text_features: [n, D], normalized. Row i of both is a pair. They may be on the host.
        device: where to compute the similarities. Default: where the features are.
        distributed: the pairs are split over the ranks, evenly or not. Collective: every rank calls this and gets the
            metrics of all pairs. Each rank has its own queries, and the candidates are broadcast in blocks.
        image_ids: int64 [n], the image of each pair. None: all images are different.
        gallery_rows: candidates per block; None: GALLERY_ROWS.
        dtype: of the similarities.

    Raises:
        ValueError: there is no pair, or the numbers of images, texts and ids differ.
    """
    device = device or image_features.device
    pairs = _Pairs(image_features, text_features, device, distributed, dtype)
    pairs.gallery_rows = gallery_rows or GALLERY_ROWS
    images = _Images(pairs, image_ids)
    if images.count < sum(pairs.counts):
        if pairs.rank == 0:
            _log_captions(images.count, sum(pairs.counts))
        image_ranks, text_ranks = _ranks_of_images(pairs, images)
    else:
        image_ranks, text_ranks = _ranks(pairs)
    metrics = {}
    for name, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        column = (collectives.gather_rows(ranks.contiguous()) if distributed else ranks).cpu()
        if not len(column):
            raise ValueError("There are no image-text pairs to rank.")
        ordered = column.sort().values
        middle = (ordered[(len(ordered) - 1) // 2].item() + ordered[len(ordered) // 2].item()) / 2
        metrics[f"{name}_mean_rank"] = column.double().mean().item() + 1
        metrics[f"{name}_median_rank"] = float(math.floor(middle) + 1)
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = (column < k).double().mean().item()
    return metrics


@functools.cache  # log once per dataset, not in every epoch
def _log_captions(images: int, captions: int) -> None:
    logger.info("Retrieval: %d images with %d captions. Every caption of an image is correct.", images, captions)


def _ranks(pairs: _Pairs) -> tuple[Tensor, Tensor]:
    """Rank the pairs of this rank: image-to-text and text-to-image ranks from 0, int64 [n]."""
    gallery_rows, query_rows = _block_sizes(max(pairs.counts), pairs.gallery_rows)
    device = pairs.device
    # The bits of a similarity must not depend on the block, or equal candidates would not compare as equal. So all
    # products have the same block size, including those that give the similarity of the correct candidate.
    starts = range(0, pairs.count, query_rows)
    correct = []
    for start in starts:
        aligned = start // gallery_rows * gallery_rows
        similarities = _similarities(pairs.block(start, query_rows), pairs.block(aligned, gallery_rows))
        correct.append(similarities.diagonal(start - aligned, 1, 2).unsqueeze(2).clone())
    better = torch.zeros(2, len(starts) * query_rows, dtype=torch.int64, device=device)
    for gallery, first, count in pairs.galleries(gallery_rows):
        candidates = torch.arange(first, first + count, device=device)
        for own_similarity, start in zip(correct, starts, strict=True):
            similarities = _similarities(pairs.block(start, query_rows), gallery)[:, :, :count]
            own = torch.arange(start, start + query_rows, device=device).unsqueeze(1) + pairs.first
            before = (similarities == own_similarity) & (candidates < own)
            before |= similarities > own_similarity
            better[:, start : start + query_rows] += before.sum(2)
    return better[0, : pairs.count], better[1, : pairs.count]


def _ranks_of_images(pairs: _Pairs, images: _Images) -> tuple[Tensor, Tensor]:
    """Rank images with several captions: for each image the rank of its best text, for each text that of its image.

    The first pass over the candidates finds the similarity and position of the correct one. The second pass counts the
    candidates before it. Each image is ranked where its first pair is.

    Returns:
        int64 [images whose first pair is on this rank] and int64 [texts on this rank], from 0.
    """
    gallery_rows, query_rows = _block_sizes(max(pairs.counts), pairs.gallery_rows)
    starts = range(0, pairs.count, query_rows)
    shape = (2, len(starts) * query_rows)
    best = torch.full(shape, -math.inf, device=pairs.device)
    place = torch.zeros(shape, dtype=torch.int64, device=pairs.device)
    for gallery, first, count in pairs.galleries(gallery_rows):
        for start in starts:
            rows = slice(start, start + query_rows)
            similarities = _similarities(pairs.block(start, query_rows), gallery)[:, :, :count]
            is_correct = images.find_correct(start, query_rows, first, count)
            similarities = similarities.masked_fill(~is_correct, -math.inf)
            found, index = similarities.max(2)
            # max may return any of several equal candidates: take the first
            index = torch.where(similarities == found.unsqueeze(2), torch.arange(count, device=pairs.device), count)
            is_better = found > best[:, rows]
            best[:, rows] = torch.where(is_better, found, best[:, rows])
            place[:, rows] = torch.where(is_better, index.amin(2) + first, place[:, rows])
    ranks = torch.zeros(shape, dtype=torch.int64, device=pairs.device)
    for gallery, first, count in pairs.galleries(gallery_rows):
        candidates = torch.arange(first, first + count, device=pairs.device)
        is_candidate = torch.stack([torch.ones_like(images.is_first[candidates]), images.is_first[candidates]])
        for start in starts:
            rows = slice(start, start + query_rows)
            similarities = _similarities(pairs.block(start, query_rows), gallery)[:, :, :count]
            own = best[:, rows].unsqueeze(2)
            before = (similarities == own) & (candidates < place[:, rows].unsqueeze(2))
            before |= similarities > own
            ranks[:, rows] += (before & is_candidate.unsqueeze(1)).sum(2)
    own_pairs = slice(pairs.first, pairs.first + pairs.count)
    return ranks[0, : pairs.count][images.is_first[own_pairs]], ranks[1, : pairs.count]


def _block_sizes(rows: int, gallery_rows: int) -> tuple[int, int]:
    """Choose block sizes of candidates and queries for up to `rows` pairs per rank. The second divides the first."""
    blocks = max(1, math.ceil(rows / gallery_rows))
    size = max(1, math.ceil(rows / blocks))
    unit = min(QUERY_ROWS, math.ceil(size / 64) * 64)  # whole tiles of a matrix product, for any kernel
    size = math.ceil(size / unit) * unit
    return size, unit


def _similarities(queries: Tensor, gallery: Tensor) -> Tensor:
    """Compute image-text and text-image similarities [2, size of queries, size of gallery]."""
    return queries @ gallery.flip(0).transpose(1, 2)


class _Images:
    """The images of the pairs of all ranks, some of which may be equal.

    Attributes:
        count: number of different images.
        number: int64 [pairs of all ranks], number of the image of each pair.
        first: int64 [pairs of all ranks], first pair with the same image.
        is_first: bool [pairs of all ranks], whether the pair is the first with its image.
    """

    def __init__(self, pairs: _Pairs, ids: Tensor | None) -> None:
        total = sum(pairs.counts)
        if ids is not None and ids.shape != (pairs.count,):
            raise ValueError(f"image_ids has the shape {list(ids.shape)}. It needs one id per pair, {pairs.count}.")
        self.count = total
        self.pairs = pairs
        if not pairs.have_ids(ids is not None):
            return
        known = torch.zeros(0, dtype=torch.int64) if ids is None else ids
        known = known.to(pairs.device, torch.int64).contiguous()
        whole = (collectives.gather_rows(known) if pairs.distributed else known).cpu()
        values, number = torch.unique(whole, return_inverse=True)
        self.count = len(values)
        places = torch.arange(total)
        first = torch.full((self.count,), total).scatter_reduce(0, number, places, "amin")[number]
        self.number, self.first = number.to(pairs.device), first.to(pairs.device)
        self.is_first = (first == places).to(pairs.device)

    def find_correct(self, start: int, size: int, first: int, count: int) -> Tensor:
        """Mark the correct texts and the correct images for the queries of this rank from `start`.

        Returns:
            bool [2, size, count], for the `count` candidates from `first`.
        """
        last = len(self.number) - 1
        rows = (torch.arange(start, start + size, device=self.number.device) + self.pairs.first).clamp(max=last)
        candidates = torch.arange(first, first + count, device=self.number.device)
        texts = self.number[rows].unsqueeze(1) == self.number[candidates]
        return torch.stack([texts, self.first[rows].unsqueeze(1) == candidates])


class _Pairs:
    """The pairs of this rank among those of all ranks, in blocks on the device."""

    gallery_rows = GALLERY_ROWS

    def __init__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        device: torch.device,
        distributed: bool,
        dtype: torch.dtype,
    ) -> None:
        if image_features.shape != text_features.shape or image_features.ndim != 2:
            raise ValueError(
                f"Image features {list(image_features.shape)} and text features {list(text_features.shape)} must have "
                "the same shape [pairs, embedding]."
            )
        self.features = (image_features, text_features)
        self.device = device
        self.distributed = distributed
        self.dtype = dtype
        self.rank = torch.distributed.get_rank() if distributed else 0
        shape = torch.tensor([list(image_features.shape)], device=device)
        shapes = (collectives.all_gather(shape) if distributed else shape).tolist()
        self.counts = [count for count, _ in shapes]
        self.width = max(width for _, width in shapes)  # a rank without pairs has 0
        self.count = self.counts[self.rank]
        self.first = sum(self.counts[: self.rank])

    def have_ids(self, has_ids: bool) -> bool:
        """Return whether every rank with pairs has image ids; `has_ids` is whether this rank has them. Collective."""
        known = torch.tensor([int(has_ids or not self.count)], device=self.device)
        known = collectives.all_gather(known) if self.distributed else known
        return bool(known.all()) and (self.distributed or has_ids)

    def block(self, start: int, size: int) -> Tensor:
        """Return images and texts of this rank from row `start`, [2, size, width], padded with zeros."""
        padded = torch.zeros(2, size, self.width, dtype=self.dtype, device=self.device)
        for number, features in enumerate(self.features):
            part = features[start : start + size]
            padded[number, : len(part)] = part.to(self.device, self.dtype)
        return padded

    def galleries(self, size: int) -> Iterator[tuple[Tensor, int, int]]:
        """Iterate over the pairs of all ranks: (block, number of its first pair, number of pairs). Collective."""
        first = 0
        for source, count in enumerate(self.counts):
            for start in range(0, count, size):
                if source == self.rank:
                    block = self.block(start, size)
                else:
                    block = torch.empty(2, size, self.width, dtype=self.dtype, device=self.device)
                if self.distributed:
                    block = collectives.broadcast(block, source)
                yield block, first + start, min(size, count - start)
            first += count
