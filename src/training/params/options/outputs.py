"""Options of checkpoints, evaluation and logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from training.params.option import option


# fmt: off
# Each option is followed by its help text.
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
    fsdp_checkpoint: str = option("full", choices=("full", "sharded"), help=
        "the form of checkpoints with --fsdp. full: one file epoch_N.pt, as without --fsdp; the first process needs "
        "host memory for all of it. sharded: a folder epoch_N to which each process writes its part; "
        "`python -m training.consolidate` makes one file of it. Runs resume from both forms, with any number of "
        "processes")
    resume: str | None = option(None, metavar="FILE|FOLDER|latest", help=
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
    val_retrieval_chunk_size: int = option(8192, at_least=1, metavar="N", help=
        "candidates per block of similarities in the retrieval metrics of --val-data: more take more memory. The "
        "metrics do not depend on it, and the whole matrix is never kept")
    val_retrieval_precision: str = option("fp32", choices=("fp32", "model"), help=
        "dtype of the similarities in the retrieval metrics. model: that of --precision's computation, which is faster "
        "for hundreds of thousands of pairs, but makes similar candidates equal")
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
    log_metric_every_n_steps: int | None = option(None, at_least=1, metavar="N", help=
        "steps per point in TensorBoard and wandb, which shows their mean. The host waits for the device at each "
        "point. Default: that of --log-every-n-steps")
    train_loss_ema_samples: int | None = option(None, at_least=1, metavar="N", help=
        "in the log lines, show after each loss its moving average, in which a loss from n samples ago has the weight "
        "exp(-n/N). It continues over epochs and in resumed runs. Default: the average of the epoch")
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
# fmt: on
