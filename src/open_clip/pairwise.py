"""Losses over the similarities of all pairs of images and texts in a batch, spread over ranks and computed in tiles.

A batch of N pairs has N x N logits. They are never held, neither for the forward nor for the backward: a tile is
computed, used for what is wanted of it (maxima and sums of the softmax, a sum of sigmoids, a gradient) and forgotten.

Shapes: n pairs on this rank, world_size ranks, N = n * world_size, D the embedding's width. Row i of the logits is
image i, column j text j, both counted over all ranks. The products are computed in `Batch.dtype`, everything after them
in fp32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import collectives

TILE_ROWS = 1024
TILE_ELEMENTS = 2**20  # 4 MiB in fp32: within reach of a CPU's cache, and enough to fill an accelerator


class Batch(NamedTuple):
    """How the local pairs sit in the global batch, and what is to be computed of it."""

    rank: int
    world_size: int
    dtype: torch.dtype  # of the products
    local_loss: bool = False  # softmax: see loss.ClipLoss
    gather_with_grad: bool = False
    exchange: str = "bidir"  # sigmoid: see loss.SigLipLoss

    @property
    def distributed(self) -> bool:
        return self.world_size > 1


def own_rows(rank: int, count: int) -> slice:
    return slice(rank * count, (rank + 1) * count)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and exponentials of numbers of `dtype`: fp32, or fp64 for fp64."""
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
    """View of a tile's elements that belong to pairs: row i and column first_column + i; may be empty."""
    return tile.diagonal(first_column + rows.start - columns.start)


# ---------------------------------------------------------------------------------------------------------------------
# The softmax loss of CLIP


class _Softmax(NamedTuple):
    """Maxima of the logits and sums of exp(logit - maximum), over each row [n] and each column [N]."""

    row_max: Tensor
    row_sum: Tensor
    column_max: Tensor
    column_sum: Tensor


def softmax_loss(image: Tensor, text: Tensor, scale: Tensor, batch: Batch) -> Tensor:
    """Mean of the cross entropies image -> text and text -> image (https://arxiv.org/abs/2103.00020, figure 3).

    image, text [n, D], scale of one element; the loss is a scalar, and its gradients are scaled as `loss.ClipLoss`
    says.

    A rank computes the logits of its own images with everyone's texts: the rows completely, and of each column a part,
    which the ranks add up. So the images are never gathered, and no rank computes what another one has computed,
    whichever of the four variants is asked for. The text's gradient is the sum of the ranks' parts, too.
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
        # A rank's features are in its own rows (of the logits) and columns, and in those of others as their negatives.
        # They get the gradients of both, unless the loss is local and the others' features are constants.
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
    """Softmax statistics of image [n, D] against all_text [N, D], with a maximum that is corrected tile by tile.

    Columns cover the given images alone. Also returns the logits [n] of the pairs, row i and column first_column + i.
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
    """The columns' statistics over the images of all ranks, from those over each rank's."""
    column_max = collectives.all_reduce(softmax.column_max, op="max")
    rescaled = softmax.column_sum * (softmax.column_max - column_max).exp()
    return softmax._replace(column_max=column_max, column_sum=collectives.all_reduce(rescaled))


class _Weights(NamedTuple):
    """Gradients that come from above, of this rank's loss and of those of other ranks, which need not be the same."""

    features: Tensor  # common factor of the features' gradients
    scale: Tensor  # of the scale's gradient, which is of this rank's loss alone
    ranks: Tensor | None = None  # [world_size], at most 1: what each rank's part of the logits weighs, if not the same


def _weights(grad: Tensor, batch: Batch, count: int) -> _Weights:
    grad = grad / (2 * count * (1 if batch.local_loss else batch.world_size))  # both directions, mean over the pairs
    if not batch.distributed or not batch.gather_with_grad:
        return _Weights(grad, grad)
    if not batch.local_loss:  # every rank's loss is the same function of all features
        return _Weights(collectives.all_reduce(grad), grad)
    grads = collectives.all_gather(grad.reshape(1))
    largest = grads.abs().amax().clamp_min(torch.finfo(grads.dtype).tiny)
    return _Weights(largest, largest, grads / largest)


