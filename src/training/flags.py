"""The options of the training command and what `--help` says about them, one function a section.

Defaults are not here: they are those of the dataclasses in `training.params`, so that each is written once. Where a
default is decided later (from the model's name, the device, the data), the help says how.
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
    """Collects `KEY=VALUE` words into a dict.

    A value is read as a Python literal (`1`, `0.5`, `True`, `None`, `(0.9,1.0)`); what is not one stays a string.
    The value may contain `=`; without a key or without `=` the word is refused.
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
    """Appends the default where there is one to speak of, and breaks no line inside an option's name."""

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
    """The parser of `python -m training.main`, its defaults still unset (see `training.params`)."""
    parser = argparse.ArgumentParser(
        prog="python -m training.main",
        usage="%(prog)s [--train-data PATH] [--model NAME] [options]; --help lists all of them",
        description="Trains and evaluates CLIP models on Ascend NPUs, GPUs or the CPU. Several devices: the same "
        "command under `torchrun --nproc_per_node N -m training.main ...`, or under srun.",
        epilog="[...] is the default. Counts of samples and batch sizes are per process (one process a device) unless "
        "said otherwise; a step is one update of the weights.",
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
    add = parser.add_argument_group("data", "What is trained and validated on.").add_argument
    add("--train-data", metavar="PATH", help="training data: a CSV/TSV file, or webdataset shards with braces "
        "(`/data/{0000..0099}.tar`) or a .txt file that lists them, several sources joined by `::`. Without it (and "
        "without --dataset-type synthetic) nothing is trained: the model is only evaluated")
    add("--train-data-upsampling-factors", metavar="F::F", help="weights of the sources of --train-data, as many "
        "numbers joined by `::`, relative per sample (`1::2::0.5`: the second is seen twice as often). Needs "
        "--dataset-resampled. Default: every shard is equally likely")
    add("--val-data", metavar="PATH", help="validation data, in the same forms: gives the loss and retrieval metrics")
    add("--train-num-samples", type=int, metavar="N", help="samples of one epoch over all processes, for webdataset "
        "and synthetic data. Default: read from the shards' `sizes.json` or `__len__`; needed where these are missing. "
        "Synthetic: 100. With --dataset-resampled it may be any number: it is how often one evaluates and saves")
    add("--val-num-samples", type=int, metavar="N", help="the same of the validation data, for the progress that is "
        "shown: every sample is evaluated in any case")
    add("--dataset-type", choices=DATASET_TYPES, help="form of the data; auto goes by the file's ending; "
        "imagefolder: a folder of images a class, with captions made of their names; synthetic needs no files and "
        "measures the speed of the rest")
    add("--dataset-resampled", action="store_true", help="webdataset: draw shards with replacement, for ever, instead "
        "of passing over each once an epoch. For very large collections and for several weighted sources")
    add("--csv-separator", metavar="CHAR", help="between a CSV file's columns (a comma needs `--csv-separator ,`)")
    add("--csv-img-key", metavar="COLUMN", help="column with the images' paths")
    add("--csv-caption-key", metavar="COLUMN", help="column with the captions")
    add("--max-bad-fraction", type=float, metavar="X", help="stop the run, saying why, when more than this part of the "
        "samples (or shards) that it read, over all processes, cannot be used: 0 to 1, looked at with each line of "
        "log. Bad ones are skipped and counted either way; 1 never stops")
    add("--workers", type=int, metavar="N", help="processes that decode images, per training process; they live as "
        "long as the run. More when the log's data time is not near 0; 0 decodes in the training process itself")
    add("--batch-size", type=int, metavar="N", help="samples per process and forward pass. The contrastive loss "
        "compares all processes' samples, so the batch that matters is this x processes x --accum-freq")
    add("--seed", type=int, metavar="N", help="of initial weights, order of the data and augmentation. A sample's "
        "augmentation follows from (seed, epoch, sample) on any number of workers and processes")


def _model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model", "Which model, from which weights, and what of it is trained.").add_argument
    add("--model", metavar="NAME", help="architecture (`open_clip.list_models()`), or `hf-hub:ORG/REPO`, or "
        "`local-dir:PATH`")
    add("--pretrained", metavar="TAG|FILE", help="weights to start from: a tag of `open_clip.list_pretrained()` or a "
        "file (.pt, .bin, .safetensors, a training checkpoint). Default: random. The optimizer starts afresh; to "
        "continue a run use --resume")
    add("--pretrained-image", action="store_true", help="image tower from its own (ImageNet) weights, where it has any")
    add("--cache-dir", metavar="DIR", help="where downloaded weights and tokenizers are kept. Default: Hugging Face's")
    add("--precision", choices=PRECISIONS, help="number format of the computation. amp: weights fp32, computation fp16 "
        "with a gradient scaler (on the CPU: bf16 without one); amp_bf16 (amp_bfloat16): bf16, no scaler; bf16, fp16: "
        "weights too, but normalisation in fp32; pure_*: everything. Default: amp on an accelerator, fp32 on the CPU. "
        "Use amp_bf16 where the device has it and training with amp diverges")
    add("--fp32-matmul", choices=FP32_MATMULS, help="what remains in fp32 (all of it with --precision fp32). high: "
        "matrix products and convolutions in TF32 (CUDA) or HF32 (Ascend), several times faster and good to about 3 "
        "digits; highest: in full fp32. No difference on the CPU")
    add("--force-context-length", type=int, metavar="TOKENS", help="another length of the text than the "
        "architecture's; position embeddings are resized")
    add("--force-image-size", type=int, nargs="+", metavar="PIXELS", help="another image size: one number, or height "
        "and width; position embeddings are resized")
    add("--force-quick-gelu", action="store_true", help="QuickGELU activations, which OpenAI's weights (and some "
        "others) were trained with; wrong for the rest")
    add("--force-patch-dropout", type=float, metavar="P", help="share of image patches left out in training (FLIP, "
        "arXiv:2212.00794): 0.5 halves the image tower's work; 0 for the last epochs regains the accuracy")
    add("--force-custom-text", action="store_true", help="CustomTextCLIP (text tower under `text.` in the checkpoint)")
    add("--lock-image", action="store_true", help="freeze the image tower (LiT, arXiv:2111.07991). With --lock-text "
        "too, almost nothing is left to train")
    add("--lock-image-unlocked-groups", type=int, metavar="N", help="with --lock-image: leave its last N groups of "
        "layers trainable")
    add("--lock-image-freeze-bn-stats", action="store_true", help="with --lock-image: freeze BatchNorm's running "
        "statistics in the locked layers too")
    add("--lock-text", action="store_true", help="freeze the text tower")
    add("--lock-text-unlocked-layers", type=int, metavar="N", help="with --lock-text: leave its last N layers "
        "trainable")
    add("--lock-text-freeze-layer-norm", action="store_true", help="with --lock-text: freeze LayerNorm's weights in "
        "the locked layers too")
    add("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass: about a third "
        "more time, far less memory. When the batch does not fit")
    add("--text-groups", type=int, metavar="N", help="sort the captions of a batch by length and encode them in at "
        "most N groups without most of their padding; 1 cuts all captions to the longest one, 0 keeps the padding. The "
        "embeddings are the same. No effect on models whose text tower reads the padding, such as SigLIP and CoCa. "
        "With --torchcompile 1 at most, for fewer shapes")
    add("--torchcompile", action="store_true", help="torch.compile the model: the first steps are slow. It needs "
        "triton-ascend on an NPU, triton on a GPU and a C++ compiler on the CPU, which is checked at the start")
    add("--use-bn-sync", action="store_true", help="BatchNorm statistics over all processes (models with BatchNorm)")


def _preprocessing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("preprocessing", "Overrides of what the model's weights were trained with.")
    add = group.add_argument
    add("--image-mean", type=float, nargs="+", metavar="X", help="subtracted from each channel (values in 0..1), three "
        "numbers or one for all. Default: the weights' own")
    add("--image-std", type=float, nargs="+", metavar="X", help="each channel is divided by it, likewise")
    add("--image-interpolation", choices=("bicubic", "bilinear", "random"), help="how images are resized; random "
        "chooses per image, in training only")
    add("--image-resize-mode", choices=("shortest", "longest", "squash"), help="in evaluation. shortest: the short "
        "side fits, the rest is cropped; longest: all is kept and padded; squash: the proportions change")
    add("--aug-cfg", nargs="*", action=ParseKwargs, metavar="KEY=VALUE", help="training augmentation: scale=(0.9,1.0), "
        "ratio, color_jitter, color_jitter_prob, gray_scale_prob, re_prob, re_count, use_timm=True")


def _objective(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("objective", "The loss. A CLIP model gets the contrastive one, CoCa captioning "
                                    "beside it.").add_argument
    add("--local-loss", action="store_true", help="several processes: each computes the loss of its own samples "
        "against all, instead of all against all: less time and memory, from W^2 logits per process to W (W "
        "processes). Use it with --gather-with-grad, else the gradients of the samples as negatives are lost")
    add("--gather-with-grad", action="store_true", help="several processes: gradients flow back through the gather to "
        "the process that a sample is from. Without it the towers get 1/W of the gradient that the same batch has on "
        "one process (logit_scale gets all): AdamW hardly notices, --grad-clip-norm and SGD do")
    add("--siglip", action="store_true", help="pairwise sigmoid loss (arXiv:2303.15343) instead of softmax. A model "
        "gets a logit_bias for it, which starts at -10 unless the weights have one")
    add("--loss-dist-impl", choices=LOSS_DIST_IMPLS, help="how --siglip's processes exchange text features; all give "
        "the same loss. bidir, shift: around a ring; reduce, gather: by collectives. Default: bidir")
    add("--coca-caption-loss-weight", type=float, metavar="X", help="CoCa: weight of the captioning loss")
    add("--coca-contrastive-loss-weight", type=float, metavar="X", help="CoCa: weight of the contrastive loss")
    add("--distill-model", metavar="NAME", help="teacher: its similarities are matched besides the contrastive loss. "
        "Needs --distill-pretrained")
    add("--distill-pretrained", metavar="TAG|FILE", help="the teacher's weights")


def _optim(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", metavar="NAME", help="adamw, or timm/NAME for any of timm's (`timm.optim.list_optimizers()`), which "
        "has no default learning rate")
    add("--lr", type=float, metavar="X", help="peak learning rate. Default: 5e-4 for adamw, good for random weights "
        "and batches of thousands; fine-tuning wants 1e-6 to 1e-4")
    add("--beta1", type=float, metavar="X", help="AdamW. Default: 0.9")
    add("--beta2", type=float, metavar="X", help="AdamW. Default: 0.98 where the model's name contains `vit`, "
        "else 0.999")
    add("--eps", type=float, metavar="X", help="AdamW. Default: 1e-6 where the model's name contains `vit`, "
        "else 1e-8")
    add("--wd", type=float, metavar="X", help="decoupled weight decay; biases, gains and logit_scale have none")
    add("--momentum", type=float, metavar="X", help="for timm/ optimizers that have one")
    add("--grad-clip-norm", type=float, metavar="X", help="scale the gradient down to this global norm. Default: off; "
        "1.0 calms large batches. See --gather-with-grad on the gradients' scale")
    add("--accum-freq", type=int, metavar="N", help="N batches a step. Their features are computed first without "
        "gradients, so that all N x batch samples are each other's negatives: memory of one batch, about 1.3x the time "
        "of a large one")
    add("--fused-optimizer", choices=FUSED_OPTIMIZERS, help="how AdamW is computed. auto: by torch's fused kernel if "
        "that can skip a step on the device, else (NPU, fp16 weights) on flat buffers; torch: by torch's fused kernel; "
        "off: by torch's several kernels; npu: by the NPU library's (weights in fp32). Same numbers within rounding, "
        "states interchangeable")
    add("--ema-decay", type=float, metavar="D", help="keep an exponential moving average of the weights (0.999 to "
        "0.9999), evaluated (`ema_...` beside each metric) and saved (`state_dict_ema`): 4 bytes more a parameter")
    add("--max-bad-steps", type=int, metavar="N", help="a step whose loss or gradient is not finite, on any process, "
        "is skipped by all; after N in a row the run stops and writes down which samples they had. 0: it never stops")


def _schedule(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("schedule", "Learning rate over the steps, and how many there are.").add_argument
    add("--epochs", type=int, metavar="N", help="passes over the data (--train-num-samples samples each). The schedule "
        "spans all of them: resumed with another number, the learning rate jumps")
    add("--warmup", type=int, metavar="STEPS", help="the learning rate rises linearly from 0 for so many steps. A "
        "run has samples / (batch size x processes x --accum-freq) x --epochs of them; a tenth is usual. More than the "
        "run has, and it never reaches --lr")
    add("--lr-scheduler", choices=LR_SCHEDULERS, help="after warmup: cosine down to 0; const; const-cooldown, constant "
        "but for the last --epochs-cooldown epochs")
    add("--epochs-cooldown", type=int, metavar="N", help="const-cooldown: length of the descent at the end, in epochs")
    add("--lr-cooldown-end", type=float, metavar="X", help="const-cooldown: learning rate at the very end")
    add("--lr-cooldown-power", type=float, metavar="X", help="const-cooldown: power of the polynomial (1 is linear)")
    add("--skip-scheduler", action="store_true", help="no warmup and no schedule: --lr at every step")


def _distributed(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("device and processes").add_argument
    add("--device", metavar="NAME", help="auto: the best there is (npu, cuda, xpu, mps, cpu), said in the log. Or a "
        "name; npu:3 picks a card for a single process. What is asked for and missing is an error. Under torchrun "
        "each process takes the card of its local rank")
    add("--dist-backend", metavar="NAME", help="collectives: hccl (npu), nccl (cuda), gloo (cpu). Default: the "
        "device's")
    add("--dist-url", metavar="URL", help="where the processes meet. Default: env:// (MASTER_ADDR, MASTER_PORT, which "
        "torchrun sets)")
    add("--dist-timeout", type=float, metavar="SECONDS", help="a wait for another process that is longer ends the "
        "run: for it to join, for a collective, for its batch of data. Give more where one process prepares "
        "(downloads) for longer than that")
    add("--ddp-static-graph", action="store_true", help="tell DistributedDataParallel that every step uses the same "
        "parameters: it overlaps communication better, and --grad-checkpointing works with unused ones")
    add("--no-set-device-rank", action="store_true", help="every process uses the first device it sees: where the "
        "launcher shows each process its own only (ASCEND_RT_VISIBLE_DEVICES per process)")
    add("--deterministic", action="store_true", help="the same command gives the same bits again, on the same devices "
        "and as many processes: deterministic operators (torch.use_deterministic_algorithms) and collectives "
        "(HCCL_DETERMINISTIC, NCCL_ALGO). Slower; an operator without a deterministic form ends the run with its name")


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("checkpoints", "Written to LOGS/NAME/checkpoints/epoch_N.pt.").add_argument
    add("--logs", "--output-dir", dest="logs", metavar="DIR", help="folder of all runs, one sub-folder each. None "
        "writes nothing. Under torchrun say --output-dir: torchrun takes --logs for its own")
    add("--name", metavar="NAME", help="of this run and its folder. Default: made of the time, model, learning rate, "
        "batch size, workers and precision")
    add("--save-frequency", type=int, metavar="EPOCHS", help="save after every so many epochs; 0: after the last only")
    add("--save-most-recent", action="store_true", help="besides, write epoch_latest.pt after every epoch")
    add("--delete-previous-checkpoint", action="store_true", help="after each epoch's save remove the one before: a "
        "full run then needs the space of two")
    add("--save-every-n-steps", type=int, metavar="N", help="besides, save within the epochs, every N steps of the "
        "run, as epoch_E_step_S.pt; 0: only at their ends. SIGTERM, SIGUSR1 and Ctrl-C save in any case, then stop")
    add("--keep-last", type=int, metavar="K", help="of the saves within epochs keep the K newest")
    add("--on-save-failure", choices=ON_SAVE_FAILURE, help="when a save fails (a full disk). The checkpoints before "
        "are untouched. continue: train on and try again at the next one; stop: end the run. At the last save it is an "
        "error in any case")
    add("--sync-save", action="store_true", help="training waits while a checkpoint is written. Default: it goes on, "
        "at the cost of a copy of the checkpoint in the host's memory")
    add("--resume", metavar="FILE|latest", help="continue from a checkpoint, also within an epoch: weights, optimizer, "
        "step, position in the data, random states. latest: the newest of this run that can be read (needs --name, and "
        "starts afresh if there is none)")
    add("--remote-sync", metavar="URL", help="copy the run's folder there as it grows: s3://... or any fsspec URL")
    add("--remote-sync-frequency", type=int, metavar="SECONDS", help="between two copies")
    add("--remote-sync-protocol", choices=("s3", "fsspec"), help="s3: the `aws` command; fsspec: Python's fsspec")


def _eval(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation", "Spread over all processes.").add_argument
    add("--val-frequency", type=int, metavar="EPOCHS", help="evaluate --val-data so often and at the end; 0: never")
    add("--zeroshot-frequency", type=int, metavar="EPOCHS", help="zero-shot classification likewise; 0: never")
    add("--imagenet-val", metavar="DIR", help="ImageNet's validation images, one folder a class: zero-shot accuracy")
    add("--imagenet-v2", metavar="DIR", help="ImageNet-V2's images: the same")
    add("--zeroshot-data", metavar="DIR", help="zero-shot accuracy on any images, one folder a class")
    add("--zeroshot-classnames", metavar="FILE", help="names of --zeroshot-data's classes, one a line in the "
        "folders' sorted order, or .json: a list, or {folder: name}. Default: the folders' names, with blanks for _")
    add("--zeroshot-templates", metavar="FILE|openai|simple", help="captions made of --zeroshot-data's class names: a "
        "file with one a line, {} for the name; or OpenAI's 80 for ImageNet, or their 7 simple ones. Default: openai")


def _logging(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("logging", "LOGS/NAME/out.log has the text, results.jsonl each evaluation.")
    add = group.add_argument
    add("--report-to", metavar="NAMES", help="tensorboard, wandb, both with a comma between, or all")
    add("--log-every-n-steps", type=int, metavar="N", help="a line of the log is the mean over so many steps")
    add("--profile-steps", metavar="A:B", help="trace the steps A to B-1 of the run (from 0) on the first process into "
        "LOGS/NAME/profile: by the NPU's own profiler there (MindStudio Insight shows it), by torch.profiler elsewhere "
        "(TensorBoard, Perfetto). A few steps after the first ten are enough, and large enough")
    add("--profile-level", type=int, choices=PROFILE_LEVELS, help="how much --profile-steps traces. 0: times and "
        "memory. 1: also the shapes of the operators' inputs, on an NPU also the metrics of AI cores and collectives. "
        "2: also Python stacks, on an NPU also its runtime and AI CPU: for few steps")
    add("--log-local", action="store_true", help="one log per machine, not only the first process's")
    add("--wandb-project-name", metavar="NAME", help="wandb: the project")
    add("--wandb-notes", metavar="TEXT", help="wandb: notes to the run")
    add("--debug", action="store_true", help="log more")
    add("--copy-codebase", action="store_true", help="copy the source into the run's folder")


def _refused(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("known and refused", "Options of open_clip that this project does not have; each "
                                    "says what to use instead. --torchscript is ignored with a warning.").add_argument
    add("--horovod", action="store_true", help="use torchrun")
    add("--torchscript", action="store_true", help="has no effect: use --torchcompile")
    add("--trace", action="store_true", help="use open_clip.trace_model() on a trained model")
    add("--use-bnb-linear", metavar="NAME", help="use --precision amp_bf16")
