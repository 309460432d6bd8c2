"""A torchvision `Compose` that runs its first steps as one faster function, unless a program has changed them.

Importing this module imports torchvision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torchvision.transforms import Compose, Normalize, ToTensor

from .pixels import MaybeConvertMode, to_pil, to_pixels, to_resizable

if TYPE_CHECKING:
    from PIL.Image import Image


class MaybeToTensor(ToTensor):
    """Convert a PIL image or array to a float tensor [C, H, W] with values from 0 to 1. Return a tensor unchanged."""

    def __call__(self, pic: Image | np.ndarray | torch.Tensor) -> torch.Tensor:
        return pic if isinstance(pic, torch.Tensor) else super().__call__(pic)


class Preprocess(Compose):
    """The steps that convert an image to a normalized tensor, as a list that may be read and edited.

    For PIL images, `fast` replaces the first steps. Its pixels differ from theirs by at most 1 of 255. ToTensor and
    Normalize at the end are computed together. If a program changes these steps or their attributes, each step of the
    list is called, as in torchvision.

    Args:
        steps: all steps.
        fast: maps a PIL image as the first `num_fast` steps do, to an image or to uint8 [1 or 3, height, width]. None
            if there is no faster function. With exact=False, pixels may differ a little more. With is_temporary, the
            image is not used afterwards.
        num_fast: number of steps that `fast` replaces.
        before: applied to PIL images before the first step.
        smallest_size: maps the (width, height) of an image to the smallest one that `fast` does not enlarge.

    Attributes:
        fast_decode: decode JPEG files that are at least 2 times larger than needed at 1/2, 1/4 or 1/8 of their size.
            Takes effect with `smallest_size`, on images that are not decoded yet. It changes pixels by a few levels.
    """

    def __init__(
        self,
        steps: Sequence[Callable],
        fast: Callable[..., Image | torch.Tensor] | None = None,
        num_fast: int = 0,
        before: Callable[[Any], Any] | None = None,
        smallest_size: Callable[[int, int], tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(list(steps))
        self._first = steps[0]
        self._fast = fast
        self._built = [_Snapshot(step) for step in steps]
        self._num_fast = num_fast
        self._before = before
        self._smallest_size = smallest_size
        self.fast_decode = False
        self._mean_and_std = _mean_and_std(steps)

    def __call__(self, img: Any) -> torch.Tensor:
        """Preprocess a PIL image, an array (uint8 [H, W], or [H, W, C] with 1, 3 or 4 channels) or a float tensor.

        Raises:
            TypeError: `img` is something else.
        """
        if self._mean_and_std is None or isinstance(img, torch.Tensor) or not self._is_unchanged():
            return self._apply(img, self.transforms)
        mean, std = self._mean_and_std
        # In the order of ToTensor and Normalize, for the same bits.
        return self.pixels(img).to(torch.get_default_dtype()).div_(255).sub_(mean).div_(std)

    def pixels(self, img: Any, is_temporary: bool = False) -> torch.Tensor:
        """Return uint8 [3, height, width] of an image: all steps except ToTensor and Normalize at the end.

        With `is_temporary`, `img` may be left without its pixels, which is faster for an image that was just opened.
        """
        return to_pixels(self._apply(img, self.transforms[:-2], for_pixels=True, is_temporary=is_temporary))

    def without_normalization(self) -> PixelPreprocess | None:
        """Return the steps before ToTensor and Normalize, or None unless the unchanged list ends in these two."""
        if self._mean_and_std is None or not self._is_unchanged():
            return None
        normalize = self.transforms[-1]
        return PixelPreprocess(self, [float(x) for x in normalize.mean], [float(x) for x in normalize.std])

    def _apply(self, img: Any, steps: list[Callable], for_pixels: bool = False, is_temporary: bool = False) -> Any:
        """Apply `steps`, which are the first ones of the list or all of it.

        With `for_pixels`, the result may be uint8 [1 or 3, height, width] instead of an image.
        """
        if not steps or steps[0] is not self._first:
            # A first step that a program added may take any type.
            for step in steps:
                img = step(img)
            return img
        if not isinstance(img, torch.Tensor):
            img = to_resizable(to_image(img))
            if self._before is not None:
                img = self._before(img)
            if self._fast is not None and self._is_unchanged(self._num_fast):
                img = self._fast(img, exact=not self._reduce(img), is_temporary=is_temporary)
                steps = steps[self._num_fast :]
                # Pixels of torch are gray or RGB already.
                if not for_pixels or any(not isinstance(step, MaybeConvertMode) for step in steps):
                    img = to_pil(img)
        for step in steps:
            img = step(img)
        return img

    def _reduce(self, img: Image) -> bool:
        """Let the decoder reduce an image, if wanted. Return whether it does."""
        if not self.fast_decode or self._smallest_size is None:
            return False
        size = img.size
        img.draft(None, self._smallest_size(*size))  # does nothing for formats other than JPEG
        return img.size != size

    def _is_unchanged(self, num_steps: int | None = None) -> bool:
        """Return whether the first `num_steps` steps, or the whole list, have their original attributes."""
        if num_steps is None and len(self.transforms) != len(self._built):
            return False
        built = self._built[:num_steps]
        return len(self.transforms) >= len(built) and all(
            snapshot.matches(step) for step, snapshot in zip(self.transforms, built, strict=False)
        )

    def __repr__(self) -> str:
        return repr(Compose(self.transforms))


class PixelPreprocess:
    """The steps of a `Preprocess` without its last two, from an image to uint8 pixels.

    `normalization` is the (mean, std) of the missing steps, which compute `(pixels / 255 - mean) / std`. The device
    does this for a whole batch. Copying uint8 pixels to it takes a quarter of the bytes.

    Args:
        preprocess: ends in ToTensor and Normalize.
        mean, std: of Normalize, by channel.
    """

    def __init__(self, preprocess: Preprocess, mean: list[float], std: list[float]) -> None:
        self.preprocess = preprocess
        self.normalization = (mean, std)

    def __call__(self, img: Image) -> torch.Tensor:
        """Return uint8 [channels, height, width] of a PIL image that is not used afterwards."""
        return self.preprocess.pixels(img, is_temporary=True)

    @property
    def fast_decode(self) -> bool:
        """See `Preprocess`."""
        return self.preprocess.fast_decode

    @fast_decode.setter
    def fast_decode(self, enabled: bool) -> None:
        self.preprocess.fast_decode = enabled

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.preprocess!r})"


def _mean_and_std(steps: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return mean and std [3, 1, 1] if the steps end in ToTensor and Normalize, otherwise None."""
    to_tensor, normalize = steps[-2:]
    if len(steps) < 3 or not isinstance(to_tensor, ToTensor) or type(normalize) is not Normalize:
        return None
    mean, std = (torch.as_tensor(x, dtype=torch.float32).reshape(3, 1, 1) for x in (normalize.mean, normalize.std))
    return (mean, std) if std.all() else None  # Normalize raises for 0


