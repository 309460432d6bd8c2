"""Makes the loader of one data set, by the type of the data.

The functions have the names and parameters of open_clip_train. Options are a `params.DataConfig`; the flat namespace of
a script written for open_clip_train is converted, and its batches have open_clip_train's form (`namespace`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from training.data.dataset_types import dataset_type_of
from training.data.loader import DataInfo
from training.data.namespace import (
    CSV,
    FOLDER,
    LABELLED,
    SHARDS,
    SYNTHETIC,
    NamespaceConfig,
    takes_namespace,
)
from training.data.rows.csv_file import make_csv_loader
from training.data.rows.image_folder import make_captioned_loader, make_imagenet_loader, make_labelled_loader
from training.data.rows.synthetic import make_synthetic_loader
from training.data.shards.dataset import make_shard_loader
from training.params import DataConfig


@takes_namespace(SHARDS)
def get_wds_dataset(
    args: DataConfig,
    preprocess_img: Callable[[Any], Any],
    is_train: bool,
    epoch: int = 0,
    floor: bool = False,
    tokenizer: Any = None,
) -> DataInfo:
    """Return the loader of webdataset shards, `args.train_data` or `args.val_data`.

    In training, an epoch has --train-num-samples samples (by default the number in sizes.json or `__len__`), rounded to
    the same number of full batches for every worker of every rank. In evaluation, every sample is read once.

    Args:
        args: the options, or a flat namespace.
        preprocess_img: PIL image -> tensor.
        is_train: whether the loader is for training.
        epoch: the first epoch.
        floor: round the number of samples down instead of up.
        tokenizer: list of captions -> int64 [B, L]; None keeps the captions.

    Raises:
        FileNotFoundError: all shards are local files, and none of them exists.
        ValueError: there are no shards, their number of samples is unknown in training, or less than a batch.
    """
    return make_shard_loader(args, preprocess_img, is_train, epoch, floor, tokenizer)


@takes_namespace(CSV)
def get_csv_dataset(
    args: DataConfig, preprocess_fn: Callable[[Any], Any], is_train: bool, epoch: int = 0, tokenizer: Any = None
) -> DataInfo:
    """Return the loader of a CSV file, `args.train_data` or `args.val_data`.

    Args:
        args: the options, or a flat namespace.
        preprocess_fn: PIL image -> tensor.
        is_train: whether the loader is for training.
        epoch: the first epoch.
        tokenizer: list of captions -> int64 [B, L]; None keeps the captions.
    """
    return make_csv_loader(args, preprocess_fn, is_train, epoch, tokenizer)


@takes_namespace(SYNTHETIC)
def get_synthetic_dataset(
    args: DataConfig, preprocess_fn: Callable[[Any], Any], is_train: bool, epoch: int = 0, tokenizer: Any = None
) -> DataInfo:
    """Return a loader of synthetic samples. For the arguments see `get_csv_dataset`.

    In training there are `args.train_num_samples` samples, 100 by default. In evaluation there are
    `args.val_num_samples`, by default as many as in training.
    """
    return make_synthetic_loader(args, preprocess_fn, is_train, epoch, tokenizer)


@takes_namespace(FOLDER)
def get_imagefolder_dataset(
    args: DataConfig, preprocess_fn: Callable[[Any], Any], is_train: bool, epoch: int = 0, tokenizer: Any = None
) -> DataInfo:
    """Return the loader of a folder of classes, whose captions are "a photo of a CLASS."; see `get_csv_dataset`."""
    return make_captioned_loader(args, preprocess_fn, is_train, epoch, tokenizer)


@takes_namespace(LABELLED)
def get_labelled_folder(
    args: DataConfig, preprocess_fn: Callable[[Any], Any], root: str | os.PathLike[str], numbered: bool = False
) -> DataInfo:
    """Return an evaluation loader of {"image", "label"} for a folder of classes, named in `dataloader.classes`.

    With `numbered`, class folders are named by their labels, as in ImageNet-V2.
    """
    return make_labelled_loader(args, preprocess_fn, root, numbered)


@takes_namespace(LABELLED)
def get_imagenet(args: DataConfig, preprocess_fns: Sequence[Callable[[Any], Any]], split: str) -> DataInfo:
    """Return the loader of a labeled split of ImageNet, for evaluation.

    Args:
        args: the options, or a flat namespace, with the folder as imagenet_val, imagenet_v2 or (namespace only)
            imagenet_train. The folder of "train" and "val" has one folder per class. That of "v2" is the folder in
            ImageNet-V2's archive, or its parent.
        preprocess_fns: (train, val), PIL image -> tensor.
        split: "val" and "v2" give all images in order, "train" at most 50 random images of each class, shuffled.
    """
    roots = {"val": args.imagenet_val, "v2": args.imagenet_v2, "train": None}
    if isinstance(args, NamespaceConfig):
        roots["train"] = args.imagenet_train
    if split not in roots:
        raise ValueError(f"No ImageNet split {split!r}: there are 'train', 'val' and 'v2'.")
    return make_imagenet_loader(args, preprocess_fns, split, roots[split])


_DATASETS: dict[str, Callable[..., DataInfo]] = {
    "webdataset": get_wds_dataset,
    "csv": get_csv_dataset,
    "imagefolder": get_imagefolder_dataset,
    "synthetic": get_synthetic_dataset,
}


def get_dataset_fn(data_path: str | None, dataset_type: str) -> Callable[..., DataInfo]:
    """Return the function that makes a loader of `dataset_type`; "auto" infers it from the path, see `dataset_type_of`.

    Raises:
        ValueError: the type is unknown, or is "auto" and cannot be inferred from the path.
    """
    return _DATASETS[dataset_type if dataset_type in _DATASETS else dataset_type_of(data_path, dataset_type)]
