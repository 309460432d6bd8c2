"""Tests of batches whose values are dicts or packed inputs: moving, normalizing, counting."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from open_clip.text_groups import GroupedText
from training.batches import Normalization, num_samples, num_tokens, to_device

CPU = torch.device("cpu")
NORMALIZE = Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Packed:
    """Packed patches, of which 9 belong to 2 images."""

    patches: Tensor
    segments: SimpleNamespace

    def to(self, device: torch.device, non_blocking: bool = False) -> Packed:
        return Packed(self.patches.to(device), self.segments)

    def __len__(self) -> int:
        return 2


def patchify(image: Tensor, size: int) -> Tensor:
    """Cut an image [3, H, W] into patches [N, size, size, 3]."""
    rows = image.unfold(1, size, size).unfold(2, size, size)
    return rows.permute(1, 2, 3, 4, 0).reshape(-1, size, size, 3)


def pixels(height: int = 32, width: int = 48) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("input_dtype", [None, torch.bfloat16])
def test_patches_are_normalized_bit_identically_to_their_image(is_flat, input_dtype):
    """All 256 values of each channel are among the pixels."""
    image = pixels()
    image.view(3, -1)[:, :256] = torch.arange(256, dtype=torch.uint8)
    patches = patchify(image, 16)[None]
    expected = patchify(NORMALIZE(image[None])[0], 16)[None]
    if is_flat:
        patches, expected = patches.flatten(2), expected.flatten(2)
    batch = {"image": {"patches": patches, "patch_valid": torch.ones(1, 6, dtype=torch.bool)}, "text": torch.ones(1, 4)}
    moved = to_device(batch, CPU, input_dtype, normalization=NORMALIZE)["image"]
    assert torch.equal(moved["patches"], expected.to(input_dtype or torch.float32))
    assert moved["patch_valid"].dtype == torch.bool
    assert patches.dtype == torch.uint8, "the batch itself does not change"


def test_packed_patches_are_normalized_and_cast():
    rows = patchify(pixels(48, 48), 16).flatten(1)
    packed = Packed(rows, SimpleNamespace(total=9))
    moved = to_device({"image": packed}, CPU, torch.bfloat16, normalization=NORMALIZE)["image"]
    assert isinstance(moved, Packed)
    assert torch.equal(moved.patches, NORMALIZE.of_patches(rows).bfloat16())
    floats = Packed(NORMALIZE.of_patches(rows), packed.segments)
    assert to_device({"image": floats}, CPU, torch.bfloat16)["image"].patches.dtype == torch.bfloat16


def test_floats_in_nested_dicts_get_the_input_dtype_and_integers_keep_theirs():
    batch = {"image": {"patches": torch.zeros(2, 3, 12), "patch_coord": torch.zeros(2, 3, 2, dtype=torch.int64)}}
    moved = to_device(batch, CPU, torch.float16)["image"]
    assert (moved["patches"].dtype, moved["patch_coord"].dtype) == (torch.float16, torch.int64)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        ({"image": torch.zeros(3, 3, 4, 4), "text": torch.zeros(6, 5)}, 3),
        ({"image": {"size": 4, "patches": torch.zeros(2, 7, 12)}}, 2),
        ({"text": torch.zeros(4, 5), "key": list("abcd")}, 4),
        ({"text": GroupedText((torch.zeros(3, 8), torch.zeros(2, 16)), torch.arange(5))}, 5),
        ({"image": Packed(torch.zeros(9, 12), SimpleNamespace(total=9))}, 2),
        ({"__ends_step__": True, "scale": torch.tensor(1.0), "name": "x", "key": ["a"]}, 1),
    ],
)
def test_samples_of_any_batch_are_counted(batch, samples):
    assert num_samples(batch) == samples


def test_the_named_input_is_counted_first():
    assert num_samples({"image": torch.zeros(3, 1), "text": torch.zeros(6, 5)}, "text") == 6
    with pytest.raises(ValueError, match="Its entries are __ends_step__"):
        num_samples({"__ends_step__": True})


def test_only_inputs_of_varying_length_have_a_number_of_tokens():
    text, valid = torch.zeros(4, 5), torch.ones(4, 5, dtype=torch.bool)
    assert num_tokens({"image": torch.zeros(4, 3, 8, 8), "text": text, "key": list("abcd")}) == {}
    assert num_tokens({"text": text, "text_valid": valid}) == {"text": 20}
    grouped = GroupedText((torch.zeros(3, 8), torch.zeros(2, 16)), torch.arange(5))
    assert num_tokens({"text": grouped}) == {}
    assert num_tokens({"text": grouped, "text_valid": valid}) == {"text": 56}
    packed = Packed(torch.zeros(9, 12), SimpleNamespace(total=9))
    assert num_tokens({"image": packed, "text": text}) == {"image": 9}
    assert num_tokens({"image": {"patches": torch.zeros(2, 7, 12)}}) == {"image": 14}
