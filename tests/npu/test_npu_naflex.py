"""NaFlex towers on an NPU: features and gradients as on the CPU, and packed images make the host wait for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from npu_training import CPU, NPU, Calls

from naflex_cases import GRIDS, features_and_gradients, make_images, make_tower
from open_clip.packed_patches import pack_patches


def on(device: torch.device, images: Any, is_packed: bool) -> Any:
    if not is_packed:
        return {name: value.to(device) for name, value in images.items()}
    packed = pack_patches(images)
    return packed if device == CPU else packed.pin_memory().to(device, non_blocking=True)


@pytest.mark.parametrize("variant", ["gap", "map", "siglip", "rope", "rope_half", "factorized"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_features_and_gradients(variant, is_packed):
    images = make_images(GRIDS)
    expected, gradients = features_and_gradients(make_tower(variant), on(CPU, images, is_packed))
    tower = make_tower(variant).to(NPU)
    features_and_gradients(tower, on(NPU, images, is_packed))  # operators are tried once
    moved = on(NPU, images, is_packed)
    with Calls() as calls:
        features, found = features_and_gradients(tower, moved)
    torch.testing.assert_close(features.cpu(), expected, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp(min=1)
        torch.testing.assert_close(found[name].cpu() / scale, gradient / scale, rtol=1e-3, atol=1e-4, msg=name)
    assert calls.waits == (0 if is_packed else 1)  # for the grids of padded images


def test_patches_of_another_size():
    images = make_images(GRIDS, patch_size=6)
    expected, _ = features_and_gradients(make_tower(), images)
    features, _ = features_and_gradients(make_tower().to(NPU), on(NPU, images, is_packed=True))
    torch.testing.assert_close(features.cpu(), expected, rtol=1e-4, atol=1e-4)
