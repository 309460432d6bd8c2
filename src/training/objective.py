"""Training objectives: objects that take a model and a batch and return named losses.

`features` runs the model, `targets` runs a teacher, if any, and `losses` computes the losses. These are separate for
gradient accumulation, which computes the features of many micro-batches and one loss over all of them.

An output of the model either has a row per sample (its first dimension is the batch) or belongs to the whole model
(`SHARED`). Which inputs a model takes, and how its features are named, say its traits (`open_clip.model_traits`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import open_clip.loss
from open_clip import model_traits
from open_clip.model_traits import IMAGE_TEXT, ModelTraits, traits_of
from training.params import ObjectiveConfig
from training.ranks import world

Outputs = dict[str, Tensor]

# Scalar outputs, which do not depend on the samples.
SHARED = frozenset({*model_traits.SHARED, "dist_logit_scale"})


def is_captioner(model: nn.Module) -> bool:
    """Return whether the model also predicts captions (CoCa, arXiv:2205.01917): by its traits, or its text_decoder."""
    return traits_of(model).objective == "captioning"


def concatenate(parts: Sequence[Outputs]) -> Outputs:
    """Concatenate the outputs of micro-batches, in order, to those of the whole batch."""
    return {
        name: value if name in SHARED else torch.cat([part[name] for part in parts])
        for name, value in parts[-1].items()
    }


class Objective(ABC):
    """Named losses of a model on a batch.

    Attributes:
        traits: of the model.
    """

    traits: ModelTraits = IMAGE_TEXT

    def features(self, model: nn.Module, batch: Mapping[str, Any]) -> Outputs:
        """Run the model on its inputs in the batch. `model` may be wrapped by DDP or compiled."""
        return self.traits.name_outputs(model(**self.traits.select_inputs(batch)))

    def targets(self, batch: Mapping[str, Any]) -> Outputs:
        """Return further tensors that the losses need, such as a teacher's outputs. They are added to the outputs."""
        return {}

    def losses(self, outputs: Outputs) -> Outputs:
        """Return scalar losses by name, and their sum as "loss"."""
        named = self.parts(outputs)
        losses = list(named.values())
        return {**named, "loss": losses[0] if len(losses) == 1 else torch.stack(losses).sum()}

    @abstractmethod
    def parts(self, outputs: Outputs) -> Outputs:
        """Return the weighted losses by name, without their sum."""


class ContrastiveObjective(Objective):
    """The symmetric softmax loss over all image-text pairs of the global batch (CLIP, arXiv:2103.00020)."""

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, traits: ModelTraits = IMAGE_TEXT
    ) -> None:
        here = world()
        self.traits = traits
        self.loss = open_clip.loss.ClipLoss(
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            cache_labels=True,
            rank=here.rank,
            world_size=here.world_size,
        )

    def parts(self, outputs: Outputs) -> Outputs:
        return _pairwise_losses(self.loss, outputs, self.traits)


class SigmoidObjective(Objective):
    """The pairwise sigmoid loss over the global batch (SigLIP, arXiv:2303.15343)."""

    def __init__(self, dist_impl: str | None = None, traits: ModelTraits = IMAGE_TEXT) -> None:
        here = world()
        self.traits = traits
        self.loss = open_clip.loss.SigLipLoss(
            cache_labels=True, rank=here.rank, world_size=here.world_size, dist_impl=dist_impl
        )

    def parts(self, outputs: Outputs) -> Outputs:
        return _pairwise_losses(self.loss, outputs, self.traits)


class CaptioningObjective(Objective):
    """The contrastive loss, and the next-token loss of the caption given the image (CoCa, arXiv:2205.01917).

    The results equal those of open_clip.CoCaLoss. The caption losses are summed per sample in `features`, because
    gradient accumulation would otherwise keep logits [B, L, vocabulary] of all micro-batches.
    """

    def __init__(self, cfg: ObjectiveConfig, pad_id: int = 0, traits: ModelTraits = IMAGE_TEXT) -> None:
        self.traits = traits
        self.contrastive = ContrastiveObjective(cfg.local_loss, cfg.gather_with_grad, traits)
        self.contrastive_weight = cfg.coca_contrastive_loss_weight
        self.caption_weight = cfg.coca_caption_loss_weight
        self.pad_id = pad_id

    def features(self, model: nn.Module, batch: Mapping[str, Any]) -> Outputs:
        outputs = super().features(model, batch)
        logits, labels = outputs.pop("logits"), outputs.pop("labels")
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=self.pad_id, reduction="none")
        is_token = labels != self.pad_id
        return {**outputs, "caption_losses": losses.float().sum(dim=1), "caption_tokens": is_token.sum(dim=1)}

    def parts(self, outputs: Outputs) -> Outputs:
        if self.contrastive_weight:
            contrastive = self.contrastive_weight * self.contrastive.parts(outputs)["contrastive_loss"]
        else:  # keep them in the graph, because DDP waits for the gradient of every parameter
            unused = _pick(outputs, *self.traits.outputs).values()
            contrastive = 0 * torch.stack([value.float().sum() for value in unused]).sum()
        caption = outputs["caption_losses"].sum() / outputs["caption_tokens"].sum().clamp(min=1)
        return {"contrastive_loss": contrastive, "caption_loss": self.caption_weight * caption}


