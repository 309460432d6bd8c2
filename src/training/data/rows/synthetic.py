"""One image and one caption, repeated: measures the speed of training without data loading."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from training.data.loader import DataInfo, tokenizes_randomly
from training.data.naflex import takes_any_shape
from training.data.rows.loader import make_row_loader
from training.params import DataConfig


class SyntheticDataset(Dataset):
    """The same black image and caption, `dataset_size` times.

    `dataset[i]` is a dict with "image", the result of `transform` for a PIL image of `image_size` (width, height), and
    "text", token ids int64 [L] if there is a tokenizer, otherwise the caption.
    """

    def __init__(
        self,
        transform: Callable[[Any], Any] | None = None,
        image_size: tuple[int, int] = (224, 224),
        caption: str = "Dummy caption",
        dataset_size: int = 100,
        tokenizer: Callable[[list[str]], Any] | None = None,
    ) -> None:
        from PIL import Image

        self.image = Image.new("RGB", image_size)
        self.transform = transform
        self.caption = caption
        self.dataset_size = dataset_size
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return self.dataset_size

    def caption_at(self, index: int) -> str:
        return self.caption

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.image if self.transform is None else self.transform(self.image)
        text = self.caption if self.tokenizer is None else self.tokenizer([self.caption])[0]
        return {"image": image, "text": text, "key": f"synthetic {index}"}


class SyntheticShapes(SyntheticDataset):
    """Black images of many aspect ratios, from 2:5 to 5:2, each of about 262,144 pixels (512 x 512)."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image

        stretch = random.Random(index).uniform(-1, 1)
        width, height = round(512 * 2.5 ** (stretch / 2)), round(512 * 2.5 ** (-stretch / 2))
        self.image = Image.new("RGB", (width, height))
        return super().__getitem__(index)


def make_synthetic_loader(
    cfg: DataConfig, preprocess: Callable[[Any], Any], is_train: bool, epoch: int = 0, tokenizer: Any = None
) -> DataInfo:
    """Return a loader of synthetic samples; see `training.data.datasets.get_synthetic_dataset`."""
    sizes = [cfg.train_num_samples if is_train else cfg.val_num_samples, cfg.train_num_samples, 100]
    kind = SyntheticShapes if takes_any_shape(preprocess) else SyntheticDataset
    dataset = kind(
        transform=preprocess,
        dataset_size=next(size for size in sizes if size is not None),
        tokenizer=tokenizer if tokenizes_randomly(tokenizer) else None,
    )
    option = "--train-num-samples" if is_train else "--val-num-samples"
    source = f"synthetic data ({option} {len(dataset)})"
    return make_row_loader(
        dataset, cfg, is_train=is_train, epoch=epoch, tokenizer=tokenizer, source=source, preprocess=preprocess
    )
