"""The options of the training command: one frozen dataclass per component, one field per option.

A field is the only place where an option has its name, type, default, help text and allowed values (see
`training.params.option`). `training.params.flags` makes the parser from these fields, and `training.params.checks`
checks values against them. To add an option, add a field here, and its default to `tests/parity/test_flags.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, get_type_hints

from open_clip.loss.modules import DIST_IMPLS
from open_clip.precision import PRECISIONS
from open_clip.text_groups import MAX_GROUPS
from open_clip.transform.pipeline import INTERPOLATIONS, RESIZE_MODES
from training.params.option import option

DATASET_TYPES = ("webdataset", "csv", "imagefolder", "synthetic", "auto")

# The groups of --help in their order: title and description. `group` of a section or of an option is a title.
GROUPS = {
    "data": "Training and validation data.",
    "model": "Architecture, initial weights, and which parts are trained.",
    "preprocessing": "Overrides of the preprocessing that belongs to the weights.",
    "objective": "The loss. Default: contrastive; CoCa models also get a captioning loss.",
    "optimizer": None,
    "schedule": "Learning rate schedule and length of the run.",
    "device and processes": None,
    "checkpoints": "Written to LOGS/NAME/checkpoints/epoch_N.pt.",
    "evaluation": "The work is split over all processes.",
    "logging": "LOGS/NAME/out.log is the log; results.jsonl has all evaluations.",
    "unsupported": "Options of open_clip that this project does not support, with what to use instead. --torchscript "
    "is ignored with a warning.",
}


# fmt: off
# Each option is followed by its help text.
@dataclass(frozen=True)
class DataConfig:
    """The data for training and evaluation, and how they are read."""

    group: ClassVar[str] = "data"

    train_data: str | None = option(None, metavar="PATH", help=
        "training data: a CSV/TSV file, webdataset shards as a brace pattern (`/data/{0000..0099}.tar`), or a .txt "
        "file that lists shards. Join several sources with `::`. Without it (and without --dataset-type synthetic) the "
        "run only evaluates the model")
    train_data_upsampling_factors: str | None = option(None, metavar="F::F", help=
        "sampling weight of each source of --train-data, joined by `::` and relative per sample (`1::2::0.5`: samples "
        "of the second source are drawn twice as often as those of the first). Needs --dataset-resampled. Default: "
        "every shard is equally likely")
    val_data: str | None = option(None, metavar="PATH", help=
        "validation data, in the same formats; used for the loss and retrieval metrics")
    train_num_samples: int | None = option(None, at_least=1, metavar="N", help=
        "samples per epoch over all processes, for webdataset and synthetic data. Default: read from the shards' "
        "`sizes.json` or `__len__`; required if both are missing. Synthetic data: 100. With --dataset-resampled any "
        "number works: it sets how often the run evaluates and saves")
    val_num_samples: int | None = option(None, at_least=1, metavar="N", help=
        "the same for the validation data. It is only used to show progress: every sample is evaluated in any case")
    dataset_type: str = option("auto", choices=DATASET_TYPES, help=
        "format of the data. auto: chosen by the file's extension; imagefolder: one folder of images per class, "
        "captions built from the folder names; synthetic: random data, to measure the speed of everything except data "
        "loading")
    dataset_resampled: bool = option(False, help=
        "webdataset: draw shards with replacement, without end, instead of reading each shard once per epoch. For very "
        "large datasets and weighted sources")
    csv_separator: str = option("\t", metavar="CHAR", help=
        "column separator of CSV files (for a comma: `--csv-separator ,`)")
    csv_img_key: str = option("filepath", metavar="COLUMN", help="CSV column with the image paths")
    csv_caption_key: str = option("title", metavar="COLUMN", help="CSV column with the captions")
    fast_decode: bool = option(False, help=
        "decode JPEG images that are at least twice as large as needed at 1/2, 1/4 or 1/8 of their size. Faster for "
        "photographs of several megapixels; pixels differ slightly, see docs/training.md")
    max_bad_fraction: float = option(0.5, at_least=0, at_most=1, metavar="X", help=
        "stop the run when more than this fraction (0 to 1) of the samples or shards read so far, over all processes, "
        "is unusable. Checked each time the log is written. Unusable samples are always skipped and counted; 1 never "
        "stops")
    workers: int = option(4, at_least=0, metavar="N", help=
        "data loader workers per training process. Use more if the data time in the log is not near 0; 0 decodes "
        "images in the training process itself")
    batch_size: int = option(64, at_least=1, metavar="N", help=
        "samples per process and forward pass. The contrastive loss compares the samples of all processes, so the "
        "effective batch size is this x processes x --accum-freq")
    seed: int = option(0, at_least=0, metavar="N", help=
        "seed of the initial weights, data order and augmentation. The augmentation of a sample depends on (seed, "
        "epoch, sample), not on the number of workers or processes")
    eval_batch_size: int | None = option(None, at_least=1, metavar="N", group="evaluation", help=
        "samples per process and forward pass in evaluations. Default: --batch-size for --val-data, whose loss depends "
        "on it, and twice --batch-size for zero-shot classification, whose accuracy does not")
    imagenet_val: str | None = option(None, metavar="DIR", group="evaluation", help=
        "zero-shot accuracy on the ImageNet validation images, one folder per class")
    imagenet_v2: str | None = option(None, metavar="DIR", group="evaluation", help="zero-shot accuracy on ImageNet-V2")
    zeroshot_data: str | None = option(None, metavar="DIR", group="evaluation", help=
        "zero-shot accuracy on other images, one folder per class")


@dataclass(frozen=True)
class ModelConfig:
    """The model, its initial weights, its precision, and which parts are trained."""

    group: ClassVar[str] = "model"

    model: str = option("RN50", metavar="NAME", help=
        "architecture (`open_clip.list_models()`), `hf-hub:ORG/REPO`, or `local-dir:PATH`")
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
    torchcompile: bool = option(False, help=
        "compile the blocks of the towers with torch.compile, before the first step. Equal blocks are compiled once. A "
        "model without repeated blocks is compiled as a whole, with at most 1 text group. Needs triton-ascend on an "
        "NPU, triton on a GPU and a C++ compiler on the CPU, which is checked at the start")
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


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer.

    lr, beta1, beta2 and eps: None means the default of adamw (`get_default_params`) or of the timm optimizer.
    """

    group: ClassVar[str] = "optimizer"

    opt: str = option("adamw", metavar="NAME", help=
        "adamw, or timm/NAME for an optimizer of timm (`timm.optim.list_optimizers()`), which has no default learning "
        "rate")
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