class DistillationObjective(Objective):
    """The contrastive loss, and a loss to a frozen teacher's similarities (distillation, arXiv:1503.02531)."""

    def __init__(self, cfg: ObjectiveConfig, teacher: nn.Module, traits: ModelTraits = IMAGE_TEXT) -> None:
        here = world()
        self.traits = traits
        self.teacher = teacher
        self.loss = open_clip.loss.DistillClipLoss(
            local_loss=cfg.local_loss,
            gather_with_grad=cfg.gather_with_grad,
            cache_labels=True,
            rank=here.rank,
            world_size=here.world_size,
        )

    def targets(self, batch: Mapping[str, Any]) -> Outputs:
        return _run_teacher(self.teacher, batch)

    def parts(self, outputs: Outputs) -> Outputs:
        names = (*self.traits.features, "logit_scale")
        student, teacher = [outputs[name] for name in names], [outputs[f"dist_{name}"] for name in names]
        named = self.loss(*student, *teacher, output_dict=True)
        bias = outputs.get("logit_bias")
        if bias is not None:
            # Softmax does not depend on it. Keep it in the graph: DDP waits for the gradient of every parameter.
            named["contrastive_loss"] = named["contrastive_loss"] + 0 * bias.sum()
        return named


class LossModule(Objective):
    """A loss module with open_clip's signature (`open_clip.create_loss`), with a teacher if it needs one."""

    def __init__(self, loss: nn.Module, teacher: nn.Module | None = None) -> None:
        self.loss = loss
        self.teacher = teacher

    def targets(self, batch: Mapping[str, Any]) -> Outputs:
        return {} if self.teacher is None else _run_teacher(self.teacher, batch)

    def parts(self, outputs: Outputs) -> Outputs:
        return self.loss(**outputs, output_dict=True)


def create_objective(cfg: ObjectiveConfig, model: nn.Module, teacher: nn.Module | None = None) -> Objective:
    """Create the objective for the type of the model and the options.

    Args:
        model: not wrapped by DDP.
        teacher: frozen, in evaluation mode, with the same outputs as the model.

    Raises:
        ValueError: the model does not support the options.
    """
    traits = traits_of(model)
    if traits.objective == "captioning":
        if teacher is not None or cfg.siglip:
            raise ValueError(
                f"{type(model).__name__} is trained with a captioning loss, which --distill-model and --siglip do not "
                "support. Leave them out, or choose another --model."
            )
        return CaptioningObjective(cfg, getattr(model, "pad_id", 0), traits)
    if teacher is not None:
        if cfg.siglip:
            raise ValueError(
                "--siglip and --distill-model cannot be combined, because distillation uses the contrastive loss. "
                "Leave out one of them."
            )
        return DistillationObjective(cfg, teacher, traits)
    if cfg.siglip:
        if getattr(model, "logit_bias", None) is None:
            raise ValueError(
                "--siglip needs a model with a logit_bias. Create it with init_logit_bias=-10, init_logit_scale=ln(10)."
            )
        return SigmoidObjective(cfg.loss_dist_impl, traits)
    return ContrastiveObjective(cfg.local_loss, cfg.gather_with_grad, traits)


@torch.no_grad()
def _run_teacher(teacher: nn.Module, batch: Mapping[str, Any]) -> Outputs:
    traits = traits_of(teacher)
    outputs = traits.name_outputs(teacher(**traits.select_inputs(batch)))
    return {f"dist_{name}": value for name, value in _pick(outputs, *traits.features, "logit_scale").items()}


def _pairwise_losses(loss: nn.Module, outputs: Outputs, traits: ModelTraits) -> Outputs:
    """Call a loss of open_clip, whose arguments are called image and text features whatever the modalities are."""
    first, second = (outputs[name] for name in traits.features)
    return loss(first, second, **_pick(outputs, *model_traits.SHARED), output_dict=True)


def _pick(outputs: Outputs, *names: str) -> Outputs:
    return {name: outputs[name] for name in names if outputs.get(name) is not None}
