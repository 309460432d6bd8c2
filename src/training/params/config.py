"""Parsing of the training command's options.

`parse_args` returns a flat namespace, the form that scripts written for open_clip expect. `sections` converts it to a
`TrainConfig`: frozen dataclasses, one per component, whose fields are named like the flags and hold their defaults.
The help texts are in `training.params.flags`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from open_clip.text_groups import MAX_GROUPS
from training.params.checks import validate, without_effect, writes_nothing
from training.params.flags import build_parser


@dataclass(frozen=True)
class DataConfig:
    train_data: str | None = None
    train_data_upsampling_factors: str | None = None
    val_data: str | None = None
    train_num_samples: int | None = None
    val_num_samples: int | None = None
    dataset_type: str = "auto"
    dataset_resampled: bool = False
    csv_separator: str = "\t"
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    max_bad_fraction: float = 0.5
    imagenet_val: str | None = None
    imagenet_v2: str | None = None
    zeroshot_data: str | None = None
    workers: int = 4
    batch_size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class ModelConfig:
    model: str = "RN50"
    pretrained: str = ""
    pretrained_image: bool = False
    cache_dir: str | None = None
    precision: str | None = None  # None: the device's default (training.precision.create)
    fp32_matmul: str = "high"
    force_context_length: int | None = None
    force_image_size: int | tuple[int, int] | None = None
    force_quick_gelu: bool = False
    force_patch_dropout: float | None = None
    force_custom_text: bool = False
    lock_image: bool = False
    lock_image_unlocked_groups: int = 0
    lock_image_freeze_bn_stats: bool = False
    lock_text: bool = False
    lock_text_unlocked_layers: int = 0
    lock_text_freeze_layer_norm: bool = False
    grad_checkpointing: bool = False
    text_groups: int = MAX_GROUPS
    torchcompile: bool = False
    use_bn_sync: bool = False
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    image_interpolation: str | None = None
    image_resize_mode: str | None = None
    aug_cfg: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectiveConfig:
    siglip: bool = False
    loss_dist_impl: str | None = None
    local_loss: bool = False
    gather_with_grad: bool = False
    coca_caption_loss_weight: float = 2.0
    coca_contrastive_loss_weight: float = 1.0
    distill_model: str | None = None
    distill_pretrained: str | None = None


@dataclass(frozen=True)
class OptimConfig:
    """lr, beta1, beta2 and eps: None means the default of adamw (`get_default_params`) or of the timm optimizer."""

    opt: str = "adamw"
    lr: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    wd: float = 0.2
    momentum: float | None = None
    grad_clip_norm: float | None = None
    accum_freq: int = 1
    fused_optimizer: str = "auto"
    ema_decay: float | None = None
    max_bad_steps: int = 10


@dataclass(frozen=True)
class ScheduleConfig:
    epochs: int = 32
    epochs_cooldown: int | None = None
    warmup: int = 10000
    skip_scheduler: bool = False
    lr_scheduler: str = "cosine"
    lr_cooldown_end: float = 0.0
    lr_cooldown_power: float = 1.0


@dataclass(frozen=True)
class DistributedConfig:
    device: str = "auto"
    dist_url: str | None = None
    dist_backend: str | None = None
    dist_timeout: float = 1800.0  # seconds
    ddp_static_graph: bool = False
    no_set_device_rank: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    logs: str | None = "./logs/"  # None: nothing is written
    name: str | None = None
    save_frequency: int = 1
    save_most_recent: bool = False
    delete_previous_checkpoint: bool = False
    save_every_n_steps: int = 0
    keep_last: int = 2
    on_save_failure: str = "continue"
    sync_save: bool = False
    resume: str | None = None
    remote_sync: str | None = None
    remote_sync_frequency: int = 300  # seconds
    remote_sync_protocol: str = "s3"


@dataclass(frozen=True)
class EvalConfig:
    val_frequency: int = 1
    zeroshot_frequency: int = 2
    epochs: int = 32
    precision: str | None = None
    zeroshot_classnames: str | None = None
    zeroshot_templates: str | None = None
    batch_size: int = 64


@dataclass(frozen=True)
class LoggingConfig:
    logs: str | None = "./logs/"
    name: str | None = None
    report_to: str = ""
    wandb_notes: str = ""
    wandb_project_name: str = "open-clip"
    log_every_n_steps: int = 100
    profile_steps: str | None = None
    profile_level: int = 0
    log_local: bool = False
    debug: bool = False
    copy_codebase: bool = False


@dataclass(frozen=True)
class TrainConfig:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def default_values() -> dict[str, Any]:
    """Return the default of every option, by name."""
    return {name: value for section in asdict(TrainConfig()).values() for name, value in section.items()}


def get_default_params(model_name: str) -> dict[str, float]:
    """Return AdamW's lr, beta1, beta2 and eps for a model, from the CLIP paper (arXiv:2103.00020, table 18)."""
    is_vit = "vit" in model_name.lower()
    return {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98 if is_vit else 0.999, "eps": 1e-6 if is_vit else 1e-8}


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (None: `sys.argv[1:]`) into a flat namespace and check it with `validate`.

    Raises:
        SystemExit: with status 0 after `--help`; with status 2 and a message on stderr if an option is invalid.
    """
    parser = build_parser()
    parser.set_defaults(**default_values())
    namespace = parser.parse_args(sys.argv[1:] if args is None else list(args))
    if not namespace.opt.lower().startswith("timm/"):
        for name, value in get_default_params(namespace.model).items():
            if getattr(namespace, name) is None:
                setattr(namespace, name, value)
    try:
        validate(namespace)
    except ValueError as error:
        parser.error(str(error))
    return namespace


_Section = TypeVar("_Section")


def _section(cls: type[_Section], values: dict[str, Any]) -> _Section:
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in values.items() if name in names})


def sections(args: argparse.Namespace) -> TrainConfig:
    """Split a flat namespace into the sections of the components.

    Lists become tuples, a single image size becomes an int, and `--logs none` becomes None. Options that the namespace
    does not have get their defaults.

    Raises:
        ValueError: see `validate`.
    """
    values = default_values() | vars(args)
    validate(argparse.Namespace(**values))
    for name in ("image_mean", "image_std"):
        channels = values[name]
        if channels is not None:
            values[name] = tuple(channels) * (3 if len(channels) == 1 else 1)
    size = values["force_image_size"]
    if isinstance(size, (list, tuple)):
        values["force_image_size"] = size[0] if len(size) == 1 else tuple(size)
    values["logs"] = None if writes_nothing(values["logs"]) else values["logs"]
    values["aug_cfg"] = dict(values["aug_cfg"])
    return TrainConfig(
        data=_section(DataConfig, values),
        model=_section(ModelConfig, values),
        objective=_section(ObjectiveConfig, values),
        optim=_section(OptimConfig, values),
        schedule=_section(ScheduleConfig, values),
        distributed=_section(DistributedConfig, values),
        checkpoint=_section(CheckpointConfig, values),
        eval=_section(EvalConfig, values),
        logging=_section(LoggingConfig, values),
    )


def warnings_for(args: argparse.Namespace, world_size: int = 1) -> list[str]:
    """Return warnings about options that were given and have no effect, or a harmful one.

    `parse_args` does not log them because neither the log nor the number of processes exists yet.
    """
    return without_effect(argparse.Namespace(**(default_values() | vars(args))), default_values(), world_size)
