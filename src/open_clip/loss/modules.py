"""Contrastive losses, as modules. `softmax` and `sigmoid` compute them tile by tile.

Shapes: n is the number of pairs on this rank, N = n * world_size, D is the width of the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import collectives
from . import tiles
from .sigmoid import sigmoid_loss
from .softmax import softmax_loss

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


def gather_features(
    image_features: Tensor,
    text_features: Tensor,
    local_loss: bool = False,
    gather_with_grad: bool = False,
    rank: int = 0,
    world_size: int = 1,
    use_horovod: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gather image and text features [n, D] from all ranks.

    With `gather_with_grad`, gradients flow to the features of every rank. Without it, they flow only to this rank's
    rows or, with `local_loss` (where the loss uses the local features directly), not at all.

    Returns:
        (image features [N, D], text features [N, D]).
    """
    _refuse_horovod(use_horovod)
    if world_size == 1:
        return image_features, text_features
    gathered = []
    for features in (image_features, text_features):
        if gather_with_grad:
            gathered.append(collectives.all_gather_with_grad(features))
            continue
        gathered_rows = collectives.all_gather(features)
        if not local_loss:
            own = tiles.own_rows(rank, len(features))
            gathered_rows = torch.cat([gathered_rows[: own.start], features, gathered_rows[own.stop :]])
        gathered.append(gathered_rows)
    return gathered[0], gathered[1]


def _refuse_horovod(use_horovod: bool) -> None:
    if use_horovod:
        raise ValueError(
            "use_horovod=True is not supported, because Horovod is no longer maintained. "
            "Start the processes with torchrun, which works on every device."
        )


def _check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            f"Image features {list(image_features.shape)} and text features {list(text_features.shape)} must have the "
            "same shape [batch, embedding]: row i of each is a pair."
        )


def _product_dtype(image_features: Tensor, text_features: Tensor) -> torch.dtype:
    """Return the dtype in which `image_features @ text_features.T` is computed, given the current autocast."""
    dtype = torch.promote_types(image_features.dtype, text_features.dtype)
    device_type = image_features.device.type
    has_autocast = device_type != "meta"
    if has_autocast and torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return dtype


def _as_tensor(value: Tensor | float, features: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=tiles.exact_dtype(features.dtype), device=features.device)


