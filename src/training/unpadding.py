"""Removing padding from the inputs of a batch before they are moved to the device.

Texts are packed one after another, or sorted by length into groups with little padding. Patches of images are packed.
The features do not change. An input keeps its padding if one of the models that read it needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_clip import device as devices
from open_clip.packed_patches import PackedPatches, pack_patches
from open_clip.text_groups import MAX_GROUPS, PackedText, group_by_length, pack_text


@dataclass(frozen=True)
class PaddingOptions:
    """How padding is removed.

    Attributes:
        max_groups: maximum number of groups of texts per batch that are not packed. 0: these texts keep their padding.
        packing: whether inputs are packed for models that accept packed ones: "on", "off", or "auto" where the device
            gains from it (`Device.packs_sequences`).
    """

    max_groups: int = MAX_GROUPS
    packing: str = "auto"

    def packs_on(self, device: torch.device) -> bool:
        """Return whether inputs are packed on this device."""
        return self.packing == "on" or (self.packing == "auto" and devices.get(device).packs_sequences)


KEEP_TEXTS = PaddingOptions(max_groups=0)  # for evaluation, whose results do not depend on the groups of a batch


class PaddingReader:
    """What Unpadding needs to know of a model.

    Read once, because it depends on the hooks of all text modules. For a sharded model, read before sharding: FSDP's
    hooks look like those of users.
    """

    def __init__(self, model: Any) -> None:
        self.takes_grouped_text = getattr(model, "takes_grouped_text", False)
        self.takes_packed_text = getattr(model, "takes_packed_text", False)
        self.ignores_padding = getattr(model, "ignores_padding", False)
        self.text_lengths = getattr(model, "text_lengths", None)
        self.takes_packed_patches = takes_packed_patches(model)


class Unpadding:
    """Removes padding from the inputs of a batch: of each by the function for its name.

    Args:
        models: all models that read the batch. None is ignored.
        device: device of the models.
    """

    def __init__(self, models: Sequence[Any], device: torch.device, options: PaddingOptions | None = None) -> None:
        options = options or PaddingOptions()
        given = [model for model in models if model is not None]
        read_by = [model if isinstance(model, PaddingReader) else PaddingReader(model) for model in given]
        self._functions: dict[str, TextUnpadding | PatchPacking] = {
            "text": TextUnpadding(read_by, device, options),
            "image": PatchPacking(read_by, device, options),
        }

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch, on the CPU, with unpadded inputs. An entry NAME_valid says which places are not padding."""
        return {
            name: self._functions[name](value, batch.get(f"{name}_valid")) if name in self._functions else value
            for name, value in batch.items()
        }

    def check_packs(self) -> None:
        """Raise ValueError if one of the models accepts neither packed texts nor packed images."""
        if not any(function.packs() for function in self._functions.values()):
            raise ValueError(
                "--packing on: the model has neither a text tower nor an image tower that takes packed inputs, or "
                "--distill-model has not. Leave out --packing, or choose a model with a modern text tower or a NaFlex "
                "image tower."
            )


class TextUnpadding:
    """Packs the texts of a batch, or groups them by length, unless one of the models needs the padding."""

    def __init__(self, models: Sequence[Any], device: torch.device, options: PaddingOptions) -> None:
        self._models = models
        self._packs = options.packs_on(device)
        self._pins = devices.get(device).pin_memory
        self._max_groups = options.max_groups
        self._group_cost = devices.get(device).text_group_cost

    def __call__(self, text: Any, valid: Tensor | None = None) -> Any:
        """Remove padding from token ids, int64 [batch, tokens] on the CPU. Other values are returned unchanged.

        Args:
            valid: bool [batch, tokens], False for padding. Read for models with `ignores_padding` that do not know the
                lengths of the texts.
        """
        if not isinstance(text, Tensor) or text.dim() != 2 or not len(text) or not text.is_cpu:
            return text
        is_packed = self.packs()
        if not is_packed and not (self._max_groups and self._all("takes_grouped_text")):
            return text
        lengths = [_text_lengths(model, text, valid) for model in self._models]
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths):
            return text
        longest = torch.stack(known).amax(dim=0)
        if is_packed:
            return _pinned(pack_text(text, longest), self._pins)
        return group_by_length(text, longest, self._group_cost, self._max_groups)

    def packs(self) -> bool:
        """Return whether texts are packed."""
        return self._packs and self._all("takes_packed_text")

    def _all(self, trait: str) -> bool:
        return bool(self._models) and all(getattr(model, trait, False) for model in self._models)


class PatchPacking:
    """Packs the patches of images of different sizes, unless one of the models needs the padding."""

    def __init__(self, models: Sequence[Any], device: torch.device, options: PaddingOptions) -> None:
        self._models = models
        self._packs = options.packs_on(device)
        self._pins = devices.get(device).pin_memory

    def __call__(self, image: Any, valid: Tensor | None = None) -> Any:
        """Pack a dict with "patches", "patch_coord" and "patch_valid" on the CPU. Other values are not changed."""
        if not isinstance(image, Mapping) or not self.packs() or not image["patch_valid"].is_cpu:
            return image
        return _pinned(pack_patches(image), self._pins)

    def packs(self) -> bool:
        """Return whether patches are packed."""
        return self._packs and bool(self._models) and all(map(takes_packed_patches, self._models))


def takes_packed_patches(model: Any) -> bool:
    """Return whether the image tower of a model accepts packed patches."""
    reader = model if isinstance(model, PaddingReader) else getattr(model, "visual", None)
    return bool(getattr(reader, "takes_packed_patches", False))


def _text_lengths(model: Any, text: Tensor, valid: Tensor | None) -> Tensor | None:
    """Return the number of first tokens that the model reads of each text, int64 [batch]; None: perhaps all."""
    lengths = None if getattr(model, "text_lengths", None) is None else model.text_lengths(text)
    if lengths is not None or valid is None or not getattr(model, "ignores_padding", False):
        return lengths
    places = torch.arange(1, text.shape[1] + 1)
    return (valid * places).amax(dim=1).clamp(min=1)


def _pinned(packed: PackedText | PackedPatches, pins: bool) -> PackedText | PackedPatches:
    """Return packed inputs in pinned memory, from which copies to the device are asynchronous."""
    return packed.pin_memory() if pins else packed
