"""Image transforms: deterministic preprocessing for evaluation, and augmentation for training.

A transform maps an image to a float tensor [3, H, W]. It is a torchvision `Compose`. Random augmentations use only the
global generators of Python's `random`, numpy and torch, so seeding these makes them reproducible.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from ..config import closest
from ..constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from ..utils import expect
from .pixels import MaybeConvertMode
from .resize import (
    CenterCropOrPad,
    ResizeKeepRatio,
    random_resized_crop,
    resize_center_crop,
    resize_to_pixels,
    smallest_size_of_crop,
    to_pair,
)

if TYPE_CHECKING:
    from PIL.Image import Image


logger = logging.getLogger(__name__)


INTERPOLATIONS = ("bicubic", "bilinear", "random")
RESIZE_MODES = ("shortest", "longest", "squash")


@dataclass
class PreprocessCfg:
    """The preprocessing configuration of a model.

    Attributes:
        size: side, or (height, width), in pixels.
        mode: PIL mode; only "RGB".
        mean, std: per channel, for values from 0 to 1.
        interpolation: "bicubic", "bilinear", or "random". With "random", timm's training augmentation chooses one of
            the two for each image; other transforms use bicubic.
        resize_mode: "shortest" resizes the shortest side to size and crops the center; "longest" resizes the longest
            side to size and pads; "squash" resizes both sides to size.
        fill_color: value of padding, 0 to 255.
    """

    size: int | tuple[int, int] = 224
    mode: str = "RGB"
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN
    std: tuple[float, ...] = OPENAI_DATASET_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        if self.mode != "RGB":
            raise ValueError(f"mode={self.mode!r} is not supported: images are preprocessed as 'RGB' only.")

    @property
    def num_channels(self) -> int:
        return 3

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        return (self.num_channels, *to_pair(self.size))


_PREPROCESS_KEYS = {f.name for f in fields(PreprocessCfg)}


def merge_preprocess_dict(base: PreprocessCfg | dict, overlay: dict) -> dict[str, Any]:
    """Return `base` with the values of `overlay`. None and keys that are not fields of PreprocessCfg are ignored."""
    merged = asdict(base) if isinstance(base, PreprocessCfg) else dict(base)
    merged.update((key, value) for key, value in overlay.items() if key in _PREPROCESS_KEYS and value is not None)
    return merged


def merge_preprocess_kwargs(base: PreprocessCfg, **kwargs: Any) -> PreprocessCfg:
    """Return `base` with the given fields. None and names that are not fields are ignored."""
    return PreprocessCfg(**merge_preprocess_dict(base, kwargs))


@dataclass
class AugmentationCfg:
    """The augmentation of training images.

    Attributes:
        scale: range of the crop's area, as a fraction of the image's area.
        ratio: range of the crop's aspect ratio (timm only).
        color_jitter: strengths of brightness, contrast, saturation and hue, or one number for all (timm only).
        re_prob: probability of random erasing (timm only).
        re_count: number of erased rectangles (timm only).
        use_timm: use timm's `create_transform`.
        color_jitter_prob, gray_scale_prob: probabilities of color jitter and of grayscale (not with timm).
        naflex: resize to a sequence of patches and keep the aspect ratio, see `naflex`.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] | None = None
    color_jitter: float | tuple[float, float, float] | tuple[float, float, float, float] | None = None
    re_prob: float | None = None
    re_count: int | None = None
    use_timm: bool = False
    color_jitter_prob: float | None = None
    gray_scale_prob: float | None = None
    naflex: bool = False


_ONLY_TIMM = ("ratio", "re_prob", "re_count")
_NOT_TIMM = ("color_jitter_prob", "gray_scale_prob")


def to_augmentation_cfg(aug_cfg: Mapping[str, Any] | AugmentationCfg | None) -> AugmentationCfg:
    """Return `aug_cfg` as an AugmentationCfg.

    Raises:
        ValueError: it has a key that is not a field.
    """
    if isinstance(aug_cfg, AugmentationCfg):
        return aug_cfg
    known = [f.name for f in fields(AugmentationCfg)]
    for key in aug_cfg or {}:
        if key not in known:
            nearest = closest(str(key), known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"aug_cfg has no field {key!r}.{hint} The fields are {', '.join(known)}.")
    return AugmentationCfg(**(aug_cfg or {}))


