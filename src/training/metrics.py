"""Running averages, accuracy, and retrieval among all pairs without the matrix of all their similarities."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from open_clip import collectives

logger = logging.getLogger(__name__)

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
    image_ids: Tensor | None = None,
) -> dict[str, float]:
    """Rank the right texts for each image and the right image for each text: means, medians, and R@1, R@5, R@10.

    Pairs with equal `image_ids` are one image with several right captions, as in COCO's protocol: each image is ranked
    once, by the best of its captions, and each caption is ranked among the images. The features of an image are those
    of its first pair.

    Ranks count from 1. Candidates as similar as the right one rank as in a stable sort of the pairs' order, so that
    features which are all alike give the metrics of chance.

    Args:
        image_features, text_features: [n, D], normalised, row i of each a pair; they may stay on the host.
        device: where to compare them (default: where they are).
        distributed: the pairs are spread over the ranks of the process group, unevenly or not, and every rank calls
            this and gets the metrics of all pairs. Each ranks its own queries while blocks of every rank's candidates
            are broadcast.
        image_ids: int64 [n], which image a pair has. None: every pair has its own.

    Raises:
        ValueError: there is no pair, or the numbers of images, texts and ids differ.
    """
    device = device or image_features.device
    pairs = _Pairs(image_features, text_features, device, distributed)
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
            raise ValueError("There is no pair of an image and a text to rank.")
        ordered = column.sort().values
        middle = (ordered[(len(ordered) - 1) // 2].item() + ordered[len(ordered) // 2].item()) / 2
        metrics[f"{name}_mean_rank"] = column.double().mean().item() + 1
        metrics[f"{name}_median_rank"] = float(math.floor(middle) + 1)
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = (column < k).double().mean().item()
    return metrics


@functools.cache  # once for a data set, not in every epoch
def _log_captions(images: int, captions: int) -> None:
    logger.info("Retrieval: %d images with %d captions. Each caption of an image counts as right.", images, captions)


def _ranks(pairs: _Pairs) -> tuple[Tensor, Tensor]:
    """int64 [n], from 0, for each pair here: the rank of its text for its image, and the other way round."""
    gallery_rows, query_rows = _block_sizes(max(pairs.counts))
    device = pairs.device
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
    return better[0, : pairs.count], better[1, : pairs.count]


def _ranks_of_images(pairs: _Pairs, images: _Images) -> tuple[Tensor, Tensor]:
    """int64, from 0: for each image that is first here, the rank of its best text; for each text here, of its image.

    A first pass over the candidates finds the similarity and the place of the right one, a second counts what is
    before it.
    """
    gallery_rows, query_rows = _block_sizes(max(pairs.counts))
    starts = range(0, pairs.count, query_rows)
    shape = (2, len(starts) * query_rows)
    best = torch.full(shape, -math.inf, device=pairs.device)
    place = torch.zeros(shape, dtype=torch.int64, device=pairs.device)
    for gallery, first, count in pairs.galleries(gallery_rows):
        for start in starts:
            rows = slice(start, start + query_rows)
            similarities = _similarities(pairs.block(start, query_rows), gallery)[:, :, :count]
            is_right = images.right(start, query_rows, first, count)
            similarities = similarities.masked_fill(~is_right, -math.inf)
            found, index = similarities.max(2)
            # max does not say which of equal ones it returns: take the first
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
    here = slice(pairs.first, pairs.first + pairs.count)
    return ranks[0, : pairs.count][images.is_first[here]], ranks[1, : pairs.count]


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


class _Images:
    """Which of all ranks' pairs have the same image.

    count: of different images. number: int64 [pairs of all ranks], equal where the image is. first: the first pair with
    the image of each. is_first: whether a pair is that one.
    """

    def __init__(self, pairs: _Pairs, ids: Tensor | None) -> None:
        total = sum(pairs.counts)
        if ids is not None and ids.shape != (pairs.count,):
            raise ValueError(f"Image ids {list(ids.shape)} must be one for each of {pairs.count} pairs.")
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

    def right(self, start: int, size: int, first: int, count: int) -> Tensor:
        """bool [2, size, count]: the right texts for this rank's images from row `start`, and the right images."""
        last = len(self.number) - 1
        rows = (torch.arange(start, start + size, device=self.number.device) + self.pairs.first).clamp(max=last)
        candidates = torch.arange(first, first + count, device=self.number.device)
        texts = self.number[rows].unsqueeze(1) == self.number[candidates]
        return torch.stack([texts, self.first[rows].unsqueeze(1) == candidates])


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

    def have_ids(self, here: bool) -> bool:
        """Whether every rank that has pairs knows their images' ids."""
        known = torch.tensor([int(here or not self.count)], device=self.device)
        known = collectives.all_gather(known) if self.distributed else known
        return bool(known.all()) and (self.distributed or here)

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
