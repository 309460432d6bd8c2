"""Options of training at several resolutions with images of any shape (NaFlex)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from training.params.option import option


# fmt: off
# Each option is followed by its help text.
@dataclass(frozen=True)
class NaFlexConfig:
    """Images as sequences of patches: their lengths, patch sizes and micro-batches."""

    group: ClassVar[str] = "images of any shape"

    use_naflex: bool = option(False, help=
        "resize each image to a sequence of patches and keep its aspect ratio, at several lengths, for a NaFlex image "
        "tower (SigLIP 2, arXiv:2502.14786). Other ViT towers are converted to one (--force-naflex-vision). A step "
        "still has --batch-size samples per process, all of which are negatives of each other; it is cut into "
        "micro-batches by --naflex-max-tokens-per-batch")
    naflex_seq_lens: tuple[int, ...] | None = option(None, metavar="TOKENS", help=
        "largest numbers of patches of an image. Each step has images of several of these lengths. Evaluation uses the "
        "largest one. Default: 128 256 576 784 1024, and the model's image_seq_len in evaluation")
    naflex_seq_len_probs: tuple[float, ...] | None = option(None, metavar="P", help=
        "one weight per length: which part of the images has it. Default: all the same")
    naflex_patch_sizes: tuple[int, ...] | None = option(None, metavar="PIXELS", help=
        "sides of patches; the model's patch embedding is resized for each (FlexiViT, arXiv:2212.08013). Evaluation "
        "uses the first one. Default: the model's own")
    naflex_patch_size_probs: tuple[float, ...] | None = option(None, metavar="P", help=
        "one weight per patch size: which part of the images has it. Default: all the same")
    naflex_max_tokens_per_batch: int = option(16384, at_least=1, metavar="TOKENS", help=
        "most patches of a micro-batch, padding included; this bounds the memory, also of evaluations (see "
        "--eval-batch-size). A step of several micro-batches costs one more forward pass of all but the last")
    naflex_max_text_tokens: int | None = option(None, at_least=1, metavar="TOKENS", help=
        "count so many text tokens of each sample, too, in --naflex-max-tokens-per-batch. Default: only patches count")
    naflex_batch_divisor: int = option(8, at_least=1, metavar="N", help=
        "the number of images of one length in a step is a multiple of this, over all processes, and so are the sizes "
        "of micro-batches, where possible")
    naflex_num_train_image_tokens: int | None = option(None, at_least=1, metavar="TOKENS", help=
        "patches per epoch over all processes: the epoch ends when the images have about so many. Default: all samples")
    naflex_pad_multiple: int | None = option(None, at_least=1, metavar="N", help=
        "pad the images of a micro-batch to the longest of them, rounded up to a multiple of N patches. Default: to "
        "the length of the micro-batch, so that there are few different shapes")
    naflex_variable_batch: bool = option(False, help=
        "make a step of each micro-batch, as open_clip's main branch does: the contrastive batch is as large as "
        "--naflex-max-tokens-per-batch allows at the length of the step, and --batch-size is only the reference of "
        "--naflex-loss-scale")
    naflex_loss_scale: str = option("none", choices=("none", "linear", "sqrt"), help=
        "with --naflex-variable-batch, multiply the loss by B / --batch-size (linear) or its square root (sqrt), for "
        "a step with B samples per process")
# fmt: on