@dataclass(frozen=True)
class DistributedConfig:
    """The device and the other processes."""

    group: ClassVar[str] = "device and processes"

    device: str = option("auto", metavar="NAME", help=
        "npu, cuda, xpu, mps or cpu; auto: the first of these that is available, see the log. An index (npu:3) selects "
        "a card for a single process. A device that is missing is an error. Under torchrun each process uses the card "
        "of its local rank")
    dist_backend: str | None = option(None, metavar="NAME", help=
        "backend for collectives: hccl (npu), nccl (cuda), gloo (cpu). Default: that of the device")
    dist_url: str | None = option(None, metavar="URL", help=
        "rendezvous of the processes. Default: env:// (MASTER_ADDR and MASTER_PORT, which torchrun sets)")
    dist_timeout: float = option(1800.0, above=0, metavar="SECONDS", help=
        "longest wait for another process to join, to finish a collective, or to get its batch of data; after that the "
        "run ends. Increase it if one process prepares data or downloads for longer")
    ddp_static_graph: bool = option(False, help=
        "tell DistributedDataParallel that every step uses the same parameters. It overlaps communication better, and "
        "--grad-checkpointing works with unused parameters")
    no_set_device_rank: bool = option(False, help=
        "use the first visible device in every process, for launchers that make only one device visible to each "
        "process (ASCEND_RT_VISIBLE_DEVICES per process)")
    deterministic: bool = option(False, help=
        "make runs bit-for-bit reproducible on the same devices and the same number of processes: use deterministic "
        "operators (torch.use_deterministic_algorithms) and collectives (HCCL_DETERMINISTIC, NCCL_ALGO). Slower; an "
        "operator that has no deterministic implementation raises an error that names it")


@dataclass(frozen=True)
class CheckpointConfig:
    """The run's folder, its checkpoints and its remote copy. logs: None means that nothing is written."""

    group: ClassVar[str] = "checkpoints"

    logs: str | None = option("./logs/", alias="--output-dir", metavar="DIR", help=
        "folder of all runs, one subfolder per run. None writes nothing. Under torchrun use --output-dir, because "
        "torchrun has a --logs option too")
    name: str | None = option(None, metavar="NAME", help=
        "name of this run and its folder. Default: built from the time, model, learning rate, batch size, workers and "
        "precision")
    save_frequency: int = option(1, at_least=0, metavar="EPOCHS", help=
        "save every N epochs and after the last one; 0: only after the last one")
    save_most_recent: bool = option(False, help="also write epoch_latest.pt after every epoch")
    delete_previous_checkpoint: bool = option(False, help=
        "delete the previous checkpoint after each save at the end of an epoch. The run then needs the disk space of "
        "two checkpoints")
    save_every_n_steps: int = option(0, at_least=0, metavar="N", help=
        "also save within epochs, every N steps of the run, as epoch_E_step_S.pt; 0: only at the end of epochs. "
        "SIGTERM, SIGUSR1 and Ctrl-C always save, then stop")
    keep_last: int = option(2, at_least=1, metavar="K", help="keep the K newest of the checkpoints saved within epochs")
    on_save_failure: str = option("continue", choices=("continue", "stop"), help=
        "what to do when a save fails, for example because the disk is full. Existing checkpoints are not affected. "
        "continue: train on and try again at the next save; stop: end the run. A failure of the last save is always an "
        "error")
    sync_save: bool = option(False, help=
        "block training while a checkpoint is written. Default: write in the background, which needs host memory for a "
        "copy of the checkpoint")
    resume: str | None = option(None, metavar="FILE|latest", help=
        "continue from a checkpoint, including one within an epoch: weights, optimizer, step, read position in the "
        "data, random states. latest: the newest readable checkpoint of this run (needs --name; without a checkpoint "
        "the run starts from the beginning)")
    remote_sync: str | None = option(None, metavar="URL", help=
        "copy the run's folder to s3://... or any fsspec URL during the run")
    remote_sync_frequency: int = option(300, at_least=1, metavar="SECONDS", help="time between two copies")
    remote_sync_protocol: str = option("s3", choices=("s3", "fsspec"), help=
        "s3: the `aws` command; fsspec: Python's fsspec")


