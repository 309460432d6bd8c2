"""The softmax loss of CLIP over all pairs of images and texts of a batch, in tiles. See `tiles` for the shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import collectives
from . import tiles
from .tiles import Batch


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
    one_tile = tiles.shape(len(image), len(text), image.device) == (len(image), len(text))
    return (_SmallSoftmaxLoss if one_tile and not batch.distributed else _SoftmaxLoss).apply(image, text, scale, batch)


class _SmallSoftmaxLoss(torch.autograd.Function):
    """The loss of pairs whose logits are one tile. The tile is kept for the backward."""

    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, batch: Batch) -> Tensor:
        ctx.dtypes = image.dtype, text.dtype
        image, text = image.to(batch.dtype), text.to(batch.dtype)
        logits = tiles.to_logits(image @ text.T, tiles.exact_scalar(scale, batch.dtype))
        ctx.save_for_backward(image, text, scale, logits)
        return logits.logsumexp(1).lerp(logits.logsumexp(0), 0.5).sub(logits.diagonal()).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        image, text, scale, logits = ctx.saved_tensors
        need_image, need_text, need_scale, _ = ctx.needs_input_grad
        grad = grad / (2 * len(image))
        factor = grad * scale
        of_logits = logits.softmax(1).add_(logits.softmax(0))
        of_logits.diagonal().sub_(2)
        of_logits = of_logits.to(image.dtype)
        of_image = (of_logits @ text).to(logits.dtype)
        of_text = (of_logits.T @ image).to(logits.dtype)
        grad_scale = grad * tiles.inner_product(image, of_image) if need_scale else None
        return (
            of_image.mul_(factor).to(ctx.dtypes[0]) if need_image else None,
            of_text.mul_(factor).to(ctx.dtypes[1]) if need_text else None,
            None if grad_scale is None else grad_scale.to(scale.dtype).reshape(scale.shape),
            None,
        )


class _SoftmaxLoss(torch.autograd.Function):
    """The loss of any number of pairs, on any number of ranks."""

    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, batch: Batch) -> Tensor:
        ctx.dtypes = image.dtype, text.dtype
        image, text = image.to(batch.dtype), text.to(batch.dtype)
        all_text = collectives.all_gather(text) if batch.distributed else text
        own = tiles.own_rows(batch.rank, len(image))
        rows, columns, positives = _sums_of_exponentials(image, all_text, scale, own.start)
        if batch.distributed:
            columns = _complete_columns(columns)
        loss = rows.log_sum().lerp(columns.log_sum()[own], 0.5).sub(positives).mean()
        if batch.distributed and not batch.local_loss:
            loss = collectives.all_reduce(loss) / batch.world_size
        ctx.batch = batch
        ctx.save_for_backward(image, all_text, scale, *rows, *columns)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        image, all_text, scale, *sums = ctx.saved_tensors
        rows, columns = _Sums(*sums[:2]), _Sums(*sums[2:])
        need_image, need_text, need_scale, _ = ctx.needs_input_grad
        batch = ctx.batch
        weights = _weights(grad, batch, len(image))
        gradients = _gradients(image, all_text, scale, rows, columns, weights.ranks, batch)
        if batch.distributed:
            gradients = gradients._replace(text=collectives.reduce_scatter(gradients.text))
        grad_scale = None
        if need_scale:
            text = all_text[tiles.own_rows(batch.rank, len(image))]
            grad_scale = weights.scale * _scale_gradient(image, text, gradients, batch)
            grad_scale = grad_scale.to(scale.dtype).reshape(scale.shape)
        factor = weights.features * scale
        return (
            gradients.image.mul_(factor).to(ctx.dtypes[0]) if need_image else None,
            gradients.text.mul_(factor).to(ctx.dtypes[1]) if need_text else None,
            grad_scale,
            None,
        )


class _Sums(NamedTuple):
    """The largest logit of each row or column, and the sum of exp(logit - largest).

    The logarithm of the sum of exp(logit) would be one number, but rounded for large logits.
    """

    largest: Tensor
    total: Tensor

    def log_sum(self) -> Tensor:
        return self.total.log().add_(self.largest)


def _sums_of_exponentials(
    image: Tensor, all_text: Tensor, scale: Tensor, first_column: int
) -> tuple[_Sums, _Sums, Tensor]:
    """Reduce the tiles of the logits of image [n, D] and all_text [N, D].

    Returns:
        (sums of the rows, sums of the columns over the given images, logits [n] of the pairs at row i and column
        first_column + i).
    """
    count, columns = len(image), len(all_text)
    scale = tiles.exact_scalar(scale, image.dtype)
    height, width = tiles.shape(count, columns, image.device)
    positives = scale.new_empty(count)
    # For each row or column of a tile: the largest logit, and minus the logarithm of the sum of exp(logit - largest).
    row_parts = scale.new_empty(2, -(-columns // width), count)
    column_parts = scale.new_empty(2, -(-count // height), columns)
    for down, row in enumerate(tiles.spans(count, height)):
        for across, column in enumerate(tiles.spans(columns, width)):
            logits = tiles.to_logits(image[row] @ all_text[column].T, scale)
            for dim, part in ((1, row_parts[:, across, row]), (0, column_parts[:, down, column])):
                torch.amax(logits, dim, out=part[0])
                torch.amax(logits.log_softmax(dim), dim, out=part[1])  # a fused kernel, unlike logsumexp
            pairs = tiles.pairs_of_tile(logits, row, column, first_column)
            start = max(row.start, column.start - first_column)
            positives[start : start + len(pairs)] = pairs
            del logits, pairs  # before the next tile is allocated
    return _combine_tiles(row_parts), _combine_tiles(column_parts), positives


def _combine_tiles(parts: Tensor) -> _Sums:
    if parts.shape[1] == 1:
        return _Sums(parts[0, 0], (-parts[1, 0]).exp_())
    largest = parts[0].amax(0)
    return _Sums(largest, (parts[0] - largest).sub_(parts[1]).exp_().sum(0))


def _complete_columns(sums: _Sums) -> _Sums:
    """Combine the sums of the columns of all ranks."""
    largest = collectives.all_reduce(sums.largest, op="max")
    return _Sums(largest, collectives.all_reduce(sums.total * (sums.largest - largest).exp_()))


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


def _is_linked(batch: Batch) -> bool:
    """Return whether all features get the gradients of rows and columns.

    A rank's features occur in its own rows and columns of the logits, and as negatives in those of other ranks. They
    get the gradients of both, unless the loss is local and the features of other ranks are constants. Then images get
    those of rows, and texts those of columns.
    """
    return not batch.distributed or batch.gather_with_grad or not batch.local_loss


def _gradients(
    image: Tensor, all_text: Tensor, scale: Tensor, rows: _Sums, columns: _Sums, weights: Tensor | None, batch: Batch
) -> _Gradients:
    """Compute the tiles again, and from each the gradient of both cross entropies, softmax - one_hot.

    Args:
        image: [n, D].
        all_text: [N, D].
        scale: scale of the logits.
        rows, columns: sums of the forward.
        weights: weight of each rank's part of the logits, or None.
        batch: position of the pairs, and the variant.
    """
    count, first_column = len(image), batch.rank * len(image)
    scale = tiles.exact_scalar(scale, image.dtype)
    grad_image, grad_text = torch.zeros_like(image, dtype=scale.dtype), torch.zeros_like(all_text, dtype=scale.dtype)
    column_factor = columns.total.reciprocal()
    own_weight: Tensor | float = 1.0
    of_scale = None
    if weights is not None:
        own_weight = weights[batch.rank]
        column_factor *= weights.repeat_interleave(count)
        of_scale = scale.new_zeros(()), torch.zeros_like(column_factor)
    height, width = tiles.shape(count, len(all_text), image.device)
    for row in tiles.spans(count, height):
        for column in tiles.spans(len(all_text), width):
            cosines = image[row] @ all_text[column].T
            logits = tiles.to_logits(cosines if of_scale is None else cosines.clone(), scale)
            if width == len(all_text):
                of_rows = logits.softmax(1)  # one fused kernel
            else:
                of_rows = (logits - rows.largest[row, None]).exp_().div_(rows.total[row, None])
            of_columns = logits.sub_(columns.largest[column]).exp_()
            if _is_linked(batch) and weights is None:
                tiles.pairs_of_tile(of_rows, row, column, first_column).sub_(2)
                of_both = of_rows if of_rows.dtype == image.dtype else torch.empty_like(of_rows, dtype=image.dtype)
                torch.addcmul(of_rows, of_columns, column_factor[column], out=of_both)
                of_rows = of_columns = of_both
                del of_both
            else:
                of_rows *= own_weight
                of_columns *= column_factor[column]
                tiles.pairs_of_tile(of_rows, row, column, first_column).sub_(own_weight)
                tiles.pairs_of_tile(of_columns, row, column, first_column).sub_(own_weight)
            if of_scale is not None:
                of_scale[0].add_((of_rows * cosines).sum())
                of_scale[1][column] += (of_columns * cosines).sum(0)
                of_rows = of_columns = of_rows.add_(of_columns).to(image.dtype)
            tiles.add_product(grad_image[row], of_rows, all_text[column])
            tiles.add_product(grad_text[column], of_columns.T, image[row])
            del cosines, logits, of_rows, of_columns  # before the next tile is allocated
    return _Gradients(grad_image, grad_text, of_scale)


def _scale_gradient(image: Tensor, text: Tensor, gradients: _Gradients, batch: Batch) -> Tensor:
    """Compute the gradient of this rank's loss with respect to the scale, without the common factor.

    It is the sum over the logits of gradient times cosine. That equals the inner product of the features and their
    gradient, which needs no tiles. But if the gradients of the features come from the losses of several ranks, that of
    the scale does not, and `_gradients` has computed it from the tiles.
    """
    if gradients.of_scale is not None:
        of_rows, of_columns = gradients.of_scale
        return of_rows + collectives.reduce_scatter(of_columns).sum()
    of_images = tiles.inner_product(image, gradients.image)
    if not _is_linked(batch):
        return of_images + tiles.inner_product(text, gradients.text)
    return collectives.all_reduce(of_images) if batch.distributed else of_images
