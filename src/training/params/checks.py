"""Rules between the training command's options: invalid combinations (`validate`), useless ones (`without_effect`)."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from training.params.config import SECTIONS, default_values
from training.params.naflex_checks import check_naflex, naflex_rules
from training.params.option import flag, options_of
from training.params.options import TORCH_OPTIMIZERS, DataConfig

REPORTERS = ("tensorboard", "wandb", "all")
# File names whose extension determines the type of the data.
CSV_NAME = re.compile(r"\.(csv|tsv)(\.(gz|bz2|xz|zip|zst))?$", re.IGNORECASE)
SHARD_NAME = re.compile(r"\.(tar|tar\.gz|tgz)(\s+-)?$")


def writes_nothing(logs: str | None) -> bool:
    """Return whether `--logs` is None or the word "none", so that no log and no checkpoint is written."""
    return not logs or logs.lower() == "none"


def trains(data: DataConfig | argparse.Namespace) -> bool:
    """Return whether the run has training data; otherwise it only evaluates."""
    return bool(data.train_data) or data.dataset_type == "synthetic"


def validate(args: argparse.Namespace) -> None:
    """Check a complete flat namespace.

    Raises:
        ValueError: an option is not supported, a value is out of range, or options contradict each other.
    """
    defaults = default_values()
    for section in SECTIONS:
        for name, declared in options_of(section).items():
            declared.check(flag(name) if declared.has_flag else name, getattr(args, name), defaults[name])
    _check_images(args)
    _check_sample_keys(args)
    _check_buckets(args)
    _check_names(args)
    _check_combinations(args)
    _check_compilation(args)
    check_naflex(args, trains(args))


def _check_images(args: argparse.Namespace) -> None:
    for name in ("image_mean", "image_std"):
        values = getattr(args, name)
        if values is not None and len(values) not in (1, 3):
            raise ValueError(f"{flag(name)} takes one number or three (R G B), got {len(values)}.")
    if args.image_std is not None and not all(x > 0 for x in args.image_std):
        raise ValueError(f"--image-std must be more than 0, got {args.image_std}.")
    size = args.force_image_size
    if size is not None:
        sides = size if isinstance(size, (list, tuple)) else [size]
        if len(sides) not in (1, 2) or not all(side >= 1 for side in sides):
            raise ValueError(f"--force-image-size takes one number of pixels, or height and width, got {size}.")


def _check_sample_keys(args: argparse.Namespace) -> None:
    for name in ("image_key", "text_key", "json_text_key"):
        given = getattr(args, name)
        if given is not None and not split_keys(given):
            raise ValueError(f"{flag(name)} takes names separated by ';', got {given!r}.")
    weights = args.json_text_key_probs
    if weights is None:
        return
    if args.json_text_key is None:
        raise ValueError("--json-text-key-probs needs --json-text-key, the fields that have these weights.")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError(f"--json-text-key-probs must be 0 or more and not all 0, got {_join(weights)}.")
    fields = split_keys(args.json_text_key)
    if len(weights) != len(fields):
        raise ValueError(
            f"--json-text-key-probs has {len(weights)} numbers and --json-text-key {args.json_text_key!r} has "
            f"{len(fields)} fields. Give one number per field."
        )
    if len(set(fields)) < len(fields):
        raise ValueError(f"--json-text-key {args.json_text_key!r} has a field twice. Give each weight once.")


def _check_buckets(args: argparse.Namespace) -> None:
    if not args.length_bucketing or not trains(args):
        return
    if args.bucket_runs == 1 and args.bucket_chunk > args.bucket_pool:
        raise ValueError(
            f"--bucket-chunk {args.bucket_chunk} is larger than --bucket-pool {args.bucket_pool}: runs are cut from a "
            "pool, so they would not be sorted apart. Use a smaller chunk or a larger pool."
        )
    if args.bucket_runs > args.batch_size:
        raise ValueError(
            f"--bucket-runs {args.bucket_runs} needs a sample of each run in a batch, and --batch-size is "
            f"{args.batch_size}. Use fewer runs, or a larger batch."
        )


def _join(values: Iterable[Any]) -> str:
    return " ".join(map(str, values))


def split_keys(text: str) -> tuple[str, ...]:
    """Parse names of members or fields: 'jpg;png' -> ('jpg', 'png')."""
    return tuple(word.strip() for word in text.split(";") if word.strip())


def _check_names(args: argparse.Namespace) -> None:
    name = args.name
    if name is not None and (not name.strip() or name in (".", "..") or any(c in name for c in "/\\\0")):
        raise ValueError(
            f"--name {name!r} is not a folder name: it must not be '.' or '..' or contain '/' or '\\'. "
            "Use --output-dir to choose another location."
        )
    unknown = [word for word in reporters(args.report_to) if word not in REPORTERS]
    if unknown:
        raise ValueError(f"--report-to must be one of {', '.join(REPORTERS)}, got {', '.join(map(repr, unknown))}.")
    if args.profile_steps is not None:
        step_range(args.profile_steps)
    opt = args.opt.lower()
    if opt not in TORCH_OPTIMIZERS and not (opt.startswith("timm/") and len(opt) > len("timm/")):
        raise ValueError(
            f"Unknown --opt {args.opt!r}. Use adamw, nadamw or timm/NAME (for example timm/{args.opt.strip('/')})."
        )


def step_range(text: str) -> tuple[int, int]:
    """Parse --profile-steps: '10:13' -> (10, 13), which means the steps 10, 11 and 12."""
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ValueError(f"--profile-steps takes A:B (steps A to B-1, counted from 0), such as 10:13, got {text!r}.")
    return int(first), int(end)


def reporters(report_to: str) -> list[str]:
    """Parse --report-to: 'tensorboard, wandb' -> ['tensorboard', 'wandb']."""
    return [word.strip() for word in report_to.split(",") if word.strip()]


def _check_combinations(args: argparse.Namespace) -> None:
    if args.lr_scheduler == "const-cooldown" and not args.skip_scheduler and trains(args):
        if args.epochs_cooldown is None:
            raise ValueError("--lr-scheduler const-cooldown needs --epochs-cooldown N, the length of the decay.")
        if args.epochs_cooldown > args.epochs:
            raise ValueError(f"--epochs-cooldown {args.epochs_cooldown} is more than --epochs {args.epochs}.")
    if args.lr is None and args.opt.lower().startswith("timm/") and trains(args) and not args.skip_scheduler:
        raise ValueError(f"--opt {args.opt} has no default learning rate. Set --lr.")
    if (args.beta1 is None) != (args.beta2 is None):
        raise ValueError(f"--opt {args.opt} takes its betas as a pair. Set both --beta1 and --beta2, or neither.")
    if (args.distill_model is None) != (args.distill_pretrained is None):
        raise ValueError("Distillation needs both --distill-model NAME and --distill-pretrained TAG|FILE.")
    if args.siglip and args.distill_model is not None:
        raise ValueError(
            "--siglip and --distill-model cannot be combined, because distillation uses the contrastive loss. "
            "Leave out one of them."
        )
    if args.train_data_upsampling_factors is not None:
        _check_upsampling(args)
    _check_sharding(args)
    if args.resume == "latest":
        if args.name is None:
            raise ValueError("--resume latest needs --name, the name of the run to continue.")
        if writes_nothing(args.logs):
            raise ValueError("--resume latest needs the folder of the run, but --output-dir is None.")
    if args.remote_sync is not None and writes_nothing(args.logs):
        raise ValueError("--remote-sync copies the run's folder, but there is none: --output-dir is None.")


def _check_compilation(args: argparse.Namespace) -> None:
    if not args.torchcompile:
        return
    backend, mode = args.torchcompile_backend or "inductor", args.torchcompile_mode
    if mode is not None and backend != "inductor":
        raise ValueError(
            f"--torchcompile-mode {mode} is a mode of inductor. --torchcompile-backend {backend} has none."
        )
    if mode in ("reduce-overhead", "max-autotune"):
        raise ValueError(
            f"--torchcompile-mode {mode} uses CUDA graphs, which overwrite the losses before they are logged. "
            "Use default or max-autotune-no-cudagraphs."
        )
    if args.fsdp and args.torchcompile_strategy != "blocks":
        raise ValueError(
            f"--torchcompile-strategy {args.torchcompile_strategy} would compile the gathering of weights of --fsdp. "
            "Use --torchcompile-strategy blocks."
        )
    if args.packing == "on" and args.torchcompile_strategy != "blocks":
        raise ValueError(
            f"--packing on: the number of packed tokens differs between batches, and --torchcompile-strategy "
            f"{args.torchcompile_strategy} compiles for fixed shapes. Use --packing auto, or --torchcompile-strategy "
            "blocks."
        )
    if args.torchcompile_strategy != "step" or not trains(args):
        return
    if args.accum_freq > 1:
        raise ValueError(
            f"--torchcompile-strategy step compiles one forward and backward pass, and --accum-freq {args.accum_freq} "
            "needs several. Use --torchcompile-strategy blocks, model or task."
        )
    if args.opt.lower() != "adamw" or args.fused_optimizer != "auto" or args.opt_kwargs:
        given = f"--opt {args.opt}" if args.opt.lower() != "adamw" else f"--fused-optimizer {args.fused_optimizer}"
        given = "--opt-kwargs" if args.opt_kwargs else given
        raise ValueError(
            f"--torchcompile-strategy step compiles only this project's AdamW (--opt adamw, --fused-optimizer auto), "
            f"which can skip a step on the device. Leave out {given}, or use --torchcompile-strategy task."
        )


def _check_sharding(args: argparse.Namespace) -> None:
    if args.hsdp and not args.fsdp:
        raise ValueError(f"--hsdp {args.hsdp} sets the replicas of a sharded model. Add --fsdp.")
    if not args.fsdp:
        return
    if args.precision in ("bf16", "fp16"):
        raise ValueError(
            f"--precision {args.precision} has weights of two dtypes, which --fsdp cannot gather together. Use "
            "--precision amp_bf16, which gathers them in bf16, or pure_bf16."
        )
    if args.precision == "pure_fp16":
        raise ValueError(
            "--precision pure_fp16 needs an optimizer with a float32 copy of the weights, which --fsdp does not have. "
            "Use --precision amp."
        )


def _check_upsampling(args: argparse.Namespace) -> None:
    given = args.train_data_upsampling_factors
    if not args.dataset_resampled:
        raise ValueError(
            "--train-data-upsampling-factors needs --dataset-resampled, because only sampling with replacement uses "
            "weights."
        )
    try:
        factors = [float(word) for word in given.split("::")]
    except ValueError:
        raise ValueError(f"--train-data-upsampling-factors takes numbers joined by '::', got {given!r}.") from None
    if not all(math.isfinite(factor) and factor >= 0 for factor in factors) or not any(factors):
        raise ValueError(f"--train-data-upsampling-factors must be 0 or more and not all 0, got {given!r}.")
    sources = (args.train_data or "").split("::")
    if len(factors) != len(sources):
        raise ValueError(
            f"--train-data-upsampling-factors has {len(factors)} numbers and --train-data has {len(sources)} sources. "
            "Give one number per source."
        )


def without_effect(args: argparse.Namespace, defaults: dict[str, Any], world_size: int) -> list[str]:
    """Return one sentence for each option that was given and has no effect, or a harmful one, in this combination.

    The sentences have no full stop. An option counts as given if its value differs from `defaults`. Options that depend
    on the type of the model (CoCa's weights, options of BatchNorm) are checked where the model is known.
    """

    def given(*names: str) -> list[str]:
        return [name for name in names if getattr(args, name) != defaults[name]]

    found = []
    for rules in (_data_rules, _model_rules, _objective_rules, _optim_rules, _output_rules):
        for applies, names, reason in rules(args, world_size):
            if not applies:
                found += [f"{flag(name)} has no effect: {reason}" for name in given(*names)]
    if args.torchscript:
        found.append(
            "--torchscript has no effect: the model trains in eager mode, with the same results. "
            "Use --torchcompile to compile it"
        )
    if world_size > 1 and args.local_loss and not args.gather_with_grad and not args.siglip:
        found.append(
            "--local-loss without --gather-with-grad loses the gradients of samples that serve as negatives. "
            "Add --gather-with-grad"
        )
    return found


# A rule: (whether the options have an effect, the options, why they have no effect otherwise)
Rules = Iterator[tuple[bool, tuple[str, ...], str]]


def _data_rules(args: argparse.Namespace, world_size: int) -> Rules:
    paths = [path for path in (args.train_data, args.val_data) if path]
    # A file name with a known extension overrides --dataset-type (see training.data.dataset_types).
    is_csv = [bool(CSV_NAME.search(path)) for path in paths]
    is_tar = [path.startswith("pipe:") or bool(SHARD_NAME.search(path)) for path in paths]
    reads_csv = any(is_csv) or (args.dataset_type == "csv" and not (paths and all(is_tar)))
    reads_shards = any(is_tar) or (args.dataset_type in ("webdataset", "auto") and not (paths and all(is_csv)))
    training, validating = trains(args), bool(args.val_data)
    yield reads_csv, ("csv_separator", "csv_img_key", "csv_caption_key"), "the data are not CSV"
    of_shards = ("dataset_resampled", "image_key", "text_key", "json_text_key", "json_text_key_probs")
    yield reads_shards, of_shards, "the data are not webdataset shards"
    if reads_shards:
        yield args.json_text_key is None, ("text_key",), "--json-text-key has the captions"
    buckets = ("bucket_runs", "bucket_pool", "bucket_chunk")
    yield training, ("length_bucketing",), "there is no --train-data"
    yield args.dataset_type != "synthetic", ("length_bucketing",), "synthetic captions have one length"
    yield args.length_bucketing, buckets, "there is no --length-bucketing"
    yield False, ("bucket_prefetch_pools",), "workers read the next pool while they decode one"
    if args.length_bucketing:
        yield args.bucket_runs == 1, ("bucket_chunk",), "it belongs to --bucket-runs 1"
    yield bool(paths), ("max_image_pixels",), "there is no --train-data and no --val-data"
    yield training, ("train_num_samples", "max_bad_fraction"), "there is no --train-data"
    if training:
        counted = reads_shards or args.dataset_type == "synthetic"
        yield counted, ("train_num_samples",), "the samples of CSV files and image folders are counted"
        if reads_shards and args.use_naflex and args.naflex_num_train_image_tokens is not None:
            yield False, ("train_num_samples",), "--naflex-num-train-image-tokens is the length of the epoch"
    counts = args.dataset_type == "synthetic" or (validating and reads_shards)
    yield counts, ("val_num_samples",), "it is only used for --val-data in webdataset shards and for synthetic data"
    of_validation = ("val_frequency", "val_retrieval_chunk_size", "val_retrieval_precision")
    yield validating, of_validation, "there is no --val-data"
    yield args.val_frequency > 0, ("val_data",), "--val-frequency is 0"
    classified = bool(args.imagenet_val or args.imagenet_v2 or args.zeroshot_data)
    yield classified, ("zeroshot_frequency",), "there is no --imagenet-val, --imagenet-v2 or --zeroshot-data"
    yield args.zeroshot_frequency > 0, ("imagenet_val", "imagenet_v2", "zeroshot_data"), "--zeroshot-frequency is 0"
    yield bool(args.zeroshot_data), ("zeroshot_classnames", "zeroshot_templates"), "there is no --zeroshot-data"


def _model_rules(args: argparse.Namespace, world_size: int) -> Rules:
    yield from naflex_rules(args, trains(args))
    yield args.lock_image, ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats"), "there is no --lock-image"
    yield args.lock_text, ("lock_text_unlocked_layers", "lock_text_freeze_layer_norm"), "there is no --lock-text"
    resumes_file = args.resume not in (None, "latest")
    yield not resumes_file, ("pretrained",), "--resume replaces the weights"
    training = trains(args)
    yield training, ("grad_checkpointing", "text_groups", "force_patch_dropout", "aug_cfg"), "there is no --train-data"
    yield world_size > 1, ("use_bn_sync",), "there is one process"
    compiling = ("torchcompile_strategy", "torchcompile_backend", "torchcompile_mode")
    yield args.torchcompile, compiling, "there is no --torchcompile"
    if args.torchcompile and args.torchcompile_strategy != "blocks":
        yield (
            False,
            ("text_groups",),
            f"--torchcompile-strategy {args.torchcompile_strategy} keeps the padding of texts",
        )


def _objective_rules(args: argparse.Namespace, world_size: int) -> Rules:
    alone = "there is one process"
    yield world_size > 1, ("local_loss", "gather_with_grad"), alone
    if world_size > 1:
        yield not args.siglip, ("local_loss", "gather_with_grad"), "--siglip exchanges features by --loss-dist-impl"
    yield args.siglip, ("loss_dist_impl",), "it belongs to --siglip"
    if args.siglip:
        yield world_size > 1, ("loss_dist_impl",), alone
    sharding = ("fsdp_no_reshard_after_forward", "fsdp_offload_cpu", "fsdp_checkpoint")
    yield world_size > 1, ("fsdp", *sharding, "hsdp"), alone
    if world_size > 1:
        yield args.fsdp, sharding, "there is no --fsdp"
        yield not args.fsdp, ("ddp_static_graph",), "--fsdp does not use DistributedDataParallel"
    yield world_size > 1, ("dist_url", "dist_backend", "dist_timeout", "ddp_static_graph", "no_set_device_rank"), alone


def _optim_rules(args: argparse.Namespace, world_size: int) -> Rules:
    adamw, timm = args.opt.lower() == "adamw", args.opt.lower().startswith("timm/")
    yield timm, ("momentum",), f"{args.opt} uses --beta1 and --beta2"
    yield args.text_layer_decay is not None, ("text_pooler_in_head",), "there is no --text-layer-decay"
    yield adamw, ("fused_optimizer",), "it belongs to --opt adamw"
    if args.skip_scheduler:
        schedule = ("lr_scheduler", "warmup", "epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power")
        yield False, schedule, "--skip-scheduler keeps the learning rate constant"
    else:
        cools = args.lr_scheduler == "const-cooldown"
        cooldown = ("epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power")
        yield cools, cooldown, "it belongs to --lr-scheduler const-cooldown"
    groups = ("wd_exclude_patterns", "decay_rule", "image_layer_decay", "text_layer_decay")
    yield trains(args), (*groups, "opt_kwargs", "opt_fallback_list"), "there is no --train-data"
    update = ("opt", "lr_scheduler", "warmup", "accum_freq", "grad_clip_norm", "fused_optimizer", "max_bad_steps")
    yield trains(args), (*update, "profile_steps"), "there is no --train-data"


def _output_rules(args: argparse.Namespace, world_size: int) -> Rules:
    writes = not writes_nothing(args.logs)
    saving = ("save_frequency", "save_most_recent", "delete_previous_checkpoint", "copy_codebase", "profile_steps")
    yield writes, (*saving, "save_every_n_steps", "on_save_failure", "sync_save"), "--output-dir is None"
    yield args.profile_steps is not None, ("profile_level",), "there is no --profile-steps"
    if writes and args.save_frequency == 0:
        yield False, ("delete_previous_checkpoint",), "--save-frequency 0 saves only once, after the last epoch"
    yield args.save_every_n_steps > 0, ("keep_last",), "there is no --save-every-n-steps"
    to_wandb = bool({"wandb", "all"} & set(reporters(args.report_to)))
    yield writes or to_wandb, ("report_to",), "--output-dir is None"
    yield trains(args), ("log_metric_every_n_steps", "train_loss_ema_samples"), "there is no --train-data"
    if trains(args):
        yield bool(reporters(args.report_to)), ("log_metric_every_n_steps",), "there is no --report-to"
    yield to_wandb, ("wandb_notes", "wandb_project_name"), "--report-to has no wandb"
    yield args.remote_sync is not None, ("remote_sync_frequency", "remote_sync_protocol"), "there is no --remote-sync"
    yield world_size > 1, ("log_local",), "there is one process"
