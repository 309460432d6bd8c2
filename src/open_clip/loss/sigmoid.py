"""The sigmoid loss of SigLIP over all pairs of images and texts of a batch, in tiles. See `tiles` for the shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import collectives
from .. import device as devices
from . import tiles
from .tiles import Batch


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
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (image, text, scale, bias))
    return _SigmoidLoss.apply(image, text, scale, bias, batch, needs_gradients and not batch.distributed)


class _SigmoidLoss(torch.autograd.Function):
    """The loss on any number of ranks.

    In one process, the forward computes the gradients from the same tiles and keeps them. With several, the backward
    computes the tiles again, while it exchanges gradients.
    """

    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, batch: Batch, keep_gradients: bool):
        ctx.batch = batch
        ctx.save_for_backward(image, text, scale, bias)
        own = _OwnImages(image, scale, bias, batch.dtype)
        if keep_gradients:
            ctx.kept = own, own.add_gradients(text, has_pairs=True, with_loss=True)
        else:
            ctx.kept = None
            own.add_loss(text, has_pairs=True)
            for others in _texts_of_others(text, batch):
                own.add_loss(others, has_pairs=False)
        return (own.loss / len(image)).reshape(())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        image, text, scale, bias = ctx.saved_tensors
        need_image, need_text, need_scale, need_bias, *_ = ctx.needs_input_grad
        grad = grad / len(image)
        factor = grad * scale
        if ctx.kept is not None:
            (own, grad_text), ctx.kept = ctx.kept, None  # a second backward of the graph computes them again
        else:
            own = _OwnImages(image, scale, bias, ctx.batch.dtype)
            grad_text = own.add_gradients(text, has_pairs=True)
        grad_text.mul_(factor)
        if ctx.batch.distributed:
            grad_text += _gradient_from_others(text, own, factor, ctx.batch)
        grad_scale = grad * tiles.inner_product(image, own.grad_image) if need_scale else None
        return (
            own.grad_image.mul_(factor).to(image.dtype) if need_image else None,
            grad_text.to(text.dtype) if need_text else None,
            None if grad_scale is None else grad_scale.to(scale.dtype).reshape(scale.shape),
            (grad * own.grad_logits).to(bias.dtype).reshape(bias.shape) if need_bias else None,
            None,
            None,
        )


class _OwnImages:
    """This rank's images, with sums of their loss and gradients over the texts so far.

    Attributes:
        loss: [1], without the mean.
        grad_image: [n, D], without incoming gradient and scale.
        grad_logits: [1], the sum over all logits.
    """

    def __init__(self, image: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype):
        self.image = image.detach().to(dtype)
        self.scale, self.bias = tiles.exact_scalar(scale, dtype), tiles.exact_scalar(bias, dtype)
        self.loss = torch.zeros_like(self.scale)
        self.grad_logits = torch.zeros_like(self.scale)
        self.grad_image = torch.zeros_like(image, dtype=self.scale.dtype)

    def add_loss(self, text: Tensor, has_pairs: bool) -> None:
        """Add the loss of texts [m, D]. With `has_pairs`, image i and text i are a pair."""
        for _, _, logits in self._signed_tiles(text.to(self.image.dtype), has_pairs):
            self.loss += devices.softplus(logits).sum()

    def add_gradients(self, text: Tensor, has_pairs: bool, with_loss: bool = False) -> Tensor:
        """Add the gradients of the images, and the loss too if wanted.

        Returns:
            The gradient of texts [m, D], without incoming gradient and scale.
        """
        text = text.to(self.image.dtype)
        grad_text = torch.zeros_like(text, dtype=self.grad_image.dtype)
        for row, column, logits in self._signed_tiles(text, has_pairs):
            if with_loss:
                self.loss += devices.softplus(logits).sum()
            of_logits = logits.sigmoid_()
            if has_pairs:
                tiles.pairs_of_tile(of_logits, row, column).neg_()
            self.grad_logits += of_logits.sum()
            of_logits = of_logits.to(text.dtype)
            tiles.add_product(self.grad_image[row], of_logits, text[column])
            tiles.add_product(grad_text[column], of_logits.T, self.image[row])
        return grad_text

    def _signed_tiles(self, text: Tensor, has_pairs: bool) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield tiles of -label * logit, whose softplus is the loss. Labels are 1 for pairs, otherwise -1."""
        height, width = tiles.shape(len(self.image), len(text), text.device)
        for row in tiles.spans(len(self.image), height):
            for column in tiles.spans(len(text), width):
                logits = tiles.to_logits(self.image[row] @ text[column].T, self.scale, self.bias)
                if has_pairs:
                    tiles.pairs_of_tile(logits, row, column).neg_()
                yield row, column, logits


def _texts_of_others(text: Tensor, batch: Batch) -> Iterator[Tensor]:
    """Yield n texts [n, D] of other ranks at a time, without gradient. All ranks iterate together."""
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
            yield torch.cat((to_left, to_right))
    else:
        for _ in range(world_size - 1):
            text = collectives.neighbour_exchange(left, right, text)
            yield text


def _halves(text: Tensor, batch: Batch) -> bool:
    return batch.exchange == "bidir" and len(text) > 1


def _gradient_from_others(text: Tensor, own: _OwnImages, factor: Tensor, batch: Batch) -> Tensor:
    """Compute the gradients of this rank's text [n, D] in the losses of other ranks, and add to those of its images.

    Around a ring, a text is sent together with the sum of its gradients so far. One step more than in the forward
    returns both to the owner. `factor` is that of the gradients of this rank's loss.
    """
    rank, world_size = batch.rank, batch.world_size
    text = text.detach()
    if batch.exchange == "gather":
        gathered = collectives.all_gather(text).split(len(text))
        parts = [
            torch.zeros_like(others, dtype=own.grad_image.dtype)
            if source == rank
            else own.add_gradients(others, has_pairs=False).mul_(factor)
            for source, others in enumerate(gathered)
        ]
        return collectives.reduce_scatter(torch.cat(parts))
    if batch.exchange == "reduce":
        returned = torch.zeros_like(text, dtype=own.grad_image.dtype)
        for source in range(world_size):
            others = collectives.broadcast(text, source)
            part = returned if source == rank else own.add_gradients(others, has_pairs=False).mul_(factor)
            part = collectives.reduce(part, source)
            if source == rank:
                returned = part
        return returned
    # A text and the sum of its gradients, stacked to [2, n, D], so that one message carries both.
    message = torch.stack([text.to(own.grad_image.dtype), torch.zeros_like(own.grad_image)])
    for step in range(world_size):
        message = _pass_on(message, batch)
        if step < world_size - 1:
            message[1] += own.add_gradients(message[0], has_pairs=False).mul_(factor)
    return message[1]


def _pass_on(message: Tensor, batch: Batch) -> Tensor:
    """Send [2, n, D] to the next rank and return what the previous one sends: to both sides, or to the right."""
    left, right = (batch.rank - 1) % batch.world_size, (batch.rank + 1) % batch.world_size
    if not _halves(message[0], batch):
        return collectives.neighbour_exchange(left, right, message)
    halves = message.tensor_split(2, dim=1)
    return torch.cat(collectives.neighbour_exchange_bidir(left, right, *halves), dim=1)
