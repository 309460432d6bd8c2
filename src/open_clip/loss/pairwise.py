"""Losses over the similarities of all pairs of images and texts in a batch, distributed over ranks, in tiles.

A batch of N pairs has N x N logits. They are never stored as a whole, neither in the forward nor in the backward: each
tile is computed, reduced (to maxima and sums of a softmax, a sum of sigmoids, or a gradient) and discarded.

Shapes: n is the number of pairs on this rank, N = n * world_size, D is the width of the embedding. Row i of the logits
belongs to image i, column j to text j, both counted over all ranks. Matrix products are computed in `Batch.dtype`,
everything else in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import collectives

TILE_ROWS = 1024
TILE_ELEMENTS = 2**20  # 4 MiB in float32: fits a CPU cache, and is large enough for an accelerator


class Batch(NamedTuple):
    """Position of the local pairs in the global batch, and the variant of the loss."""

    rank: int
    world_size: int
    dtype: torch.dtype  # dtype of the matrix products
    local_loss: bool = False  # softmax: see loss.ClipLoss
    gather_with_grad: bool = False
    exchange: str = "bidir"  # sigmoid: see loss.SigLipLoss

    @property
    def distributed(self) -> bool:
        return self.world_size > 1


def own_rows(rank: int, count: int) -> slice:
    return slice(rank * count, (rank + 1) * count)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums and exponentials of values of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    height = min(rows, TILE_ROWS)
    width = min(columns, TILE_ELEMENTS // height)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def is_one_tile(rows: int, columns: int) -> bool:
    return rows <= TILE_ROWS and rows * columns <= TILE_ELEMENTS


def pairs_of_tile(tile: Tensor, rows: slice, columns: slice, first_column: int = 0) -> Tensor:
    """Return a view, possibly empty, of the elements of a tile for pairs: row i and column first_column + i."""
    return tile.diagonal(first_column + rows.start - columns.start)


# Softmax loss of CLIP


class _Softmax(NamedTuple):
    """Maximum of the logits and sum of exp(logit - maximum), of each row [n] and each column [N]."""

    row_max: Tensor
    row_sum: Tensor
    column_max: Tensor
    column_sum: Tensor


def softmax_loss(image: Tensor, text: Tensor, scale: Tensor, batch: Batch) -> Tensor:
    """Compute the mean of the cross entropies image -> text and text -> image.

    The formula is from https://arxiv.org/abs/2103.00020, figure 3. `loss.ClipLoss` documents the gradient scale.

    A rank computes the logits of its images with the texts of all ranks: complete rows, and a part of each column. The
    ranks then sum the parts of the columns. So images are never gathered, and no logit is computed twice, in all four
    variants. The gradient of the texts is summed over the ranks in the same way.

    Args:
        image: [n, D].
        text: [n, D].
        scale: scale of the logits, one element.
        batch: position of the pairs, and the variant.

    Returns:
        The loss, a scalar.
    """
    return _SoftmaxLoss.apply(image, text, scale, batch)


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, batch: Batch) -> Tensor:
        if not batch.distributed and is_one_tile(len(image), len(text)):
            ctx.batch = batch
            ctx.save_for_backward(image, text, scale)
            return _loss_of_tile(image, text, scale, batch.dtype)
        all_text = collectives.all_gather(text) if batch.distributed else text
        own = own_rows(batch.rank, len(image))
        softmax, positives = _softmax_statistics(image, all_text, scale, own.start, batch.dtype)
        if batch.distributed:
            softmax = _complete_columns(softmax)
        row_loss = softmax.row_max + softmax.row_sum.log() - positives
        column_loss = softmax.column_max[own] + softmax.column_sum[own].log() - positives
        loss = (row_loss.mean() + column_loss.mean()) / 2
        if batch.distributed and not batch.local_loss:
            loss = collectives.all_reduce(loss) / batch.world_size
        ctx.batch = batch
        ctx.save_for_backward(image, all_text, scale, *softmax)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        image, all_text, scale, *statistics = ctx.saved_tensors
        need_image, need_text, need_scale, _ = ctx.needs_input_grad
        batch, softmax = ctx.batch, _Softmax(*statistics) if statistics else None
        # A rank's features occur in its own rows and columns of the logits, and as negatives in those of other ranks.
        # They get the gradients of both, unless the loss is local and the features of other ranks are constants.
        linked = not batch.distributed or batch.gather_with_grad or not batch.local_loss
        weights = _weights(grad, batch, len(image))
        gradients = _softmax_gradients(image, all_text, scale, softmax, weights.ranks, batch, linked)
        if batch.distributed:
            gradients = gradients._replace(text=collectives.reduce_scatter(gradients.text))
        grad_scale = None
        if need_scale:
            text = all_text[own_rows(batch.rank, len(image))]
            grad_scale = weights.scale * _scale_gradient(image, text, gradients, batch, linked)
            grad_scale = grad_scale.to(scale.dtype).reshape(scale.shape)
        factor = weights.features * scale
        return (
            gradients.image.mul_(factor).to(image.dtype) if need_image else None,
            gradients.text.mul_(factor).to(all_text.dtype) if need_text else None,
            grad_scale,
            None,
        )


def _loss_of_tile(image: Tensor, text: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss of pairs whose logits are one tile, in few operators: no parts of a softmax to put together."""
    logits = (image.to(dtype) @ text.to(dtype).T).to(exact_dtype(dtype)) * scale
    return logits.logsumexp(1).lerp(logits.logsumexp(0), 0.5).sub(logits.diagonal()).mean()


