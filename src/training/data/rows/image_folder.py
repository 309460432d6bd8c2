"""Folders with one folder per class (ROOT/CLASS/.../IMAGE), for zero-shot evaluation and for training with captions."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from open_clip import progress
from training.data.images import load_image
from training.data.loader import DataInfo, tokenizes_randomly
from training.data.messages import quote, shorten
from training.data.rows.loader import make_row_loader
from training.data.rows.string_table import StringTable
from training.params import DataConfig

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
CAPTION = "a photo of a {}."

_IMAGENET_TRAIN_IMAGES = 50  # per class
_MAX_DIGITS = 6  # of a class folder's number, because the list of classes is as long as the largest number
# The folders that the archives of ImageNet-V2 (https://imagenetv2.org) contain.
_IMAGENET_V2_FOLDERS = ("ImageNetV2-matched-frequency", "imagenetv2-matched-frequency-format-val")


class ImageFolder(Dataset):
    """Images in one folder per class. The labels are the positions of the class folders in sorted order.

    Classes, order and labels are those of torchvision's ImageFolder, but an empty class folder keeps its label (with a
    warning), and paths are stored compactly. `dataset[i]` is {"image": transformed, "label": int, "key": path}, or with
    `caption` {"image", "text", "key"}. "text" is int64 [L] if there is a tokenizer, otherwise str.

    Args:
        root: the folder.
        transform: PIL image -> tensor.
        caption: template for the class name, such as "a photo of a {}.".
        tokenizer: list of captions -> int64 [B, L].
        numbered: whether class folders are named by their labels, as in ImageNet-V2.
        max_image_pixels: see `training.data.images.load_image`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no class folders or no images, or with `numbered` a name is not a number.
        BadSample: from `dataset[i]`, the image cannot be used.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        *,
        caption: str | None = None,
        tokenizer: Callable[[list[str]], Any] | None = None,
        numbered: bool = False,
        max_image_pixels: int | None = None,
    ) -> None:
        self.root = Path(root)
        self.transform = transform
        self.caption = caption
        self.tokenizer = tokenizer
        self.max_image_pixels = max_image_pixels
        self.classes = _class_names(self.root, numbered)
        per_class = []
        with progress.Task(f"Listing the images in {self.root}", len(self.classes), "classes") as task:
            for name in self.classes:
                per_class.append(_list_images(self.root / name))
                task.advance()
        self.paths = StringTable(path for paths in per_class for path in paths)
        counts = torch.tensor([len(paths) for paths in per_class])
        self.labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
        if not len(self.paths):
            endings = ", ".join(EXTENSIONS)
            raise ValueError(f"{shorten(self.root)}: no images in its class folders. Images end in {endings}.")
        if not counts.all():
            empty = [name for name, paths in zip(self.classes, per_class, strict=True) if not paths]
            logger.warning(
                "%s: %d class folders have no images, first %s.", shorten(self.root), len(empty), quote(empty[0])
            )

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.classes)}

    @property
    def targets(self) -> list[int]:
        return self.labels.tolist()

    @property
    def samples(self) -> list[tuple[str, int]]:
        return list(zip(self.paths, self.targets, strict=True))

    imgs = samples

    def __len__(self) -> int:
        return len(self.labels)

    def caption_at(self, index: int) -> str:
        """Return the caption of an image, made from the name of its class."""
        assert self.caption is not None
        return self.caption.format(self.classes[int(self.labels[index])].replace("_", " "))

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        label = int(self.labels[index])
        image = load_image(path, self.transform, path, self.max_image_pixels)
        if self.caption is None:
            return {"image": image, "label": label, "key": path}
        text = self.caption_at(index)
        text = text if self.tokenizer is None else self.tokenizer([text])[0]
        return {"image": image, "text": text, "key": path}


