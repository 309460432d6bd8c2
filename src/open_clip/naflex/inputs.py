"""Sizes of patches, and the checks of what a NaFlex tower is given."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..packed_patches import Grid
from ..utils import check_images, to_2tuple


def patch_size_of(patches: Tensor, embeds: Any) -> tuple[int, int]:
    """Return the (height, width) of patches in pixels. Flat patches of another length than the model's are square.

    Args:
        patches: [..., P * P * C] with 2 or 3 dimensions, or [..., P, P, C] with 4 or 5.
        embeds: the NaFlexEmbeds of timm.
    """
    if patches.dim() >= 4:
        return patches.shape[-3], patches.shape[-2]
    height, width = to_2tuple(embeds.patch_size)
    pixels = patches.shape[-1] // embeds.in_chans
    if pixels == height * width:
        return height, width
    return math.isqrt(pixels), math.isqrt(pixels)


def image_grid(size: tuple[int, int], patch_size: tuple[int, int], pads: bool) -> Grid:
    """Return the (rows, columns) of patches of an image (height, width). The rest is padded to a patch, or cropped."""
    (height, width), (patch_height, patch_width) = size, patch_size
    if pads:
        return -(-height // patch_height), -(-width // patch_width)
    return height // patch_height, width // patch_width


def check_plain_images(images: Any, embeds: Any) -> None:
    """Raise ValueError unless a tower can cut these into patches.

    Args:
        images: should be float [batch, channels, height, width].
        embeds: the NaFlexEmbeds of timm.
    """
    if not isinstance(images, Tensor):
        raise ValueError(
            "This image tower takes images [batch, channels, height, width] or a batch of patches, got a "
            f"{type(images).__name__}. Join the samples of a NaFlex transform with "
            "open_clip.transform.collate_patches, and images of one size with torch.stack."
        )
    check_images(images, None)
    if images.shape[1] != embeds.in_chans:
        raise ValueError(
            f"Images have {images.shape[1]} channels, and this model takes {embeds.in_chans}. Prepare them with the "
            "model's preprocess."
        )
    if not images.is_floating_point():
        raise ValueError(
            f"Images have the dtype {images.dtype}, and this model takes normalized values: (pixels / 255 - mean) / "
            "std, as floating-point numbers. Prepare them with the model's preprocess."
        )
    height, width = to_2tuple(embeds.patch_size)
    if not embeds.dynamic_img_pad and (images.shape[-2] % height or images.shape[-1] % width):
        raise ValueError(
            f"Images have {images.shape[-2]} x {images.shape[-1]} pixels, which the model cannot divide into patches "
            f"of {height} x {width}. Resize them to multiples of the patch size."
        )


def check_patches(patches: Tensor, embeds: Any, patch_size: tuple[int, int] | None = None) -> None:
    """Raise ValueError unless a tower can embed these patches.

    Args:
        patches: padded or packed.
        embeds: the NaFlexEmbeds of timm.
        patch_size: the size that comes with the patches, if it is known.
    """
    height, width = to_2tuple(embeds.patch_size)
    own = height * width * embeds.in_chans
    shape = list(patches.shape)
    if not embeds.is_linear:
        raise ValueError(
            "This model embeds patches with a convolution, which takes images [batch, 3, height, width] only. Build it "
            'with timm_model_kwargs={"embed_proj_type": "linear"}.'
        )
    size = patch_size or patch_size_of(patches, embeds)
    length = math.prod(shape[-3:]) if patches.dim() >= 4 else shape[-1]
    if size[0] * size[1] * embeds.in_chans != length:
        given = f", and patch_size={size}" if patch_size else ""
        raise ValueError(
            f"Patches have the shape {shape}{given}. This model takes {own} values per patch ({height} x {width} x "
            f"{embeds.in_chans}, in the order row, column, channel) or those of square patches of another size."
        )
    if size != (height, width) and embeds.norm_input is not None:
        raise ValueError(
            f"Patches have {size[0]} x {size[1]} pixels, and this model normalizes the values of patches of {height} x "
            f"{width}. Cut the images into patches of that size."
        )
    if not patches.is_floating_point():
        raise ValueError(
            f"Patches have the dtype {patches.dtype}, and this model takes normalized values: "
            "(patches / 255 - mean) / std, as floating-point numbers."
        )