def _softmax_statistics(
    image: Tensor, all_text: Tensor, scale: Tensor, first_column: int, dtype: torch.dtype
) -> tuple[_Softmax, Tensor]:
    """Compute softmax statistics of image [n, D] and all_text [N, D], with a maximum that is updated tile by tile.

    Returns:
        (statistics, logits [n] of the pairs at row i and column first_column + i). The statistics of the columns cover
        only the given images.
    """
    exact = exact_dtype(dtype)
    rows, columns = len(image), len(all_text)
    image, all_text = image.to(dtype), all_text.to(dtype)
    row_max = torch.full((rows,), -torch.inf, dtype=exact, device=image.device)
    column_max = torch.full((columns,), -torch.inf, dtype=exact, device=image.device)
    row_sum, column_sum, positives = torch.zeros_like(row_max), torch.zeros_like(column_max), torch.zeros_like(row_max)
    for row, column in tiles(rows, columns):
        logits = (image[row] @ all_text[column].T).to(exact) * scale
        for dim, part, maximum, total in ((1, row, row_max, row_sum), (0, column, column_max, column_sum)):
            larger = torch.maximum(maximum[part], logits.amax(dim))
            added = (logits - larger.unsqueeze(dim)).exp_().sum(dim)
            total[part] = total[part] * (maximum[part] - larger).exp() + added
            maximum[part] = larger
        pairs = pairs_of_tile(logits, row, column, first_column)
        start = max(row.start, column.start - first_column)
        positives[start : start + len(pairs)] = pairs
    return _Softmax(row_max, row_sum, column_max, column_sum), positives


def _complete_columns(softmax: _Softmax) -> _Softmax:
    """Combine the column statistics of all ranks."""
    column_max = collectives.all_reduce(softmax.column_max, op="max")
    rescaled = softmax.column_sum * (softmax.column_max - column_max).exp()
    return softmax._replace(column_max=column_max, column_sum=collectives.all_reduce(rescaled))


class _Weights(NamedTuple):
    """Incoming gradients of the losses of this rank and of other ranks, which may differ."""

    features: Tensor  # common factor of the gradients of the features
    scale: Tensor  # factor of the gradient of the scale, which depends on this rank's loss only
    ranks: Tensor | None = None  # [world_size], at most 1: weights of each rank's part of the logits, if they differ


def _weights(grad: Tensor, batch: Batch, count: int) -> _Weights:
    grad = grad / (2 * count * (1 if batch.local_loss else batch.world_size))  # two directions, mean over the pairs
    if not batch.distributed or not batch.gather_with_grad:
        return _Weights(grad, grad)
    if not batch.local_loss:  # every rank's loss is the same function of all features
        return _Weights(collectives.all_reduce(grad), grad)
    grads = collectives.all_gather(grad.reshape(1))
    largest = grads.abs().amax().clamp_min(torch.finfo(grads.dtype).tiny)
    return _Weights(largest, largest, grads / largest)


class _Gradients(NamedTuple):
    """Gradients with respect to features and scale, without the common factors."""

    image: Tensor  # [n, D]
    text: Tensor  # [N, D]: part of this rank; [n, D] after the sum over ranks
    of_scale: tuple[Tensor, Tensor] | None  # from the rows [], and from each column [N]