class _Snapshot:
    """A step with copies of its attributes, hooks included, and of those of the modules in it."""

    def __init__(self, step: Any) -> None:
        self.step = step
        self.attributes = {
            name: value if isinstance(value, nn.Module) else copy.copy(value) for name, value in vars(step).items()
        }
        self.modules = {name: _Snapshot(value) for name, value in vars(step).items() if isinstance(value, nn.Module)}

    def matches(self, step: Any) -> bool:
        """Return whether `step` is the same object with the same attributes. Training mode is ignored."""
        if step is not self.step:
            return False
        current = vars(step)
        try:
            is_same = current == self.attributes  # in most cases, and much faster
        except (RuntimeError, ValueError):  # comparing an array with a number gives an array
            is_same = False
        if not is_same:
            names = self.attributes.keys() - {"training"}
            if current.keys() - {"training"} != names:
                return False
            if not all(_are_equal(current[name], self.attributes[name]) for name in names):
                return False
        return all(snapshot.matches(current[name]) for name, snapshot in self.modules.items())


def _are_equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    # Types first: comparing an array with a number would give an array.
    if type(a) is not type(b):
        return False
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return a.shape == b.shape and bool((a == b).all())
    return bool(a == b)


def to_image(value: Any) -> Image:
    """Return a PIL image for a PIL image or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].

    Raises:
        TypeError: `value` is something else.
    """
    from PIL import Image

    if isinstance(value, Image.Image):
        return value
    if isinstance(value, np.ndarray):
        grayscale = value[..., 0] if value.ndim == 3 and value.shape[-1] == 1 else value
        is_image = grayscale.ndim == 2 or (grayscale.ndim == 3 and grayscale.shape[-1] in (3, 4))
        if value.dtype == np.uint8 and is_image and value.size:
            return Image.fromarray(grayscale)
        raise TypeError(
            f"An image array must be uint8 of shape [height, width] or [height, width, 1, 3 or 4], got {value.dtype} "
            f"of shape {list(value.shape)}. Pass float images as tensors [3, height, width] with values from 0 to 1."
        )
    raise TypeError(f"preprocess takes a PIL image, a uint8 array or a float tensor, got {_describe(value)}.")


def _describe(value: Any) -> str:
    if isinstance(value, (str, bytes)) or hasattr(value, "__fspath__"):
        return f"the path {str(value)[:100]!r}: open it with PIL.Image.open"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}: call it once per image and use torch.stack"
    return "None" if value is None else f"a {type(value).__name__}"