class _Gradients(NamedTuple):
    """Gradients with the features and the scale, before the factors that all elements share."""

    image: Tensor  # [n, D]
    text: Tensor  # [N, D]: this rank's part of it; after their sum [n, D]
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
    """Computes the tiles again, and from each the gradient of both cross entropies, softmax - one_hot.

    softmax: None where there is one tile, which is all that its softmax needs.
    linked: the features get the gradients of rows and columns, else the images those of rows and the texts those of
    columns.
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
    """The gradient of this rank's loss with the scale, without the common factor: the sum of gradient times cosine.

    That sum is also <features, their gradient>, which saves looking at the tiles; only where the features' gradients
    are of several ranks' losses and the scale's is of one, it was taken from the tiles.
    """
    if gradients.of_scale is not None:
        of_rows, of_columns = gradients.of_scale
        return of_rows + collectives.reduce_scatter(of_columns).sum()
    of_images = (image * gradients.image).sum()
    if not linked:
        return of_images + (text * gradients.text).sum()
    return collectives.all_reduce(of_images) if batch.distributed else of_images


# ---------------------------------------------------------------------------------------------------------------------
# The sigmoid loss of SigLIP


def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, batch: Batch) -> Tensor:
    """Sum over the columns, mean over this rank's rows, of -log sigmoid(+-logit), + for pairs.

    From https://arxiv.org/abs/2303.15343.

    image, text [n, D]; scale and bias of one element. The texts of the other ranks come by `batch.exchange`, one rank's
    at a time (all at once with "gather"), and come again in the backward, where they collect their gradients: nothing
    that is kept between the two grows with the number of ranks.
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
    """Tiles of -label * logit, whose softplus is the loss. With `pairs` the diagonal's labels are 1, all others -1."""
    for row, column in tiles(len(image), len(text)):
        logits = (image[row] @ text[column].T).to(exact_dtype(image.dtype)) * scale + bias
        if pairs:
            pairs_of_tile(logits, row, column).neg_()
        yield row, column, logits


def _sigmoid_sum(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairs: bool) -> Tensor:
    """The loss of image [n, D] with text [m, D], without the mean."""
    text = text.to(image.dtype)
    total = torch.zeros((), dtype=exact_dtype(image.dtype), device=image.device)
    for _, _, logits in _signed_tiles(image, text, scale, bias, pairs):
        total += F.softplus(logits, threshold=40).sum()  # beyond the default 20, fp64 still sees the difference
    return total


class _SigmoidGradients:
    """Sums of the gradients of one rank's images while texts come by; `factor` and the scale are left out of them."""

    def __init__(self, image: Tensor, scale: Tensor, bias: Tensor, factor: Tensor, dtype: torch.dtype):
        self.own_image, self.scale, self.bias, self.factor = image.to(dtype), scale, bias, factor
        self.image = torch.zeros_like(image, dtype=exact_dtype(dtype))
        self.logits = torch.zeros((), dtype=exact_dtype(dtype), device=image.device)

    def of_text(self, text: Tensor, pairs: bool) -> Tensor:
        """What this rank's loss says about texts [m, D]: their whole gradient [m, D], factors included."""
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
    """The texts of each other rank, in pieces [m, D]; all ranks iterate together, without gradient."""
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
        # Both directions of the ring at once: the first half of everyone's rows goes around to the left, the other to
        # the right.
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
    """What the losses of the other ranks say about this rank's text [n, D]; adds what theirs say about own's images.

    Around a ring a text travels with its gradient so far, and one step more than in the forward brings that home.
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
    travellers = [_with_room(part, own) for part in (text.tensor_split(2) if _halves(text, batch) else (text,))]
    for step in range(world_size):
        if len(travellers) == 2:
            travellers = list(collectives.neighbour_exchange_bidir(left, right, *travellers))
        else:
            travellers = [collectives.neighbour_exchange(left, right, travellers[0])]
        if step < world_size - 1:
            for others, gradient in travellers:
                gradient += own.of_text(others, False)
    return torch.cat([gradient for _, gradient in travellers])


def _with_room(text: Tensor, own: _SigmoidGradients) -> Tensor:
    """[2, m, D]: a text and the sum of its gradients, one message instead of two."""
    text = text.to(own.image.dtype)
    return torch.stack([text, torch.zeros_like(text)])