@dataclass(frozen=True)
class EvalConfig:
    """When and how the model is evaluated. The data are in `DataConfig`."""

    group: ClassVar[str] = "evaluation"

    val_frequency: int = option(1, at_least=0, metavar="EPOCHS", help=
        "evaluate on --val-data every N epochs and at the end; 0: never")
    zeroshot_frequency: int = option(2, at_least=0, metavar="EPOCHS", help="the same for zero-shot classification")
    zeroshot_classnames: str | None = option(None, metavar="FILE", help=
        "class names of --zeroshot-data: one per line in the sorted order of the folders, or .json with a list or "
        "{folder: name}. Default: the folder names, with spaces for _")
    zeroshot_templates: str | None = option(None, metavar="FILE|openai|simple", help=
        "caption templates for the class names of --zeroshot-data: a file with one per line and {} for the name, "
        "OpenAI's 80 templates for ImageNet, or their 7 simple ones. Default: openai")


@dataclass(frozen=True)
class LoggingConfig:
    """The log, the metrics and the profile of a run."""

    group: ClassVar[str] = "logging"

    report_to: str = option("", metavar="NAMES", help="tensorboard, wandb, both separated by a comma, or all")
    log_every_n_steps: int = option(100, at_least=1, metavar="N", help="steps per log line, which shows their mean")
    profile_steps: str | None = option(None, metavar="A:B", help=
        "trace the steps A to B-1 of the run (from 0) on the first process into LOGS/NAME/profile, with the NPU's "
        "profiler on an NPU (for MindStudio Insight) and with torch.profiler elsewhere (for TensorBoard or Perfetto). "
        "Trace only a few steps, after the first ten: traces are large")
    profile_level: int = option(0, choices=(0, 1, 2), help=
        "detail of --profile-steps. 0: times and memory. 1: also the shapes of the operators' inputs and, on an NPU, "
        "metrics of AI cores and collectives. 2: also Python stacks and, on an NPU, its runtime and AI CPU; use it for "
        "few steps")
    log_local: bool = option(False, help="write one log per machine, not only that of the first process")
    wandb_project_name: str = option("open-clip", metavar="NAME", help="wandb project")
    wandb_notes: str = option("", metavar="TEXT", help="wandb notes of the run")
    debug: bool = option(False, help="log debug messages")
    copy_codebase: bool = option(False, help="copy the source code into the run's folder")


@dataclass(frozen=True)
class UnsupportedConfig:
    """Options of open_clip that are refused, or ignored with a warning. They are not part of `TrainConfig`."""

    group: ClassVar[str] = "unsupported"

    horovod: bool = option(False, help="use torchrun", refused=
        "Horovod is not supported. Start the same command with `torchrun --nproc_per_node N -m training.main`.")
    torchscript: bool = option(False, help="no effect: use --torchcompile")
    trace: bool = option(False, help="use open_clip.trace_model() on a trained model", refused=
        "A traced model cannot be trained. Train without --trace and call `open_clip.trace_model(model)` on the "
        "result.")
    use_bnb_linear: str | None = option(None, metavar="NAME", help="use --precision amp_bf16", refused=
        "The int8 layers of bitsandbytes are not supported. To save memory use --precision amp_bf16 or bf16, and "
        "--grad-checkpointing.")
# fmt: on


@dataclass(frozen=True)
class TrainConfig:
    """All sections."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


SECTIONS: tuple[Any, ...] = (*get_type_hints(TrainConfig).values(), UnsupportedConfig)


def default_values() -> dict[str, Any]:
    """Return the default of every option, by name."""
    return {name: value for section in SECTIONS for name, value in asdict(section()).items()}


def get_default_params(model_name: str) -> dict[str, float]:
    """Return AdamW's lr, beta1, beta2 and eps for a model, from the CLIP paper (arXiv:2103.00020, table 18)."""
    is_vit = "vit" in model_name.lower()
    return {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98 if is_vit else 0.999, "eps": 1e-6 if is_vit else 1e-8}