def _softmax_gradients(
    image: Tensor,
    all_text: Tensor,
    scale: Tensor,
    softmax: _Softmax | None,
    weights: Tensor | None,
    batch: Batch,
    linked: bool,
) -> _Gradients:
    """Compute the tiles again, and from each the gradient of both cross entropies, softmax - one_hot.

    Args:
        image: [n, D].
        all_text: [N, D].
        scale: scale of the logits.
        softmax: statistics of the forward; None if all logits are one tile.
        weights: weight of each rank's part of the logits, or None.
        batch: position of the pairs, and the variant.
        linked: whether all features get the gradients of rows and columns. If not, images get those of rows and texts
            those of columns.
    """
    exact, first_column = exact_dtype(batch.dtype), batch.rank * len(image)
    image, all_text = image.to(batch.dtype), all_text.to(batch.dtype)
    grad_image, grad_text = torch.zeros_like(image, dtype=exact), torch.zeros_like(all_text, dtype=exact)
    of_scale = None
    own_weight: Tensor | float = 1.0
    if softmax is not None:
        row_factor, column_factor = 1 / softmax.row_sum, 1 / softmax.column_sum
    if weights is not None:
        own_weight = weights[batch.rank]
        row_factor, column_factor = row_factor * own_weight, column_factor * weights.repeat_interleave(len(image))
        of_scale = row_factor.new_zeros(()), torch.zeros_like(column_factor)
    for row, column in tiles(len(image), len(all_text)):
        cosines = (image[row] @ all_text[column].T).to(exact)
        logits = cosines * scale
        if softmax is None:
            of_rows, of_columns = logits.softmax(1), logits.softmax(0)
        else:
            of_rows = (logits - softmax.row_max[row, None]).exp_().mul_(row_factor[row, None])
            of_columns = logits.sub_(softmax.column_max[column]).exp_().mul_(column_factor[column])
        pairs_of_tile(of_rows, row, column, first_column).sub_(own_weight)
        pairs_of_tile(of_columns, row, column, first_column).sub_(own_weight)
        if of_scale is not None:
            of_scale[0].add_((of_rows * cosines).sum())
            of_scale[1][column] += (of_columns * cosines).sum(0)
        if linked:
            of_rows = of_columns = of_rows.add_(of_columns)
        grad_image[row] += of_rows.to(batch.dtype) @ all_text[column]
        grad_text[column] += of_columns.to(batch.dtype).T @ image[row]
    return _Gradients(grad_image, grad_text, of_scale)


def _scale_gradient(image: Tensor, text: Tensor, gradients: _Gradients, batch: Batch, linked: bool) -> Tensor:
    """Compute the gradient of this rank's loss with respect to the scale, without the common factor.

    It is the sum over the logits of gradient times cosine. That equals the inner product of the features and their
    gradient, which needs no tiles. But if the gradients of the features come from the losses of several ranks, that of
    the scale does not, and `_softmax_gradients` has computed it from the tiles.
    """
    if gradients.of_scale is not None:
        of_rows, of_columns = gradients.of_scale
        return of_rows + collectives.reduce_scatter(of_columns).sum()
    of_images = (image * gradients.image).sum()
    if not linked:
        return of_images + (text * gradients.text).sum()
    return collectives.all_reduce(of_images) if batch.distributed else of_images


# Sigmoid loss of SigLIP


def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, batch: Batch) -> Tensor:
    """Compute -log sigmoid(+-logit), + for pairs, summed over the columns and averaged over this rank's rows.

    The formula is from https://arxiv.org/abs/2303.15343. The texts of other ranks are received by `batch.exchange`, one
    rank at a time (all at once with "gather"). The backward receives them again and returns their gradients, so that
    the memory kept between forward and backward does not grow with the number of ranks.

    Args:
        image: [n, D].
        text: [n, D].
        scale: scale of the logits, one element.
        bias: bias of the logits, one element.
        batch: position of the pairs, and the exchange.

    Returns:
        The loss, a scalar.
    """
    return _SigmoidLoss.apply(image, text, scale, bias, batch)


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        ctx.save_for_backward(image, text, scale, bias)
        own_image = image.to(batch.dtype)
        loss = _sigmoid_sum(own_image, text, scale, bias, True)
        for other in _texts_of_others(text, batch):
            loss += _sigmoid_sum(own_image, other, scale, bias, False)
        return loss / len(image)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        image, text, scale, bias = ctx.saved_tensors
        own = _SigmoidGradients(image, scale, bias, grad / len(image), ctx.batch.dtype)
        grad_text = own.of_text(text, True)
        if ctx.batch.distributed:
            grad_text += _gradient_from_others(text, own, ctx.batch)
        needs = ctx.needs_input_grad
        return (
            (own.image * (own.factor * scale)).to(image.dtype) if needs[0] else None,
            grad_text.to(text.dtype) if needs[1] else None,
            (own.factor * (image * own.image).sum()).to(scale.dtype).reshape(scale.shape) if needs[2] else None,
            (own.factor * own.logits).to(bias.dtype).reshape(bias.shape) if needs[3] else None,
            None,
        )


