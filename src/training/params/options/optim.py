"""Options of the optimizer and of the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from training.params.option import option

TORCH_OPTIMIZERS = ("adamw", "nadamw")  # the others are those of timm


# fmt: off
# Each option is followed by its help text.
@dataclass(frozen=True)
class OptimConfig:
    """The optimizer.

    lr, beta1, beta2 and eps: None means the default of adamw (`get_default_params`) or of the timm optimizer.
    """

    group: ClassVar[str] = "optimizer"

    opt: str = option("adamw", metavar="NAME", help=
        "adamw, nadamw (NAdam with decoupled weight decay), or timm/NAME for an optimizer of timm "
        "(`timm.optim.list_optimizers()`), which has no default learning rate")
    opt_kwargs: dict[str, Any] = option({}, metavar="KEY=VALUE", help=
        "more arguments of the optimizer, such as `--opt-kwargs nesterov=True ns_steps=5`")
    opt_fallback_list: list[str] | None = option(None, metavar="PATTERN", help=
        "names of parameters (with wildcards) that timm's optimizers of the Muon family update with AdamW, such as "
        "`*embedding*`. Parameters with less than 2 dimensions are always updated with it")
    lr: float | None = option(None, at_least=0, metavar="X", help=
        "peak learning rate. Default: 5e-4 for adamw, which suits training from scratch with batches of thousands; for "
        "fine-tuning use 1e-6 to 1e-4")
    beta1: float | None = option(None, at_least=0, below=1, metavar="X", help="AdamW. Default: 0.9")
    beta2: float | None = option(None, at_least=0, below=1, metavar="X", help=
        "AdamW. Default: 0.98 if the model's name contains `vit`, else 0.999")
    eps: float | None = option(None, above=0, metavar="X", help=
        "AdamW. Default: 1e-6 if the model's name contains `vit`, else 1e-8")
    wd: float = option(0.2, at_least=0, metavar="X", help=
        "decoupled weight decay; not applied to biases, gains and logit_scale")
    wd_exclude_patterns: list[str] = option([], metavar="PATTERN", help=
        "names of more parameters without weight decay, with wildcards, such as `*.class_embedding`")
    decay_rule: str | None = option(None, choices=("3.3", "4"), help=
        "which parameters have no weight decay. 3.3: as in open_clip 3.3.0, biases, gains and logit_scale; 4: as in "
        "open_clip 4, position embeddings and class tokens also. Default: 4 with layer decay, --wd-exclude or "
        "--opt-fallback-list, else 3.3")
    image_layer_decay: float | None = option(None, above=0, at_most=1, metavar="D", alias="--visual-layer-decay", help=
        "multiply the learning rate of each layer of the image tower by D once per layer between it and the output. "
        "0.6 to 0.9 is usual in fine-tuning")
    text_layer_decay: float | None = option(None, above=0, at_most=1, metavar="D", help=
        "the same for the text tower")
    text_pooler_in_head: bool = option(True, help=
        "--text-layer-decay: treat the pooling layer of a Hugging Face text tower as a layer below the projection "
        "instead of a part of it")
    momentum: float | None = option(None, at_least=0, below=1, metavar="X", help=
        "momentum, for timm optimizers that have one")
    grad_clip_norm: float | None = option(None, above=0, metavar="X", help=
        "clip the global gradient norm to this value. Default: off; 1.0 stabilizes large batches. See "
        "--gather-with-grad for the scale of the gradients")
    accum_freq: int = option(1, at_least=1, metavar="N", help=
        "micro-batches per step. The features of all N are first computed without gradients, so that all N x batch "
        "samples are negatives of each other. Uses the memory of one batch and about 1.3x the time of one large batch")
    fused_optimizer: str = option("auto", choices=("auto", "torch", "npu", "off"), help=
        "implementation of AdamW. auto: torch's fused kernel if it can skip a step on the device, else (NPU, fp16 "
        "weights) flat buffers; torch: torch's fused kernel; off: torch without fusion; npu: the kernel of the NPU's "
        "library (fp32 weights). Results agree within rounding, and optimizer states are interchangeable")
    ema_decay: float | None = option(None, at_least=0, below=1, metavar="D", help=
        "keep an exponential moving average of the weights with this decay (0.999 to 0.9999). It is evaluated (metrics "
        "`ema_...`) and saved (`state_dict_ema`). Needs 4 more bytes per parameter")
    max_bad_steps: int = option(10, at_least=0, metavar="N", help=
        "stop after N steps in a row with a non-finite loss or gradient on any process, and list their samples in "
        "bad_steps-RANK.json in the run's folder. Each such step is skipped by all processes. 0: never stop")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate schedule and the length of the run."""

    group: ClassVar[str] = "schedule"

    epochs: int = option(32, at_least=0, metavar="N", help=
        "number of epochs (--train-num-samples samples each). The schedule spans all of them: if a run is resumed with "
        "another number, the learning rate jumps")
    warmup: int = option(10000, at_least=0, metavar="STEPS", help=
        "steps over which the learning rate rises linearly from 0. A run has samples / (batch size x processes x "
        "--accum-freq) x --epochs steps, and a tenth of them is usual. If warmup is longer than the run, --lr is never "
        "reached")
    lr_scheduler: str = option("cosine", choices=("cosine", "const", "const-cooldown"), help=
        "learning rate after warmup. cosine: decays to 0; const; const-cooldown: constant, then decays in the last "
        "--epochs-cooldown epochs")
    epochs_cooldown: int | None = option(None, at_least=0, metavar="N", help=
        "const-cooldown: length of the decay, in epochs")
    lr_cooldown_end: float = option(0.0, at_least=0, metavar="X", help="const-cooldown: final learning rate")
    lr_cooldown_power: float = option(1.0, at_least=0, metavar="X", help=
        "const-cooldown: power of the polynomial (1 is linear)")
    skip_scheduler: bool = option(False, help="no warmup and no schedule: use --lr at every step")
# fmt: on
