"""NaFlex transforms: an image of any size becomes a sequence of patches, and keeps its aspect ratio.

NaFlex is described in SigLIP 2 (arXiv:2502.14786, section 2.4) and NaViT (arXiv:2307.06304). The sizes and the crops
are those of timm's NaFlex transforms: with the same state of Python's `random`, the crops are equal.

A sample is {"patches": [N, P*P*3], "patch_coord": int64 [N, 2], "patch_valid": bool [N]}, with N <= max_seq_len. The
values of a patch are in the order row, column, channel. A coordinate is (row, column) in the grid of patches.
"""

from __future__ import annotations

import copy
import functools
import math
import numbers
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from ..utils import expect
from .pillow_memory import view_pixels
from .pipeline import (
    INTERPOLATIONS,
    AugmentationCfg,
    PreprocessCfg,
    color_jitter,
    gray_scale,
    to_augmentation_cfg,
    to_channels,
)
from .pixels import MaybeConvertMode, to_pil, to_resizable
from .resize import resize_to_pixels, smallest_size_of_crop, to_pair

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_PATCH_SIZE = 16
DEFAULT_MAX_SEQ_LEN = 1024
_DEFAULT_RATIO = (3 / 4, 4 / 3)  # timm's
_PRECISION = 1e-5  # of the search for the scale of an image
_LARGEST_SCALE = 100.0
_CROP_ATTEMPTS = 10

Sample = dict[str, Tensor]
_to_rgb = MaybeConvertMode()


@functools.lru_cache(maxsize=4096)
def patch_grid(height: int, width: int, patch_size: tuple[int, int], max_seq_len: int) -> tuple[int, int]:
    """Return the (rows, columns) of patches to which an image is resized.

    The image is scaled as far as `max_seq_len` patches allow, at most 100 times, and its sides are rounded up to whole
    patches. This is the bisection of timm's `get_image_size_for_seq`, step by step, because its limits decide the grid
    of some images.
    """

    def grid_of(scale: float) -> tuple[int, int]:
        rows, columns = math.ceil(height * scale / patch_size[0]), math.ceil(width * scale / patch_size[1])
        return max(rows, 1), max(columns, 1)

    low, high = _PRECISION / 10, _LARGEST_SCALE
    while high - low >= _PRECISION:
        middle = (low + high) / 2
        if math.prod(grid_of(middle)) <= max_seq_len:
            low = middle
        else:
            high = middle
    grid = grid_of(low)
    return grid if math.prod(grid) <= max_seq_len else (1, 1)  # a side of more than 10 million pixels