def _signed_tiles(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairs: bool
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield tiles of -label * logit, whose softplus is the loss. Labels are -1 or, on the diagonal with `pairs`, 1."""
    for row, column in tiles(len(image), len(text)):
        logits = (image[row] @ text[column].T).to(exact_dtype(image.dtype)) * scale + bias
        if pairs:
            pairs_of_tile(logits, row, column).neg_()
        yield row, column, logits


def _sigmoid_sum(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairs: bool) -> Tensor:
    """Compute the loss of image [n, D] and text [m, D], without the mean."""
    text = text.to(image.dtype)
    total = torch.zeros((), dtype=exact_dtype(image.dtype), device=image.device)
    for _, _, logits in _signed_tiles(image, text, scale, bias, pairs):
        # With the default threshold of 20, the approximation would be visible in float64.
        total += F.softplus(logits, threshold=40).sum()
    return total


class _SigmoidGradients:
    """Sums of the gradients of this rank's images, without `factor` and scale, while texts of other ranks arrive."""

    def __init__(self, image: Tensor, scale: Tensor, bias: Tensor, factor: Tensor, dtype: torch.dtype):
        self.own_image, self.scale, self.bias, self.factor = image.to(dtype), scale, bias, factor
        self.image = torch.zeros_like(image, dtype=exact_dtype(dtype))
        self.logits = torch.zeros((), dtype=exact_dtype(dtype), device=image.device)

    def of_text(self, text: Tensor, pairs: bool) -> Tensor:
        """Compute the gradient of this rank's loss with respect to texts [m, D], including all factors: [m, D]."""
        text = text.to(self.own_image.dtype)
        grad_text = torch.zeros_like(text, dtype=self.image.dtype)
        for row, column, logits in _signed_tiles(self.own_image, text, self.scale, self.bias, pairs):
            of_logits = logits.sigmoid_()
            if pairs:
                pairs_of_tile(of_logits, row, column).neg_()
            self.logits += of_logits.sum()
            of_logits = of_logits.to(text.dtype)
            self.image[row] += of_logits @ text[column]
            grad_text[column] += of_logits.T @ self.own_image[row]
        return grad_text.mul_(self.factor * self.scale)


def _texts_of_others(text: Tensor, batch: Batch) -> Iterator[Tensor]:
    """Yield the texts of each other rank in pieces [m, D], without gradient. All ranks iterate together."""
    if not batch.distributed:
        return
    rank, world_size = batch.rank, batch.world_size
    left, right = (rank - 1) % world_size, (rank + 1) % world_size
    text = text.detach()
    if batch.exchange == "gather":
        for source, others in enumerate(collectives.all_gather(text).split(len(text))):
            if source != rank:
                yield others
    elif batch.exchange == "reduce":
        for source in range(world_size):
            others = collectives.broadcast(text, source)
            if source != rank:
                yield others
    elif _halves(text, batch):
        # Use both directions of the ring at once: the first half of the rows goes to the left, the other to the right.
        to_left, to_right = text.tensor_split(2)
        for _ in range(world_size - 1):
            to_left, to_right = collectives.neighbour_exchange_bidir(left, right, to_left, to_right)
            yield to_left
            yield to_right
    else:
        for _ in range(world_size - 1):
            text = collectives.neighbour_exchange(left, right, text)
            yield text


def _halves(text: Tensor, batch: Batch) -> bool:
    return batch.exchange == "bidir" and len(text) > 1


def _gradient_from_others(text: Tensor, own: _SigmoidGradients, batch: Batch) -> Tensor:
    """Compute the gradients of this rank's text [n, D] in the losses of other ranks, and add to those of its images.

    Around a ring, a text is sent together with the sum of its gradients so far. One step more than in the forward
    returns both to the owner.
    """
    rank, world_size = batch.rank, batch.world_size
    left, right = (rank - 1) % world_size, (rank + 1) % world_size
    text = text.detach()
    if batch.exchange == "gather":
        gathered = collectives.all_gather(text).split(len(text))
        parts = [
            torch.zeros_like(others, dtype=own.image.dtype) if source == rank else own.of_text(others, False)
            for source, others in enumerate(gathered)
        ]
        return collectives.reduce_scatter(torch.cat(parts))
    if batch.exchange == "reduce":
        returned = torch.zeros_like(text, dtype=own.image.dtype)
        for source in range(world_size):
            others = collectives.broadcast(text, source)
            part = returned if source == rank else own.of_text(others, False)
            part = collectives.reduce(part, source)
            if source == rank:
                returned = part
        return returned
    messages = [_with_gradient_sum(part, own) for part in (text.tensor_split(2) if _halves(text, batch) else (text,))]
    for step in range(world_size):
        if len(messages) == 2:
            messages = list(collectives.neighbour_exchange_bidir(left, right, *messages))
        else:
            messages = [collectives.neighbour_exchange(left, right, messages[0])]
        if step < world_size - 1:
            for others, gradient in messages:
                gradient += own.of_text(others, False)
    return torch.cat([gradient for _, gradient in messages])


def _with_gradient_sum(text: Tensor, own: _SigmoidGradients) -> Tensor:
    """Stack a text and the sum of its gradients to [2, m, D], so that one message carries both."""
    text = text.to(own.image.dtype)
    return torch.stack([text, torch.zeros_like(text)])
