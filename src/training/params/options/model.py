"""Options of the model, its initial weights and its precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from open_clip.precision import PRECISIONS
from open_clip.text_groups import MAX_GROUPS
from open_clip.transform.pipeline import INTERPOLATIONS, RESIZE_MODES
from training.params.option import option

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COMPILE_STRATEGIES = ("blocks", "model", "task", "step")


# fmt: off
# Each option is followed by its help text.
@dataclass(frozen=True)
class ModelConfig:
    """The model, its initial weights, its precision, and which parts are trained."""

    group: ClassVar[str] = "model"

    model: str = option("RN50", metavar="NAME", help=
        "architecture (`open_clip.list_models()`), `hf-hub:ORG/REPO`, or `local-dir:PATH`")
    like_4: bool = option(False, help=
        "use the defaults of open_clip's main branch (4.x) for options that are not given; the log lists them. See "
        "docs/coming_from_open_clip.md")
    pretrained: str = option("", metavar="TAG|FILE", help=
        "initial weights: a tag of `open_clip.list_pretrained()` or a file (.pt, .bin, .safetensors, a training "
        "checkpoint). Default: random. The optimizer state is not loaded; use --resume to continue a run")
    pretrained_image: bool = option(False, help=
        "load the image tower's pretrained (ImageNet) weights, if the architecture has any")
    cache_dir: str | None = option(None, metavar="DIR", help=
        "folder for downloaded weights and tokenizers. Default: that of Hugging Face")
    precision: str | None = option(None, choices=PRECISIONS, help=
        "dtype of weights and computation. amp: fp32 weights, fp16 computation with a gradient scaler (on the CPU: "
        "bf16 without a scaler); amp_bf16 (amp_bfloat16): bf16 computation, no scaler; bf16, fp16: weights too, but "
        "normalization in fp32; pure_*: everything. Default: amp on an accelerator, fp32 on the CPU. Use amp_bf16 if "
        "the device supports it and training with amp diverges")
    fp32_matmul: str = option("high", choices=("high", "highest"), help=
        "precision of the operations that stay in fp32 (all of them with --precision fp32). high: matrix products and "
        "convolutions in TF32 (CUDA) or HF32 (Ascend), several times faster, about 3 significant digits; highest: full "
        "fp32. No effect on the CPU")
    force_context_length: int | None = option(None, at_least=1, metavar="TOKENS", help=
        "override the architecture's context length; position embeddings are resized")
    force_image_size: int | tuple[int, int] | None = option(None, metavar="PIXELS", help=
        "override the architecture's image size: one number, or height and width; position embeddings are resized")
    force_quick_gelu: bool = option(False, help=
        "use QuickGELU activations. Only for weights that were trained with it, such as OpenAI's")
    force_patch_dropout: float | None = option(None, at_least=0, below=1, metavar="P", help=
        "fraction of image patches dropped in training (FLIP, arXiv:2212.00794). 0.5 halves the image tower's work; 0 "
        "in the last epochs recovers the accuracy")
    force_custom_text: bool = option(False, help=
        "build a CustomTextCLIP (parameters of the text tower are named `text.*`)")
    force_naflex_vision: bool = option(False, help=
        "turn the image tower, a native ViT or one of timm, into one for images of any size and aspect ratio (NaFlex, "
        "arXiv:2502.14786). Weights of the original tower are converted")
    lock_image: bool = option(False, help=
        "freeze the image tower (LiT, arXiv:2111.07991). Together with --lock-text almost nothing is left to train")
    lock_image_unlocked_groups: int = option(0, at_least=0, metavar="N", help=
        "with --lock-image: keep its last N groups of layers trainable")
    lock_image_freeze_bn_stats: bool = option(False, help=
        "with --lock-image: also freeze the running statistics of BatchNorm in the locked layers")
    lock_text: bool = option(False, help="freeze the text tower")
    lock_text_unlocked_layers: int = option(0, at_least=0, metavar="N", help=
        "with --lock-text: keep its last N layers trainable")
    lock_text_freeze_layer_norm: bool = option(False, help=
        "with --lock-text: also freeze the LayerNorm weights in the locked layers")
    grad_checkpointing: bool = option(False, help=
        "recompute activations in the backward pass, which takes about a third more time and much less memory")
    text_groups: int = option(MAX_GROUPS, at_least=0, metavar="N", help=
        "sort the captions of a batch by length and encode them in at most N groups without most of their padding. 1 "
        "cuts all captions to the longest one, 0 keeps the padding. The embeddings are the same. No effect on models "
        "whose text tower reads the padding, such as SigLIP and CoCa")
    packing: str = option("auto", choices=("auto", "on", "off"), help=
        "compute captions and images of different lengths one after another, without padding, in models that can do so "
        "(modern text towers, NaFlex image towers). The features are the same. auto: if the device gains from it and "
        "nothing is compiled; on: also with compiled blocks, and an error if the model cannot; off: padded. Other text "
        "towers group captions (--text-groups)")
    torchcompile: bool = option(False, help=
        "compile with torch.compile, before the first step; --torchcompile-strategy says what. Needs triton-ascend on "
        "an NPU, triton on a GPU and a C++ compiler on the CPU, which is checked at the start")
    torchcompile_strategy: str = option("blocks", choices=COMPILE_STRATEGIES, help=
        "what is compiled. blocks: the blocks of the towers, equal ones once, texts of any length (a model without "
        "repeated blocks as with model); model: the model, for fixed shapes; task: the model and the loss; step: "
        "forward and backward pass, clipping and AdamW in one graph, on one process, with --accum-freq 1 and without "
        "a gradient scaler")
    torchcompile_backend: str | None = option(None, metavar="NAME", help=
        "backend of torch.compile, one of torch._dynamo.list_backends(), or eager or aot_eager, which need no "
        "compiler. Default: inductor")
    torchcompile_mode: str | None = option(None, choices=COMPILE_MODES, help=
        "mode of inductor. max-autotune-no-cudagraphs tries more kernels and compiles longer. The modes with CUDA "
        "graphs (reduce-overhead, max-autotune) are refused")
    use_bn_sync: bool = option(False, help=
        "synchronize BatchNorm statistics over all processes (models with BatchNorm)")
    image_mean: tuple[float, float, float] | None = option(None, metavar="X", group="preprocessing", help=
        "mean subtracted from each channel (values in 0..1): three numbers, or one for all channels. Default: that of "
        "the weights")
    image_std: tuple[float, float, float] | None = option(None, metavar="X", group="preprocessing", help=
        "standard deviation that divides each channel, in the same form")
    image_interpolation: str | None = option(None, choices=INTERPOLATIONS, group="preprocessing", help=
        "interpolation used to resize images; random chooses one per image, in training only")
    image_resize_mode: str | None = option(None, choices=RESIZE_MODES, group="preprocessing", help=
        "resizing in evaluation. shortest: fit the short side and crop; longest: fit the long side and pad; squash: "
        "ignore the aspect ratio")
    aug_cfg: dict[str, Any] = option({}, metavar="KEY=VALUE", group="preprocessing", help=
        "training augmentation: scale=(0.9,1.0), ratio, color_jitter, color_jitter_prob, gray_scale_prob, re_prob, "
        "re_count, use_timm=True")
# fmt: on