class ClipLoss(nn.Module):
    """The contrastive loss of CLIP (https://arxiv.org/abs/2103.00020), over the pairs of all ranks.

    The number of pairs must be the same on every rank. Gradient scales are those of open_clip. With DDP, which averages
    over the ranks, `gather_with_grad` gives the gradient of the global loss, with or without `local_loss`. Without both
    options, the towers get 1 / world_size of that gradient. With `local_loss` alone, the gradients of the features as
    negatives of other ranks are missing.

    Args:
        local_loss: compute the loss of this rank's images and texts against those of all ranks, instead of the global
            loss, which is the same on every rank.
        gather_with_grad: let gradients also flow to the features of other ranks, which are negatives in this loss.
        cache_labels: cache the labels of `get_ground_truth`.
        rank: index of this process.
        world_size: number of processes.
        use_horovod: not supported.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        _refuse_horovod(use_horovod)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(self, device: torch.device | str, num_logits: int) -> Tensor:
        """Return the class of each row of `get_logits`: int64 [num_logits]."""
        device = torch.device(device)
        if self.cache_labels and self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        labels = torch.arange(num_logits, device=device, dtype=torch.long)
        if self.world_size > 1 and self.local_loss:
            labels = labels + num_logits * self.rank
        if self.cache_labels:
            if self.prev_num_logits != num_logits:
                self.labels.clear()
            self.labels[device] = labels
            self.prev_num_logits = num_logits
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute logits per image and per text, each [N, N], or [n, N] with local_loss. The loss does not use them."""
        all_image, all_text = image_features, text_features
        if self.world_size > 1:
            all_image, all_text = gather_features(
                image_features, text_features, self.local_loss, self.gather_with_grad, self.rank, self.world_size
            )
        if self.world_size > 1 and self.local_loss:
            per_image = logit_scale * image_features @ all_text.T
            per_text = logit_scale * text_features @ all_image.T
        else:
            per_image = logit_scale * all_image @ all_text.T
            per_text = per_image.T
        if logit_bias is not None:
            per_image, per_text = per_image + logit_bias, per_text + logit_bias
        return per_image, per_text

    def contrastive_loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Compute the loss: a scalar in float32 (float64 for float64 features)."""
        _check_pairs(image_features, text_features)
        batch = tiles.Batch(
            self.rank,
            self.world_size,
            _product_dtype(image_features, text_features),
            local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
        )
        loss = softmax_loss(image_features, text_features, _as_tensor(logit_scale, image_features), batch)
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            # Adding a constant to all logits does not change a softmax. Keep the bias in the graph, with gradient 0.
            loss = loss + 0 * logit_bias.sum()
        return loss

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss.

        Args:
            image_features: normalized, [n, D].
            text_features: normalized, [n, D]. Row i belongs to row i of the images.
            logit_scale: scale of the logits (the exponential of the learned parameter).
            logit_bias: bias of the logits. It does not change the loss.
            output_dict: whether to return {"contrastive_loss": loss} instead of the loss.
        """
        loss = self.contrastive_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(ClipLoss):
    """The weighted contrastive loss and captioning cross entropy of CoCa (https://arxiv.org/abs/2205.01917)."""

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]  # argument order of open_clip
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Compute both losses.

        Args:
            image_features: normalized, [n, D].
            text_features: normalized, [n, D].
            logits: logits of the caption tokens, [n, L, vocabulary].
            labels: int64 [n, L]; `pad_id` is ignored.
            logit_scale: scale of the contrastive logits.
            output_dict: whether to return a dict instead of (contrastive loss, caption loss).
        """
        if self.clip_loss_weight:
            clip_loss = self.clip_loss_weight * self.contrastive_loss(image_features, text_features, logit_scale)
        else:
            clip_loss = torch.zeros((), device=logits.device)
        caption_loss = self.caption_loss_weight * self.caption_loss(logits.transpose(1, 2), labels)
        if output_dict:
            return {"contrastive_loss": clip_loss, "caption_loss": caption_loss}
        return clip_loss, caption_loss


class DistillClipLoss(ClipLoss):
    """The contrastive loss, and the cross entropy between the softmax of a teacher and of the student.

    The second loss stores the logits of both, [N, N] or, with local_loss, [n, N].
    """

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """Compute the cross entropy of two distributions, given by logits [rows, columns], averaged over the rows."""
        exact = tiles.exact_dtype(student_logits.dtype)
        teacher = teacher_logits.softmax(dim=1, dtype=exact)
        return -(teacher * student_logits.log_softmax(dim=1, dtype=exact)).sum(dim=1).mean()

    def forward(  # type: ignore[override]  # arguments of open_clip
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Compute both losses from the features and scale of the student and of the teacher (`dist_*`).

        The width of the teacher's features may differ.

        Returns:
            (contrastive loss, distillation loss), or a dict with `output_dict`.
        """
        contrastive_loss = self.contrastive_loss(image_features, text_features, logit_scale)
        students = self.get_logits(image_features, text_features, logit_scale)
        teachers = self.get_logits(dist_image_features, dist_text_features, dist_logit_scale)
        distill_loss = (self.dist_loss(teachers[0], students[0]) + self.dist_loss(teachers[1], students[1])) / 2
        if output_dict:
            return {"contrastive_loss": contrastive_loss, "distill_loss": distill_loss}
        return contrastive_loss, distill_loss


class SigLipLoss(nn.Module):
    """The sigmoid loss of SigLIP (https://arxiv.org/abs/2303.15343), of this rank's images and the texts of all ranks.

    The number of pairs must be the same on every rank.

    Args:
        cache_labels: accepted for compatibility with open_clip, without effect.
        rank: index of this process.
        world_size: number of processes.
        dist_impl: how texts are exchanged between ranks, and their gradients returned. The result is the same.
            "bidir" (default): around the ring of ranks in both directions at once, half of the texts each way.
            "shift": around the ring in one direction.
            "reduce": by broadcast and reduce from each rank in turn, for backends without send and receive.
            "gather": all at once, with the fewest messages; stores [N, D].
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ):
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in DIST_IMPLS:
            raise ValueError(f"dist_impl={dist_impl!r} is unknown. Choose one of {', '.join(DIST_IMPLS)}.")

    def get_ground_truth(
        self, device: torch.device | str, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """Return labels [num_logits, num_logits]: 1 for pairs (on the diagonal), -1 elsewhere."""
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Compute the logits [n, n] of this rank's pairs. The loss does not use them."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss of normalized features [n, D]: a scalar in float32 (float64 for float64 features)."""
        _check_pairs(image_features, text_features)
        batch = tiles.Batch(
            self.rank, self.world_size, _product_dtype(image_features, text_features), exchange=self.dist_impl
        )
        scale = _as_tensor(logit_scale, image_features)
        bias = _as_tensor(0.0 if logit_bias is None else logit_bias, image_features)
        loss = sigmoid_loss(image_features, text_features, scale, bias, batch)
        return {"contrastive_loss": loss} if output_dict else loss