def _class_names(root: Path, numbered: bool) -> list[str]:
    if not root.is_dir():
        raise FileNotFoundError(f"{shorten(root)}: no such folder (looked for {shorten(root.absolute())}).")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not names:
        raise ValueError(f"{shorten(root)} has no folders: it needs one for each class, with the images inside.")
    if not numbered:
        if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
            logger.warning(
                "%s: class folders are sorted as text, so the labels 0, 1, 2, ... are the folders %s, ...",
                shorten(root), ", ".join(map(shorten, names[:3])),
            )  # fmt: skip
        return names
    if not all(name.isdecimal() for name in names):
        raise ValueError(f"{shorten(root)}: class folders must be named 0, 1, 2, ..., and one is {quote(names[-1])}.")
    if max(map(len, names)) > _MAX_DIGITS:
        raise ValueError(f"{shorten(root)}: {quote(max(names, key=len))} is too large for the number of a class.")
    by_label = {int(name): name for name in names}
    return [by_label.get(label, str(label)) for label in range(max(by_label) + 1)]


def _list_images(folder: Path) -> list[str]:
    return [
        os.path.join(parent, name)
        for parent, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(EXTENSIONS)
    ]


def make_captioned_loader(
    cfg: DataConfig, preprocess: Callable[[Any], Any], is_train: bool, epoch: int = 0, tokenizer: Any = None
) -> DataInfo:
    """Return the loader of images with captions; see `training.data.datasets.get_imagefolder_dataset`."""
    root = cfg.train_data if is_train else cfg.val_data
    if not root:
        raise ValueError(f"No folder: {'--train-data' if is_train else '--val-data'} is not given.")
    tokenizer_per_sample = tokenizer if tokenizes_randomly(tokenizer) else None
    dataset = ImageFolder(
        root, preprocess, caption=CAPTION, tokenizer=tokenizer_per_sample, max_image_pixels=cfg.max_image_pixels
    )
    return make_row_loader(
        dataset,
        cfg,
        is_train=is_train,
        epoch=epoch,
        tokenizer=tokenizer,
        source=shorten(root),
        classes=dataset.classes,
        preprocess=preprocess,
    )


def make_labelled_loader(
    cfg: DataConfig, preprocess: Callable[[Any], Any], root: str | os.PathLike[str], numbered: bool = False
) -> DataInfo:
    """Return an evaluation loader of images with labels; see `training.data.datasets.get_labelled_folder`."""
    dataset = ImageFolder(root, preprocess, numbered=numbered)
    return make_row_loader(dataset, cfg, is_train=False, source=shorten(root), classes=dataset.classes)


def make_imagenet_loader(
    cfg: DataConfig, preprocess_fns: Sequence[Callable[[Any], Any]], split: str, root: str | None
) -> DataInfo:
    """Return the loader of the folder `root` of an ImageNet split; see `training.data.datasets.get_imagenet`."""
    if not root:
        raise ValueError(f"The folder of ImageNet's {split} split is not given. Set imagenet_{split}.")
    if split == "v2":
        inside = [Path(root, name) for name in _IMAGENET_V2_FOLDERS if Path(root, name).is_dir()]
        return make_labelled_loader(cfg, preprocess_fns[1], inside[0] if inside else root, numbered=True)
    if split == "val":
        return make_labelled_loader(cfg, preprocess_fns[1], root)
    folder = ImageFolder(root, preprocess_fns[0])
    subset = Subset(folder, _choose_per_class(folder.labels, _IMAGENET_TRAIN_IMAGES, cfg.seed))
    return make_row_loader(subset, cfg, is_train=False, source=shorten(root), classes=folder.classes)


def _choose_per_class(labels: torch.Tensor, count: int, seed: int) -> list[int]:
    """Return the indices of at most `count` images of each class, in random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    seen: Counter[int] = Counter()
    chosen = []
    for index in order.tolist():
        label = int(labels[index])
        seen[label] += 1
        if seen[label] <= count:
            chosen.append(index)
    return chosen