class color_jitter:
    """Apply torchvision's ColorJitter with probability `p` (Python's `random`)."""

    def __init__(
        self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0, p: float = 0.8
    ) -> None:
        from torchvision.transforms import ColorJitter

        self.p = p
        self.transf = ColorJitter(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)

    def __call__(self, img: Image) -> Image:
        return self.transf(img) if random.random() < self.p else img

    def __repr__(self) -> str:
        return f"{type(self).__name__}(p={self.p}, {self.transf})"


class gray_scale:
    """Convert to grayscale with three equal channels, with probability `p` (Python's `random`)."""

    def __init__(self, p: float = 0.2) -> None:
        from torchvision.transforms import Grayscale

        self.p = p
        self.transf = Grayscale(num_output_channels=3)

    def __call__(self, img: Image) -> Image:
        return self.transf(img) if random.random() < self.p else img

    def __repr__(self) -> str:
        return f"{type(self).__name__}(p={self.p})"


def to_channels(values: float | Sequence[float] | None, default: tuple[float, ...]) -> tuple[float, ...]:
    """Return one value per channel, from one number for all, a sequence, or None for the default."""
    if isinstance(values, (int, float)):
        return (float(values),) * len(default)
    return tuple(values) if values else default


def _warn_unused(cfg: AugmentationCfg, names: Sequence[str], condition: str) -> None:
    unused = [name for name in names if getattr(cfg, name) is not None]
    if unused:
        verb = "have" if len(unused) > 1 else "has"
        logger.warning("aug_cfg: %s %s no effect %s.", ", ".join(unused), verb, condition)


def _timm_train_transform(cfg: AugmentationCfg, size: tuple[int, int], normalize: Any, interpolation: str) -> Callable:
    from timm.data import create_transform

    from .preprocess import Preprocess

    _warn_unused(cfg, _NOT_TIMM, "with use_timm")
    options: dict[str, Any] = {name: getattr(cfg, name) for name in _ONLY_TIMM if getattr(cfg, name) is not None}
    transform = create_transform(
        input_size=(3, *size),
        is_training=True,
        hflip=0.0,  # flipping may contradict the caption: left, right, written text
        mean=normalize.mean,
        std=normalize.std,
        re_mode="pixel",
        interpolation=interpolation,
        scale=cfg.scale,
        **{"color_jitter": cfg.color_jitter, **options},
    )
    return Preprocess(transform.transforms, before=MaybeConvertMode())


def _train_transform(cfg: AugmentationCfg, size: tuple[int, int], normalize: Any) -> Callable:
    from torchvision.transforms import InterpolationMode, RandomResizedCrop

    from .preprocess import MaybeToTensor, Preprocess

    _warn_unused(cfg, _ONLY_TIMM, "without use_timm")
    crop = RandomResizedCrop(size, scale=cfg.scale, interpolation=InterpolationMode.BICUBIC)
    steps: list[Callable] = [crop, MaybeConvertMode()]
    if cfg.color_jitter_prob:
        strengths = cfg.color_jitter
        if not isinstance(strengths, Sequence) or len(strengths) != 4:
            raise ValueError(
                f"color_jitter={strengths!r} must have four strengths (brightness, contrast, saturation, hue) if "
                "color_jitter_prob is set."
            )
        steps.append(color_jitter(*strengths, p=cfg.color_jitter_prob))
    elif cfg.color_jitter is not None:
        logger.warning("aug_cfg: color_jitter has no effect without color_jitter_prob or use_timm.")
    if cfg.gray_scale_prob:
        steps.append(gray_scale(cfg.gray_scale_prob))
    fast = functools.partial(
        random_resized_crop, size=size, scale=crop.scale, ratio=crop.ratio, interpolation="bicubic"
    )
    smallest_size = functools.partial(smallest_size_of_crop, size=size, scale=crop.scale, ratio=crop.ratio)
    return Preprocess([*steps, MaybeToTensor(), normalize], fast, num_fast=1, smallest_size=smallest_size)


