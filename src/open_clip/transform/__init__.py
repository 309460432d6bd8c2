"""Image transforms: deterministic preprocessing for evaluation, and augmentation for training."""

from __future__ import annotations

from .. import aliases
from .naflex import (
    NaFlexEvalTransformFactory,
    NaFlexTransformFactory,
    collate_patches,
    is_naflex_aug_cfg,
    naflex_eval_transform_v2,
)
from .pipeline import (
    AugmentationCfg,
    MaybeConvertMode,
    PreprocessCfg,
    color_jitter,
    gray_scale,
    image_transform,
    image_transform_v2,
    merge_preprocess_dict,
    merge_preprocess_kwargs,
)
from .resize import CenterCropOrPad, ResizeKeepRatio, center_crop_or_pad

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

__all__ = [
    "AugmentationCfg",
    "CenterCropOrPad",
    "MaybeConvertMode",
    "NaFlexEvalTransformFactory",
    "NaFlexTransformFactory",
    "PreprocessCfg",
    "ResizeKeepRatio",
    "center_crop_or_pad",
    "collate_patches",
    "color_jitter",
    "gray_scale",
    "image_transform",
    "image_transform_v2",
    "is_naflex_aug_cfg",
    "merge_preprocess_dict",
    "merge_preprocess_kwargs",
    "naflex_eval_transform_v2",
]
