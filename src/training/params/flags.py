"""Options of the training command and their `--help` texts, one function per section.

The defaults are in the dataclasses of `training.params`. If a default depends on the model's name, the device or the
data, the help text says how.
"""

from __future__ import annotations

import argparse
import ast
import textwrap
from typing import Any

PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32")
DATASET_TYPES = ("webdataset", "csv", "imagefolder", "synthetic", "auto")
LR_SCHEDULERS = ("cosine", "const", "const-cooldown")
FUSED_OPTIMIZERS = ("auto", "torch", "npu", "off")
FP32_MATMULS = ("high", "highest")
ON_SAVE_FAILURE = ("continue", "stop")
PROFILE_LEVELS = (0, 1, 2)
LOSS_DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class ParseKwargs(argparse.Action):
    """Collect `KEY=VALUE` words into a dict.

    A value that is a Python literal (`1`, `0.5`, `True`, `None`, `(0.9,1.0)`) is converted; others stay strings. A
    value may contain `=`. A word without a key or without `=` is an error.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        parsed = {}
        for word in values:
            key, equals, value = word.partition("=")
            if not key or not equals:
                parser.error(f"argument {option_string}: expected KEY=VALUE, got {word!r}")
            try:
                parsed[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                parsed[key] = value
        setattr(namespace, self.dest, parsed)


class _HelpFormatter(argparse.HelpFormatter):
    """A formatter that appends defaults, except empty ones, and does not break lines at hyphens."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if action.help is None or default is None or default is False or default in ("", {}, argparse.SUPPRESS):
            return action.help
        shown = repr(default) if isinstance(default, str) and default.isspace() else "%(default)s"
        return f"{action.help} [{shown}]"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m training.main`. Its defaults are not set yet (see `training.params`)."""
    parser = argparse.ArgumentParser(
        prog="python -m training.main",
        usage="%(prog)s [--train-data PATH] [--model NAME] [options]; --help lists all of them",
        description="Train and evaluate CLIP models on Ascend NPUs, GPUs or the CPU. For several devices, start the "
        "same command with `torchrun --nproc_per_node N -m training.main ...` or srun.",
        epilog="Defaults are in [brackets]. Sample counts and batch sizes are per process (one process per device) "
        "unless stated otherwise. A step is one update of the weights.",
        formatter_class=_HelpFormatter,
    )
    for add_section in (
        *(_data, _model, _preprocessing, _objective, _optim, _schedule),
        *(_distributed, _checkpoint, _eval, _logging, _refused),
    ):
        add_section(parser)
    return parser


# fmt: off
# (tables: an option and its help side by side)
def _data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data", "Training and validation data.").add_argument
    add("--train-data", metavar="PATH", help="training data: a CSV/TSV file, webdataset shards as a brace pattern "
        "(`/data/{0000..0099}.tar`), or a .txt file that lists shards. Join several sources with `::`. Without it (and "
        "without --dataset-type synthetic) the run only evaluates the model")
    add("--train-data-upsampling-factors", metavar="F::F", help="sampling weight of each source of --train-data, "
        "joined by `::` and relative per sample (`1::2::0.5`: samples of the second source are drawn twice as often as "
        "those of the first). Needs --dataset-resampled. Default: every shard is equally likely")
    add("--val-data", metavar="PATH", help="validation data, in the same formats; used for the loss and retrieval "
        "metrics")
    add("--train-num-samples", type=int, metavar="N", help="samples per epoch over all processes, for webdataset "
        "and synthetic data. Default: read from the shards' `sizes.json` or `__len__`; required if both are missing. "
        "Synthetic data: 100. With --dataset-resampled any number works: it sets how often the run evaluates and saves")
    add("--val-num-samples", type=int, metavar="N", help="the same for the validation data. It is only used to show "
        "progress: every sample is evaluated in any case")
    add("--dataset-type", choices=DATASET_TYPES, help="format of the data. auto: chosen by the file's extension; "
        "imagefolder: one folder of images per class, captions built from the folder names; synthetic: random data, to "
        "measure the speed of everything except data loading")
    add("--dataset-resampled", action="store_true", help="webdataset: draw shards with replacement, without end, "
        "instead of reading each shard once per epoch. For very large datasets and weighted sources")
    add("--csv-separator", metavar="CHAR", help="column separator of CSV files (for a comma: `--csv-separator ,`)")
    add("--csv-img-key", metavar="COLUMN", help="CSV column with the image paths")
    add("--csv-caption-key", metavar="COLUMN", help="CSV column with the captions")
    add("--max-bad-fraction", type=float, metavar="X", help="stop the run when more than this fraction (0 to 1) of the "
        "samples or shards read so far, over all processes, is unusable. Checked each time the log is written. "
        "Unusable samples are always skipped and counted; 1 never stops")
    add("--workers", type=int, metavar="N", help="data loader workers per training process. Use more if the data time "
        "in the log is not near 0; 0 decodes images in the training process itself")
    add("--batch-size", type=int, metavar="N", help="samples per process and forward pass. The contrastive loss "
        "compares the samples of all processes, so the effective batch size is this x processes x --accum-freq")
    add("--seed", type=int, metavar="N", help="seed of the initial weights, data order and augmentation. The "
        "augmentation of a sample depends on (seed, epoch, sample), not on the number of workers or processes")


def _model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model", "Architecture, initial weights, and which parts are trained.").add_argument
    add("--model", metavar="NAME", help="architecture (`open_clip.list_models()`), `hf-hub:ORG/REPO`, or "
        "`local-dir:PATH`")
    add("--pretrained", metavar="TAG|FILE", help="initial weights: a tag of `open_clip.list_pretrained()` or a "
        "file (.pt, .bin, .safetensors, a training checkpoint). Default: random. The optimizer state is not loaded; "
        "use --resume to continue a run")
    add("--pretrained-image", action="store_true", help="load the image tower's pretrained (ImageNet) weights, if the "
        "architecture has any")
    add("--cache-dir", metavar="DIR", help="folder for downloaded weights and tokenizers. Default: that of Hugging "
        "Face")
    add("--precision", choices=PRECISIONS, help="dtype of weights and computation. amp: fp32 weights, fp16 computation "
        "with a gradient scaler (on the CPU: bf16 without a scaler); amp_bf16 (amp_bfloat16): bf16 computation, no "
        "scaler; bf16, fp16: weights too, but normalization in fp32; pure_*: everything. Default: amp on an "
        "accelerator, fp32 on the CPU. Use amp_bf16 if the device supports it and training with amp diverges")
    add("--fp32-matmul", choices=FP32_MATMULS, help="precision of the operations that stay in fp32 (all of them with "
        "--precision fp32). high: matrix products and convolutions in TF32 (CUDA) or HF32 (Ascend), several times "
        "faster, about 3 significant digits; highest: full fp32. No effect on the CPU")
    add("--force-context-length", type=int, metavar="TOKENS", help="override the architecture's context length; "
        "position embeddings are resized")
    add("--force-image-size", type=int, nargs="+", metavar="PIXELS", help="override the architecture's image size: one "
        "number, or height and width; position embeddings are resized")
    add("--force-quick-gelu", action="store_true", help="use QuickGELU activations. Only for weights that were trained "
        "with it, such as OpenAI's")
    add("--force-patch-dropout", type=float, metavar="P", help="fraction of image patches dropped in training (FLIP, "
        "arXiv:2212.00794). 0.5 halves the image tower's work; 0 in the last epochs recovers the accuracy")
    add("--force-custom-text", action="store_true", help="build a CustomTextCLIP (parameters of the text tower are "
        "named `text.*`)")
    add("--lock-image", action="store_true", help="freeze the image tower (LiT, arXiv:2111.07991). Together with "
        "--lock-text almost nothing is left to train")
    add("--lock-image-unlocked-groups", type=int, metavar="N", help="with --lock-image: keep its last N groups of "
        "layers trainable")
    add("--lock-image-freeze-bn-stats", action="store_true", help="with --lock-image: also freeze the running "
        "statistics of BatchNorm in the locked layers")
    add("--lock-text", action="store_true", help="freeze the text tower")
    add("--lock-text-unlocked-layers", type=int, metavar="N", help="with --lock-text: keep its last N layers "
        "trainable")
    add("--lock-text-freeze-layer-norm", action="store_true", help="with --lock-text: also freeze the LayerNorm "
        "weights in the locked layers")
    add("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass, which takes "
        "about a third more time and much less memory")
    add("--text-groups", type=int, metavar="N", help="sort the captions of a batch by length and encode them in at "
        "most N groups without most of their padding. 1 cuts all captions to the longest one, 0 keeps the padding. The "
        "embeddings are the same. No effect on models whose text tower reads the padding, such as SigLIP and CoCa. "
        "With --torchcompile at most 1 group is used, to limit the number of shapes")
    add("--torchcompile", action="store_true", help="compile the model with torch.compile; the first steps are slow. "
        "Needs triton-ascend on an NPU, triton on a GPU and a C++ compiler on the CPU, which is checked at the start")
    add("--use-bn-sync", action="store_true", help="synchronize BatchNorm statistics over all processes (models with "
        "BatchNorm)")


def _preprocessing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("preprocessing", "Overrides of the preprocessing that belongs to the weights.")
    add = group.add_argument
    add("--image-mean", type=float, nargs="+", metavar="X", help="mean subtracted from each channel (values in 0..1): "
        "three numbers, or one for all channels. Default: that of the weights")
    add("--image-std", type=float, nargs="+", metavar="X", help="standard deviation that divides each channel, in the "
        "same form")
    add("--image-interpolation", choices=("bicubic", "bilinear", "random"), help="interpolation used to resize images; "
        "random chooses one per image, in training only")
    add("--image-resize-mode", choices=("shortest", "longest", "squash"), help="resizing in evaluation. shortest: fit "
        "the short side and crop; longest: fit the long side and pad; squash: ignore the aspect ratio")
    add("--aug-cfg", nargs="*", action=ParseKwargs, metavar="KEY=VALUE", help="training augmentation: scale=(0.9,1.0), "
        "ratio, color_jitter, color_jitter_prob, gray_scale_prob, re_prob, re_count, use_timm=True")


def _objective(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("objective", "The loss. Default: contrastive; CoCa models also get a captioning "
                                    "loss.").add_argument
    add("--local-loss", action="store_true", help="several processes: each computes the loss of its own samples "
        "against all samples, instead of all against all. This takes less time and memory: logits per process grow "
        "with W instead of W^2 (W processes). Add --gather-with-grad; without it gradients are lost")
    add("--gather-with-grad", action="store_true", help="several processes: backpropagate through the gather to the "
        "process that each sample is from. Without it the gradients of the towers are 1/W of those that the same batch "
        "gives on one process (logit_scale gets all of it). This hardly affects AdamW, but it does affect "
        "--grad-clip-norm and SGD")
    add("--siglip", action="store_true", help="pairwise sigmoid loss (arXiv:2303.15343) instead of softmax. Adds a "
        "logit_bias to the model, which starts at -10 unless the weights contain one")
    add("--loss-dist-impl", choices=LOSS_DIST_IMPLS, help="how processes exchange text features with --siglip; all "
        "give the same loss. bidir, shift: around a ring; reduce, gather: by collectives. Default: bidir")
    add("--coca-caption-loss-weight", type=float, metavar="X", help="CoCa: weight of the captioning loss")
    add("--coca-contrastive-loss-weight", type=float, metavar="X", help="CoCa: weight of the contrastive loss")
    add("--distill-model", metavar="NAME", help="teacher model. Adds a loss that matches its similarities. Needs "
        "--distill-pretrained")
    add("--distill-pretrained", metavar="TAG|FILE", help="weights of the teacher")


def _optim(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", metavar="NAME", help="adamw, or timm/NAME for an optimizer of timm (`timm.optim.list_optimizers()`), "
        "which has no default learning rate")
    add("--lr", type=float, metavar="X", help="peak learning rate. Default: 5e-4 for adamw, which suits training from "
        "scratch with batches of thousands; for fine-tuning use 1e-6 to 1e-4")
    add("--beta1", type=float, metavar="X", help="AdamW. Default: 0.9")
    add("--beta2", type=float, metavar="X", help="AdamW. Default: 0.98 if the model's name contains `vit`, else 0.999")
    add("--eps", type=float, metavar="X", help="AdamW. Default: 1e-6 if the model's name contains `vit`, else 1e-8")
    add("--wd", type=float, metavar="X", help="decoupled weight decay; not applied to biases, gains and logit_scale")
    add("--momentum", type=float, metavar="X", help="momentum, for timm optimizers that have one")
    add("--grad-clip-norm", type=float, metavar="X", help="clip the global gradient norm to this value. Default: off; "
        "1.0 stabilizes large batches. See --gather-with-grad for the scale of the gradients")
    add("--accum-freq", type=int, metavar="N", help="micro-batches per step. The features of all N are first computed "
        "without gradients, so that all N x batch samples are negatives of each other. Uses the memory of one batch "
        "and about 1.3x the time of one large batch")
    add("--fused-optimizer", choices=FUSED_OPTIMIZERS, help="implementation of AdamW. auto: torch's fused kernel if it "
        "can skip a step on the device, else (NPU, fp16 weights) flat buffers; torch: torch's fused kernel; off: torch "
        "without fusion; npu: the kernel of the NPU's library (fp32 weights). Results agree within rounding, and "
        "optimizer states are interchangeable")
    add("--ema-decay", type=float, metavar="D", help="keep an exponential moving average of the weights with this "
        "decay (0.999 to 0.9999). It is evaluated (metrics `ema_...`) and saved (`state_dict_ema`). Needs 4 more bytes "
        "per parameter")
    add("--max-bad-steps", type=int, metavar="N", help="stop after N steps in a row with a non-finite loss or gradient "
        "on any process, and list their samples in the log. Each such step is skipped by all processes. 0: never stop")


def _schedule(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("schedule", "Learning rate schedule and length of the run.").add_argument
    add("--epochs", type=int, metavar="N", help="number of epochs (--train-num-samples samples each). The schedule "
        "spans all of them: if a run is resumed with another number, the learning rate jumps")
    add("--warmup", type=int, metavar="STEPS", help="steps over which the learning rate rises linearly from 0. A run "
        "has samples / (batch size x processes x --accum-freq) x --epochs steps, and a tenth of them is usual. If "
        "warmup is longer than the run, --lr is never reached")
    add("--lr-scheduler", choices=LR_SCHEDULERS, help="learning rate after warmup. cosine: decays to 0; const; "
        "const-cooldown: constant, then decays in the last --epochs-cooldown epochs")
    add("--epochs-cooldown", type=int, metavar="N", help="const-cooldown: length of the decay, in epochs")
    add("--lr-cooldown-end", type=float, metavar="X", help="const-cooldown: final learning rate")
    add("--lr-cooldown-power", type=float, metavar="X", help="const-cooldown: power of the polynomial (1 is linear)")
    add("--skip-scheduler", action="store_true", help="no warmup and no schedule: use --lr at every step")


def _distributed(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("device and processes").add_argument
    add("--device", metavar="NAME", help="npu, cuda, xpu, mps or cpu; auto: the first of these that is available, see "
        "the log. An index (npu:3) selects a card for a single process. A device that is missing is an error. Under "
        "torchrun each process uses the card of its local rank")
    add("--dist-backend", metavar="NAME", help="backend for collectives: hccl (npu), nccl (cuda), gloo (cpu). Default: "
        "that of the device")
    add("--dist-url", metavar="URL", help="rendezvous of the processes. Default: env:// (MASTER_ADDR and MASTER_PORT, "
        "which torchrun sets)")
    add("--dist-timeout", type=float, metavar="SECONDS", help="longest wait for another process to join, to finish a "
        "collective, or to get its batch of data; after that the run ends. Increase it if one process prepares data "
        "or downloads for longer")
    add("--ddp-static-graph", action="store_true", help="tell DistributedDataParallel that every step uses the same "
        "parameters. It overlaps communication better, and --grad-checkpointing works with unused parameters")
    add("--no-set-device-rank", action="store_true", help="use the first visible device in every process, for "
        "launchers that make only one device visible to each process (ASCEND_RT_VISIBLE_DEVICES per process)")
    add("--deterministic", action="store_true", help="make runs bit-for-bit reproducible on the same devices and the "
        "same number of processes: use deterministic operators (torch.use_deterministic_algorithms) and collectives "
        "(HCCL_DETERMINISTIC, NCCL_ALGO). Slower; an operator that has no deterministic implementation raises an error "
        "that names it")


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("checkpoints", "Written to LOGS/NAME/checkpoints/epoch_N.pt.").add_argument
    add("--logs", "--output-dir", dest="logs", metavar="DIR", help="folder of all runs, one subfolder per run. None "
        "writes nothing. Under torchrun use --output-dir, because torchrun has a --logs option too")
    add("--name", metavar="NAME", help="name of this run and its folder. Default: built from the time, model, learning "
        "rate, batch size, workers and precision")
    add("--save-frequency", type=int, metavar="EPOCHS", help="save every N epochs and after the last one; 0: only "
        "after the last one")
    add("--save-most-recent", action="store_true", help="also write epoch_latest.pt after every epoch")
    add("--delete-previous-checkpoint", action="store_true", help="delete the previous checkpoint after each save at "
        "the end of an epoch. The run then needs the disk space of two checkpoints")
    add("--save-every-n-steps", type=int, metavar="N", help="also save within epochs, every N steps of the run, as "
        "epoch_E_step_S.pt; 0: only at the end of epochs. SIGTERM, SIGUSR1 and Ctrl-C always save, then stop")
    add("--keep-last", type=int, metavar="K", help="keep the K newest of the checkpoints saved within epochs")
    add("--on-save-failure", choices=ON_SAVE_FAILURE, help="what to do when a save fails, for example because the disk "
        "is full. Existing checkpoints are not affected. continue: train on and try again at the next save; stop: end "
        "the run. A failure of the last save is always an error")
    add("--sync-save", action="store_true", help="block training while a checkpoint is written. Default: write in the "
        "background, which needs host memory for a copy of the checkpoint")
    add("--resume", metavar="FILE|latest", help="continue from a checkpoint, including one within an epoch: weights, "
        "optimizer, step, read position in the data, random states. latest: the newest readable checkpoint of this run "
        "(needs --name; without a checkpoint the run starts from the beginning)")
    add("--remote-sync", metavar="URL", help="copy the run's folder to s3://... or any fsspec URL during the run")
    add("--remote-sync-frequency", type=int, metavar="SECONDS", help="time between two copies")
    add("--remote-sync-protocol", choices=("s3", "fsspec"), help="s3: the `aws` command; fsspec: Python's fsspec")


def _eval(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation", "The work is split over all processes.").add_argument
    add("--val-frequency", type=int, metavar="EPOCHS", help="evaluate on --val-data every N epochs and at the end; 0: "
        "never")
    add("--zeroshot-frequency", type=int, metavar="EPOCHS", help="the same for zero-shot classification")
    add("--imagenet-val", metavar="DIR", help="zero-shot accuracy on the ImageNet validation images, one folder per "
        "class")
    add("--imagenet-v2", metavar="DIR", help="zero-shot accuracy on ImageNet-V2")
    add("--zeroshot-data", metavar="DIR", help="zero-shot accuracy on other images, one folder per class")
    add("--zeroshot-classnames", metavar="FILE", help="class names of --zeroshot-data: one per line in the sorted "
        "order of the folders, or .json with a list or {folder: name}. Default: the folder names, with spaces for _")
    add("--zeroshot-templates", metavar="FILE|openai|simple", help="caption templates for the class names of "
        "--zeroshot-data: a file with one per line and {} for the name, OpenAI's 80 templates for ImageNet, or their 7 "
        "simple ones. Default: openai")


def _logging(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("logging", "LOGS/NAME/out.log is the log; results.jsonl has all evaluations.")
    add = group.add_argument
    add("--report-to", metavar="NAMES", help="tensorboard, wandb, both separated by a comma, or all")
    add("--log-every-n-steps", type=int, metavar="N", help="steps per log line, which shows their mean")
    add("--profile-steps", metavar="A:B", help="trace the steps A to B-1 of the run (from 0) on the first process into "
        "LOGS/NAME/profile, with the NPU's profiler on an NPU (for MindStudio Insight) and with torch.profiler "
        "elsewhere (for TensorBoard or Perfetto). Trace only a few steps, after the first ten: traces are large")
    add("--profile-level", type=int, choices=PROFILE_LEVELS, help="detail of --profile-steps. 0: times and memory. 1: "
        "also the shapes of the operators' inputs and, on an NPU, metrics of AI cores and collectives. 2: also Python "
        "stacks and, on an NPU, its runtime and AI CPU; use it for few steps")
    add("--log-local", action="store_true", help="write one log per machine, not only that of the first process")
    add("--wandb-project-name", metavar="NAME", help="wandb project")
    add("--wandb-notes", metavar="TEXT", help="wandb notes of the run")
    add("--debug", action="store_true", help="log debug messages")
    add("--copy-codebase", action="store_true", help="copy the source code into the run's folder")


def _refused(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("unsupported", "Options of open_clip that this project does not support, with "
                                    "what to use instead. --torchscript is ignored with a warning.").add_argument
    add("--horovod", action="store_true", help="use torchrun")
    add("--torchscript", action="store_true", help="no effect: use --torchcompile")
    add("--trace", action="store_true", help="use open_clip.trace_model() on a trained model")
    add("--use-bnb-linear", metavar="NAME", help="use --precision amp_bf16")