def collate_patches(
    samples: Sequence[Mapping[str, Tensor]],
    max_seq_len: int | None = None,
    pad_multiple: int | None = None,
    stack: Callable[[tuple[Tensor, ...]], Tensor] = torch.stack,
) -> Sample:
    """Join the samples of a batch. Shorter ones are padded with zeros that are not valid.

    Args:
        samples: dicts with "patches" [N, ...], "patch_coord" [N, 2] and "patch_valid" [N]. N differs by sample.
        max_seq_len: pad to this length. By default, to the longest sample.
        pad_multiple: round the length of the longest sample up to a multiple, but not above `max_seq_len`.
        stack: joins tensors of equal shape.

    Returns:
        {"patches": [batch, length, ...], "patch_coord": int64 [batch, length, 2], "patch_valid": bool [batch, length]}.

    Raises:
        ValueError: there are no samples, a sample has more than `max_seq_len` patches, or the samples do not come from
            NaFlex transforms with one patch size.
    """
    if not samples:
        raise ValueError("collate_patches got no samples. Pass at least one.")
    _check_samples(samples)
    longest = max(len(sample["patches"]) for sample in samples)
    if max_seq_len and longest > max_seq_len:
        raise ValueError(
            f"A sample has {longest} patches, more than max_seq_len={max_seq_len}. Use a transform with this length, "
            "or a larger max_seq_len."
        )
    length = max_seq_len or longest
    if pad_multiple:
        rounded = -(-longest // pad_multiple) * pad_multiple
        length = min(rounded, max_seq_len or rounded)
    keys = ("patches", "patch_coord", "patch_valid")
    return {key: stack(tuple(_pad(sample[key], length) for sample in samples)) for key in keys}


def _check_samples(samples: Sequence[Mapping[str, Tensor]]) -> None:
    for sample in samples:
        if not isinstance(sample, Mapping):
            raise ValueError(
                f"collate_patches takes the dicts that NaFlex transforms return, and got a {type(sample).__name__}. "
                'Create the transforms with create_model_and_transforms(..., aug_cfg={"naflex": True}).'
            )
    shapes = [list(shape) for shape in dict.fromkeys(sample["patches"].shape[1:] for sample in samples)]
    if len(shapes) > 1:
        raise ValueError(
            f"Samples have patches of the shapes {shapes[0]} and {shapes[1]}. Use one patch_size for all samples of a "
            "batch."
        )


def _pad(values: Tensor, length: int) -> Tensor:
    if len(values) == length:
        return values
    padded = values.new_zeros(length, *values.shape[1:])
    padded[: len(values)] = values
    return padded


@dataclass(frozen=True)
class _Augmentation:
    """Random crops, and the steps that follow: on the resized image, and on the normalized tensor [3, H, W]."""

    scale: tuple[float, float]
    ratio: tuple[float, float]
    on_image: tuple[Callable[[Any], Any], ...] = ()
    on_tensor: tuple[Callable[[Tensor], Tensor], ...] = ()

    def draw_crop(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Draw (left, top, right, bottom) as timm's RandomResizedCropToSequence does. Ratios multiply the image's."""
        area, aspect = height * width, width / height
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_CROP_ATTEMPTS):
            crop_area = area * random.uniform(*self.scale)
            crop_aspect = aspect * math.exp(random.uniform(*log_ratio))
            crop_height = round(math.sqrt(crop_area / crop_aspect))
            crop_width = round(math.sqrt(crop_area * crop_aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = random.randint(0, height - crop_height)
                left = random.randint(0, width - crop_width)
                return left, top, left + crop_width, top + crop_height
        # No crop fits: the largest central one whose ratio is allowed.
        crop_width, crop_height = width, height
        if self.ratio[0] > 1:
            crop_height = max(min(round(width / (aspect * self.ratio[0])), height), 1)
        elif self.ratio[1] < 1:
            crop_width = max(min(round(height * aspect * self.ratio[1]), width), 1)
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        return left, top, left + crop_width, top + crop_height


class NaFlexTransform:
    """Convert an image to at most `max_seq_len` patches. Made by a factory.

    Attributes:
        max_seq_len: the largest number of patches.
        patch_size: (height, width) of a patch.
        mean, std: per channel, for values from 0 to 1.
        interpolation: "bicubic", "bilinear", or "random": one of the two for each image.
        normalizes: whether patches are normalized floats; otherwise they are uint8.
        flatten: whether a patch is a vector [P*P*3]; otherwise it is [P, P, 3].
        fast_decode: decode large JPEG files at a reduced size, see `preprocess.Preprocess`.
    """

    def __init__(
        self, factory: NaFlexTransformFactory, max_seq_len: int, patch_size: tuple[int, int], is_train: bool
    ) -> None:
        self.max_seq_len = max_seq_len
        self.patch_size = patch_size
        self.mean, self.std = factory.mean, factory.std
        self.interpolation = factory.interpolation
        self.normalizes = factory.normalizes
        self.flatten = factory.flatten
        self.fast_decode = factory.fast_decode
        self._augmentation = factory.augmentation if is_train else None

    def __call__(self, image: Any) -> Sample:
        """Convert a PIL image, an array (see `preprocess.Preprocess`) or a float tensor [3, H, W].

        Raises:
            TypeError: `image` is something else.
            ValueError: it is a tensor of another shape or dtype.
        """
        if isinstance(image, Tensor):
            _check_tensor(image)
            return self._patches_of_tensor(image)
        pixels, grid = self._resize(image)
        if self._augmentation is not None and self._augmentation.on_tensor:
            normalized = self._normalize(torch.from_numpy(np.array(pixels))).permute(2, 0, 1).contiguous()
            for step in self._augmentation.on_tensor:
                normalized = step(normalized)
            return self._sample(_cut(normalized.permute(1, 2, 0), grid, self.patch_size), grid)
        patches = torch.from_numpy(np.ascontiguousarray(_cut(pixels, grid, self.patch_size)))
        return self._sample(self._normalize(patches) if self.normalizes else patches, grid)

    @property
    def normalization(self) -> tuple[list[float], list[float]] | None:
        """(mean, std) that the device must apply, because patches are uint8."""
        return None if self.normalizes else (list(self.mean), list(self.std))

    def without_normalization(self) -> NaFlexTransform | None:
        """Return the transform to uint8 patches, or None if it has steps after the normalization."""
        if self._augmentation is not None and self._augmentation.on_tensor:
            return None
        changed = copy.copy(self)
        changed.normalizes = False
        return changed

    def _resize(self, image: Any) -> tuple[np.ndarray, tuple[int, int]]:
        """Return uint8 [H, W, 3], which must not be changed, and the grid of its patches."""
        from .preprocess import to_image

        opened = to_resizable(to_image(image))
        grid = patch_grid(opened.height, opened.width, self.patch_size, self.max_seq_len)
        is_reduced = self.fast_decode and self._reduce(opened, grid)
        rgb: Any = _to_rgb(opened)
        crop = None
        if self._augmentation is not None:
            crop = self._augmentation.draw_crop(rgb.width, rgb.height)
            grid = patch_grid(crop[3] - crop[1], crop[2] - crop[0], self.patch_size, self.max_seq_len)
        resized: Any = resize_to_pixels(
            rgb, self._size_of(grid), self._draw_interpolation(), not is_reduced, crop, is_temporary=not self.normalizes
        )
        for step in () if self._augmentation is None else self._augmentation.on_image:
            resized = step(to_pil(resized))
        if isinstance(resized, Tensor):
            return resized.permute(1, 2, 0).numpy(), grid
        return view_pixels(resized)[..., :3], grid

    def _reduce(self, image: Image, grid: tuple[int, int]) -> bool:
        """Let the decoder reduce an image, and return whether it does."""
        size, target = image.size, self._size_of(grid)
        scale, ratio = None, (1.0, 1.0)
        if self._augmentation is not None:
            aspect = image.width / image.height
            scale = self._augmentation.scale
            ratio = (aspect * self._augmentation.ratio[0], aspect * self._augmentation.ratio[1])
        image.draft(None, smallest_size_of_crop(*size, target, scale, ratio))
        return image.size != size

    def _size_of(self, grid: tuple[int, int]) -> tuple[int, int]:
        return grid[0] * self.patch_size[0], grid[1] * self.patch_size[1]

    def _draw_interpolation(self) -> str:
        if self.interpolation != "random":
            return self.interpolation
        return "bicubic" if self._augmentation is None else random.choice(("bilinear", "bicubic"))

    def _normalize(self, values: Tensor) -> Tensor:
        """Normalize [..., 3], in the order of ToTensor and Normalize for the same bits."""
        mean, std = (torch.tensor(numbers, dtype=torch.float32) for numbers in (self.mean, self.std))
        return values.to(torch.get_default_dtype()).div_(255).sub_(mean).div_(std)

    def _patches_of_tensor(self, image: Tensor) -> Sample:
        """Convert a float tensor [3, H, W] with values from 0 to 1. There is no augmentation but the crop."""
        from torchvision.transforms import InterpolationMode, functional

        height, width = image.shape[-2:]
        left, top, right, bottom = 0, 0, width, height
        if self._augmentation is not None:
            left, top, right, bottom = self._augmentation.draw_crop(width, height)
        grid = patch_grid(bottom - top, right - left, self.patch_size, self.max_seq_len)
        mode = InterpolationMode(self._draw_interpolation())
        part = image[..., top:bottom, left:right]
        resized = functional.resize(part, list(self._size_of(grid)), mode, antialias=True)
        if self.normalizes:
            resized = functional.normalize(resized, self.mean, self.std)
        return self._sample(_cut(resized.permute(1, 2, 0), grid, self.patch_size), grid)

    def _sample(self, patches: Tensor, grid: tuple[int, int]) -> Sample:
        rows, columns = grid
        place = torch.arange(rows * columns)
        shape = (-1,) if self.flatten else (*self.patch_size, 3)
        return {
            "patches": patches.reshape(rows * columns, *shape),
            "patch_coord": torch.stack([place // columns, place % columns], dim=1),
            "patch_valid": torch.ones(rows * columns, dtype=torch.bool),
        }

    def __repr__(self) -> str:
        augments = "" if self._augmentation is None else f", scale={self._augmentation.scale}"
        sizes = f"max_seq_len={self.max_seq_len}, patch_size={self.patch_size}"
        return f"{type(self).__name__}({sizes}, interpolation={self.interpolation!r}{augments})"


def _check_tensor(image: Tensor) -> None:
    if image.dim() == 3 and len(image) == 3 and image.is_floating_point():
        return
    raise ValueError(
        f"The image is a tensor {list(image.shape)} of {image.dtype}. A NaFlex transform takes one image at a time: a "
        "PIL image, a uint8 array [H, W, 3], or a float tensor [3, H, W] with values from 0 to 1."
    )


def _cut(pixels: Any, grid: tuple[int, int], patch_size: tuple[int, int]) -> Any:
    """Cut [H, W, 3] (an array or a tensor) into [rows, columns, P, P, 3], a view."""
    parts = pixels.reshape(grid[0], patch_size[0], grid[1], patch_size[1], 3)
    return parts.swapaxes(1, 2)


class NaFlexTransformFactory:
    """Makes the transform for a length and a patch size: `factory(max_seq_len=256, patch_size=16)(image)`.

    Called with an image, it applies the transform of its own length and patch size.

    Args:
        mean, std: per channel or one number for all, for values from 0 to 1; by default those of OpenAI's CLIP.
        interpolation: "bicubic", "bilinear" or "random".
        max_seq_len, patch_size: of transforms for which they are not given.
        flatten: whether a patch is a vector [P*P*3]; otherwise it is [P, P, 3], as models of several patch sizes take.
        aug_cfg: the fields of `AugmentationCfg`. The ranges of `scale` and `ratio` are relative to the image: a ratio
            of 1 keeps its aspect ratio.

    Raises:
        ValueError: an argument is not valid.
    """

    is_train = True

    def __init__(
        self,
        mean: float | tuple[float, ...] | None = None,
        std: float | tuple[float, ...] | None = None,
        interpolation: str | None = None,
        max_seq_len: int = DEFAULT_MAX_SEQ_LEN,
        patch_size: int | tuple[int, int] = DEFAULT_PATCH_SIZE,
        flatten: bool = True,
        **aug_cfg: Any,
    ) -> None:
        self.mean = to_channels(mean, OPENAI_DATASET_MEAN)
        self.std = to_channels(std, OPENAI_DATASET_STD)
        self.interpolation = interpolation or "bicubic"
        expect("interpolation", self.interpolation, INTERPOLATIONS)
        self.max_seq_len = max_seq_len
        self.patch_size = to_pair(patch_size)
        self.flatten = flatten
        self.normalizes = True
        self.fast_decode = False
        self.augmentation = _build_augmentation(to_augmentation_cfg(aug_cfg)) if self.is_train else None

    def __call__(self, max_seq_len: Any = None, patch_size: int | tuple[int, int] | None = None) -> Any:
        """Return the transform of a length and a patch size, by default the factory's. Given an image, transform it."""
        if max_seq_len is not None and not isinstance(max_seq_len, numbers.Integral):
            return self(None, patch_size)(max_seq_len)
        length = self.max_seq_len if max_seq_len is None else int(max_seq_len)
        if length < 1:
            raise ValueError(f"max_seq_len={length} leaves no patch. Pass 1 or more.")
        size = self.patch_size if patch_size is None else to_pair(patch_size)
        return NaFlexTransform(self, length, size, self.is_train)

    @property
    def normalization(self) -> tuple[list[float], list[float]] | None:
        """(mean, std) that the device must apply, because patches are uint8."""
        return None if self.normalizes else (list(self.mean), list(self.std))

    def without_normalization(self) -> NaFlexTransformFactory | None:
        """Return the factory of transforms to uint8 patches, or None if steps follow the normalization."""
        if self.augmentation is not None and self.augmentation.on_tensor:
            return None
        return self.with_settings(normalizes=False)

    def with_settings(self, **attributes: Any) -> NaFlexTransformFactory:
        """Return a copy with other attributes, such as `max_seq_len` or `flatten`."""
        changed = copy.copy(self)
        vars(changed).update(attributes)
        return changed

    def __repr__(self) -> str:
        return f"{type(self).__name__}(max_seq_len={self.max_seq_len}, patch_size={self.patch_size})"


class NaFlexEvalTransformFactory(NaFlexTransformFactory):
    """Makes transforms without augmentation; see `NaFlexTransformFactory`."""

    is_train = False


def _build_augmentation(cfg: AugmentationCfg) -> _Augmentation:
    on_image: list[Callable[[Any], Any]] = []
    if cfg.color_jitter is not None:
        given = cfg.color_jitter if isinstance(cfg.color_jitter, Sequence) else (float(cfg.color_jitter),) * 3
        strengths = dict(zip(("brightness", "contrast", "saturation", "hue"), given, strict=False))
        strengths["p"] = 1.0 if cfg.color_jitter_prob is None else cfg.color_jitter_prob
        on_image.append(color_jitter(**strengths))
    if cfg.gray_scale_prob:
        on_image.append(gray_scale(cfg.gray_scale_prob))
    on_tensor: list[Callable[[Tensor], Tensor]] = []
    if cfg.re_prob:
        from timm.data.random_erasing import RandomErasing

        on_tensor.append(RandomErasing(cfg.re_prob, mode="pixel", max_count=cfg.re_count, device="cpu"))
    scale, ratio = tuple(cfg.scale), tuple(cfg.ratio or _DEFAULT_RATIO)
    return _Augmentation(scale, ratio, tuple(on_image), tuple(on_tensor))  # type: ignore[arg-type]


def is_naflex_aug_cfg(aug_cfg: Mapping[str, Any] | AugmentationCfg | None) -> bool:
    """Return whether an augmentation asks for NaFlex transforms."""
    return bool(aug_cfg.get("naflex") if isinstance(aug_cfg, Mapping) else getattr(aug_cfg, "naflex", False))


def naflex_eval_transform_v2(cfg: PreprocessCfg, **lengths: Any) -> NaFlexEvalTransformFactory:
    """Return the factory of evaluation transforms. `lengths`: its default max_seq_len and patch_size."""
    return NaFlexEvalTransformFactory(cfg.mean, cfg.std, cfg.interpolation, **lengths)


def naflex_transforms(
    visual: Any, cfg: PreprocessCfg, aug_cfg: Mapping[str, Any] | AugmentationCfg
) -> tuple[NaFlexTransformFactory, NaFlexEvalTransformFactory]:
    """Return the factories for training and evaluation of an image tower, with its length and patch size."""
    lengths = lengths_of(visual)
    augmentation = vars(to_augmentation_cfg(aug_cfg))
    train = NaFlexTransformFactory(cfg.mean, cfg.std, cfg.interpolation, **lengths, **augmentation)
    return train, naflex_eval_transform_v2(cfg, **lengths)


def lengths_of(visual: Any) -> dict[str, Any]:
    """Return {"max_seq_len", "patch_size"} of an image tower. The length is its `image_seq_len` or the default."""
    embeds = getattr(getattr(visual, "trunk", None), "embeds", None)
    patch_size: Any = getattr(visual, "patch_size", None) or getattr(embeds, "patch_size", DEFAULT_PATCH_SIZE)
    length = getattr(visual, "image_seq_len", None) or default_seq_len(getattr(visual, "image_size", None), patch_size)
    return {"max_seq_len": length, "patch_size": to_pair(patch_size)}


def default_seq_len(image_size: Any, patch_size: Any) -> int:
    """Return the number of whole patches of an image; DEFAULT_MAX_SEQ_LEN if it has none or no size."""
    if image_size is None:
        return DEFAULT_MAX_SEQ_LEN
    size, patch = to_pair(image_size), to_pair(patch_size)
    return (size[0] // patch[0]) * (size[1] // patch[1]) or DEFAULT_MAX_SEQ_LEN
