"""Training and evaluation data: `get_data` makes the loaders that the options ask for.

Batches are dicts: {"image": float or uint8 [B, 3, H, W], "text": int64 [B, L]} for image-text pairs, and {"image",
"label": int64 [B]} for labeled images. With `variable_text`, L is the length of the longest caption, and the batch has
"text_valid", bool [B, L]. Both have "key", B strings that name the samples (an image's path, SHARD/KEY).
Scripts that pass a flat namespace get `[images, texts]` instead, see `training.data.namespace`. Order and augmentation
are functions of (seed, epoch, sample), see `training.data.sampling`. The read position is saved in checkpoints, see
`training.data.position`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from open_clip.transform.naflex import NaFlexTransform
from training.batches import normalization_of
from training.data.dataset_types import dataset_type_of
from training.data.datasets import (
    get_csv_dataset,
    get_dataset_fn,
    get_imagefolder_dataset,
    get_imagenet,
    get_labelled_folder,
    get_synthetic_dataset,
    get_wds_dataset,
)
from training.data.loader import DataInfo
from training.data.naflex import plan_script_transforms, planned
from training.data.naflex_plan import batch_size_of
from training.data.namespace import from_namespace
from training.data.rows.image_folder import ImageFolder
from training.data.sampling import SharedEpoch
from training.data.shards.lists import expand_urls, get_dataset_size
from training.data.shards.samples import filter_no_caption_or_no_image, group_by_keys_nothrow
from training.data.skips import BadSample, SkipCounter, SkipReport, TooManyBadSamples, report_skips
from training.data.variable_text import collate_variable_text
from training.params import DataConfig
from training.signals import Agreement

# Names of open_clip_train.data that only scripts use. They are imported on first use.
_STAGES = (
    "CsvDataset",
    "ResampledShards2",
    "SyntheticDataset",
    "count_samples",
    "detshuffle2",
    "log_and_continue",
    "pytorch_worker_seed",
    "tarfile_to_samples_nothrow",
)

__all__ = [
    "BadSample",
    "DataInfo",
    "ImageFolder",
    "SharedEpoch",
    "SkipCounter",
    "SkipReport",
    "TooManyBadSamples",
    "collate_variable_text",
    "dataset_type_of",
    "expand_urls",
    "filter_no_caption_or_no_image",
    "get_csv_dataset",
    "get_data",
    "get_dataset_fn",
    "get_dataset_size",
    "get_imagefolder_dataset",
    "get_imagenet",
    "get_labelled_folder",
    "get_synthetic_dataset",
    "get_wds_dataset",
    "group_by_keys_nothrow",
    "report_skips",
    *_STAGES,
]


def __getattr__(name: str) -> Any:
    if name not in _STAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("training.data.open_clip_stages"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def get_data(
    args: Any,
    preprocess_fns: Sequence[Callable[[Any], Any]],
    epoch: int = 0,
    tokenizer: Callable[[list[str]], Any] | None = None,
    agreement: Agreement | None = None,
) -> dict[str, DataInfo]:
    """Return the configured loaders, under "train", "val", "imagenet-val", "imagenet-v2" and "zeroshot".

    Args:
        args: params.DataConfig, or the flat namespace of a script written for open_clip_train. With a namespace,
            batches and the calls of `tokenizer` are those of open_clip_train, see `training.data.namespace`.
        preprocess_fns: (train, val), PIL image -> tensor. With those of `training.batches.to_pixels`, images are uint8,
            and `training.batches.to_device` applies `dataloader.normalization` on the device.
        epoch: the first epoch.
        tokenizer: list of captions -> int64 [B, L]; None keeps the captions.
        agreement: makes the ranks stop before the same batch of training data; None: no signal stops them.
    """
    if isinstance(args, DataConfig):
        options = args
    else:
        options = from_namespace(args)
        preprocess_fns = plan_script_transforms(args, options, preprocess_fns)
    preprocess_train, preprocess_val = preprocess_fns
    data: dict[str, DataInfo] = {}
    is_synthetic = options.dataset_type == "synthetic"
    if options.train_data or is_synthetic:
        train_type = "synthetic" if is_synthetic else dataset_type_of(options.train_data, options.dataset_type)
        make = get_dataset_fn(options.train_data, train_type)
        data["train"] = make(args, preprocess_train, is_train=True, epoch=epoch, tokenizer=tokenizer)
        if agreement is not None:
            data["train"].dataloader.agreement = agreement
    if options.val_data:
        make = get_dataset_fn(options.val_data, dataset_type_of(options.val_data, options.dataset_type))
        val_args = _with_eval_batch_size(args, 1, preprocess_train)
        data["val"] = make(val_args, preprocess_val, is_train=False, tokenizer=tokenizer)
    larger = _with_eval_batch_size(args, 2, preprocess_train)  # without gradients, fewer activations are kept
    if options.imagenet_val:
        data["imagenet-val"] = get_imagenet(larger, preprocess_fns, "val")
    if options.imagenet_v2:
        data["imagenet-v2"] = get_imagenet(larger, preprocess_fns, "v2")
    if options.zeroshot_data:
        data["zeroshot"] = get_labelled_folder(larger, preprocess_val, options.zeroshot_data)
    for name, info in data.items():
        preprocess = preprocess_train if name == "train" else preprocess_val
        info.dataloader.normalization = normalization_of(preprocess)
        if isinstance(preprocess, NaFlexTransform):  # all batches have one shape
            vars(info.dataloader.collate_fn)["patch_length"] = preprocess.max_seq_len
    return data


def _with_eval_batch_size(args: Any, factor: int, preprocess_train: Any) -> Any:
    """Return the options with the batch size of evaluations, by default `factor` times that of training.

    With --use-naflex, "that of training" is at most that of a micro-batch of the length of evaluation. Scripts that
    pass a flat namespace get batches of `args.batch_size`, as from open_clip_train.
    """
    if not isinstance(args, DataConfig):
        return args
    batch_size, transform = args.batch_size, planned(preprocess_train)
    if transform is not None:
        batch_size = min(batch_size, batch_size_of(transform.cfg.max_tokens_per_batch, transform.cfg.eval_seq_len))
    return dataclasses.replace(args, batch_size=args.eval_batch_size or factor * batch_size)
