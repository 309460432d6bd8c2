"""Options of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from open_clip.loss.modules import DIST_IMPLS
from training.params.option import option


# fmt: off
# Each option is followed by its help text.
@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss."""

    group: ClassVar[str] = "objective"

    local_loss: bool = option(False, help=
        "several processes: each computes the loss of its own samples against all samples, instead of all against all. "
        "This takes less time and memory: logits per process grow with W instead of W^2 (W processes). Add "
        "--gather-with-grad; without it gradients are lost")
    gather_with_grad: bool = option(False, help=
        "several processes: backpropagate through the gather to the process that each sample is from. Without it the "
        "gradients of the towers are 1/W of those that the same batch gives on one process (logit_scale gets all of "
        "it). This hardly affects AdamW, but it does affect --grad-clip-norm and SGD")
    siglip: bool = option(False, help=
        "pairwise sigmoid loss (arXiv:2303.15343) instead of softmax. Adds a logit_bias to the model, which starts at "
        "-10 unless the weights contain one")
    loss_dist_impl: str | None = option(None, choices=DIST_IMPLS, help=
        "how processes exchange text features with --siglip; all give the same loss. bidir, shift: around a ring; "
        "reduce, gather: by collectives. Default: bidir")
    coca_caption_loss_weight: float = option(2.0, at_least=0, metavar="X", help="CoCa: weight of the captioning loss")
    coca_contrastive_loss_weight: float = option(1.0, at_least=0, metavar="X", help=
        "CoCa: weight of the contrastive loss")
    distill_model: str | None = option(None, metavar="NAME", help=
        "teacher model. Adds a loss that matches its similarities. Needs --distill-pretrained")
    distill_pretrained: str | None = option(None, metavar="TAG|FILE", help="weights of the teacher")
# fmt: on