def _val_transform(
    size: tuple[int, int], normalize: Any, resize_mode: str, interpolation: str, fill_color: int
) -> Callable:
    """Build the steps of open_clip 3.3: resize (and crop), convert to RGB, convert to a tensor, normalize."""
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    from .preprocess import MaybeToTensor, Preprocess

    last_steps = [MaybeConvertMode(), MaybeToTensor(), normalize]
    mode = InterpolationMode(interpolation)
    smallest_size = functools.partial(smallest_size_of_crop, size=size)
    if resize_mode == "squash":
        fast = functools.partial(resize_to_pixels, size=size, interpolation=interpolation)
        return Preprocess([Resize(size, mode), *last_steps], fast, num_fast=1, smallest_size=smallest_size)
    if resize_mode == "longest":
        fit = ResizeKeepRatio(size, longest=1.0, interpolation=mode)
        return Preprocess([fit, CenterCropOrPad(size, fill_color), *last_steps])
    if size[0] != size[1]:
        return Preprocess([ResizeKeepRatio(size, interpolation=mode), CenterCrop(size), *last_steps])
    fast = functools.partial(resize_center_crop, side=size[0], interpolation=interpolation)
    steps = [Resize(size[0], mode), CenterCrop(size), *last_steps]
    return Preprocess(steps, fast, num_fast=2, smallest_size=smallest_size)


def image_transform(
    image_size: int | tuple[int, int],
    is_train: bool,
    mean: float | tuple[float, ...] | None = None,
    std: float | tuple[float, ...] | None = None,
    resize_mode: str | None = None,
    interpolation: str | None = None,
    fill_color: int = 0,
    aug_cfg: dict[str, Any] | AugmentationCfg | None = None,
) -> Callable[[Image], torch.Tensor]:
    """Build a torchvision Compose that maps an image to a normalized float tensor [3, H, W].

    The image is a PIL image of any mode, a uint8 array [H, W, 3], [H, W, 4] or [H, W], or a float tensor [3, H, W].
    The steps are those of open_clip 3.3 (`Resize`, `CenterCrop`, ... of torchvision), and the list may be edited.

    Args:
        image_size: side, or (height, width), in pixels.
        is_train: augment for training according to `aug_cfg`, otherwise preprocess for evaluation.
        mean, std: per channel or one number for all, for values from 0 to 1; by default those of OpenAI's CLIP.
        resize_mode: see `PreprocessCfg`; "shortest" by default. For evaluation only.
        interpolation: see `PreprocessCfg`; "bicubic" by default.
        fill_color: value of padding, with "longest".
        aug_cfg: an `AugmentationCfg`, or a dict of its fields.

    Raises:
        ValueError: an argument, or a key of `aug_cfg`, is not known.
    """
    from torchvision.transforms import Normalize

    size = to_pair(image_size)
    interpolation = interpolation or "bicubic"
    resize_mode = resize_mode or "shortest"
    expect("interpolation", interpolation, INTERPOLATIONS)
    expect("resize_mode", resize_mode, RESIZE_MODES)
    normalize = Normalize(to_channels(mean, OPENAI_DATASET_MEAN), to_channels(std, OPENAI_DATASET_STD))
    cfg = to_augmentation_cfg(aug_cfg)
    if not is_train:
        fixed = "bilinear" if interpolation == "bilinear" else "bicubic"
        return _val_transform(size, normalize, resize_mode, fixed, fill_color)
    if cfg.naflex:
        raise ValueError("aug_cfg has naflex, whose transforms have no image size. Use NaFlexTransformFactory.")
    if cfg.use_timm:
        return _timm_train_transform(cfg, size, normalize, interpolation)
    return _train_transform(cfg, size, normalize)


def image_transform_v2(
    cfg: PreprocessCfg, is_train: bool, aug_cfg: dict[str, Any] | AugmentationCfg | None = None
) -> Callable[[Image], torch.Tensor]:
    """Call `image_transform` with the fields of a `PreprocessCfg`."""
    return image_transform(
        cfg.size,
        is_train,
        mean=cfg.mean,
        std=cfg.std,
        resize_mode=cfg.resize_mode,
        interpolation=cfg.interpolation,
        fill_color=cfg.fill_color,
        aug_cfg=aug_cfg,
    )
