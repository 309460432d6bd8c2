"""Images and texts of wrong sizes: errors that say what came and what the model takes, and no refusal beyond that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from open_clip import model as models

TEXT = {"context_length": 6, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 64, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1}
TOWERS = {
    "ViT": VIT,
    "RN50": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "timm": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 64, "timm_pool": "", "timm_proj": "linear"},
}


def build(tower: str, **text: object) -> nn.Module:
    torch.manual_seed(0)
    return models.CustomTextCLIP(16, TOWERS[tower], TEXT | text).eval()


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("size", [(96, 96), (64, 96), (32, 128), (128, 32), (67, 64), (16, 16)])
def test_images_of_another_size(tower: str, size: tuple[int, int]) -> None:
    force = size[0] if size[0] == size[1] else rf"\({size[0]}, {size[1]}\)"
    message = (
        f"Images have {size[0]} x {size[1]} pixels, and this model takes 64 x 64. Prepare them with the model's "
        f"preprocess, or build the model with force_image_size={force}."
    )
    with pytest.raises(ValueError, match=message):
        build(tower).encode_image(torch.randn(1, 3, *size))


@pytest.mark.parametrize("tower", TOWERS)
def test_patches_need_a_naflex_tower(tower: str) -> None:
    patches = {"patches": torch.zeros(1, 4, 768), "patch_coord": torch.zeros(1, 4, 2), "patch_valid": torch.ones(1, 4)}
    with pytest.raises(ValueError, match=r"got a dict\. Patches need a NaFlex tower.*force_naflex_vision=True"):
        build(tower).encode_image(patches)  # type: ignore[arg-type]


@pytest.mark.parametrize("tower", TOWERS)
def test_an_image_without_a_batch(tower: str) -> None:
    with pytest.raises(ValueError, match=r"shape \[3, 64, 64\], .* \[batch, channels, 64, 64\].*image.unsqueeze\(0\)"):
        build(tower).encode_image(torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match=r"shape \[1, 1, 3, 64, 64\]"):
        build(tower).encode_image(torch.randn(1, 1, 3, 64, 64))


def test_sizes_that_are_no_mistake() -> None:
    vit = build("ViT")
    vit.visual.positional_embedding = nn.Parameter(torch.randn(1 + 12 * 12, 16))
    assert vit.encode_image(torch.randn(1, 3, 96, 96)).shape == (1, 16)
    vit = build("ViT")
    vit.visual.conv1 = nn.Conv2d(4, 16, 8, 8, bias=False)
    assert vit.encode_image(torch.randn(1, 4, 64, 64)).shape == (1, 16)
    vit = build("ViT")
    vit.visual.conv1.stride = (4, 4)
    vit.visual.conv1.padding = (2, 2)
    vit.visual.positional_embedding = nn.Parameter(torch.randn(1 + 16 * 16, 16))
    assert vit.encode_image(torch.randn(1, 3, 64, 64)).shape == (1, 16)
    resnet = build("RN50")
    resnet.visual.attnpool = nn.Identity()
    assert resnet.visual(torch.randn(1, 3, 96, 160)).shape == (1, 256, 3, 5)
    assert build("RN50").visual.forward_intermediates(torch.randn(1, 3, 96, 96), intermediates_only=True)
    towers = {"timm_model_name": "convnext_atto", "image_size": 64, "timm_pool": "avg", "timm_proj": "linear"}
    convolutional = models.CustomTextCLIP(16, towers, TEXT).eval()
    assert convolutional.encode_image(torch.randn(1, 3, 96, 128)).shape == (1, 16)


def test_token_ids_of_a_wrong_shape() -> None:
    model, ids = build("ViT"), torch.ones(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"shape \[6\], and this model takes \[batch, tokens\].*text.unsqueeze\(0\)"):
        model.encode_text(ids[0])
    with pytest.raises(ValueError, match=r"shape \[1, 2, 6\], and .*text.flatten\(0, -2\)"):
        model.encode_text(ids[None])
    torch.testing.assert_close(model.encode_text(ids[None].flatten(0, -2)), model.encode_text(ids))
    assert model.encode_text(ids[:, :4]).shape == (2, 16)


def test_checks_break_no_graph() -> None:
    model, images, ids = build("ViT"), torch.randn(2, 3, 64, 64), torch.ones(2, 6, dtype=torch.int64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, ids), model(images, ids))
    with pytest.raises(ValueError, match="Images have 32 x 32 pixels"):
        model(images[..., :32, :32], ids)
    features = torch.vmap(lambda image: model.encode_image(image[None])[0])(images)
    torch.testing.assert_close(features, model.encode_image(images), atol=1e-5, rtol=1e-4)
