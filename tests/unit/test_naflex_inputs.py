"""What a NaFlex tower is given: images of a wrong kind, images on the meta device, sizes that a caller forces."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import open_clip
import tiny_naflex
from naflex_cases import GRIDS, make_images, make_tower
from open_clip.convert.transformers_naflex import processor_to_transformers
from open_clip.packed_patches import pack_patches
from open_clip.towers import build_vision_tower
from open_clip.transform import NaFlexEvalTransformFactory, collate_patches
from open_clip.transform.naflex import lengths_of


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"dtype torch.uint8.*normalized values.*preprocess"),
        (torch.zeros(1, 1, 16, 16), "1 channels, and this model takes 3"),
        ([make_images(GRIDS)], "got a list. Join the samples .*collate_patches"),
        ([torch.zeros(3, 16, 16)], "torch.stack"),
        (None, "got a NoneType"),
    ],
)
def test_images_of_a_wrong_kind(images, message):
    with pytest.raises(ValueError, match=message):
        make_tower()(images)


@pytest.mark.parametrize("variant", ["gap", "siglip", "rope", "factorized"])
def test_images_without_values(variant):
    tower = make_tower(variant).to("meta")
    assert tower(torch.zeros(2, 3, 12, 24, device="meta")).shape == (2, 16)


@pytest.mark.parametrize(
    ("size", "length"), [(None, 25), (20, 25), (40, 100), ((12, 40), 30), (1, 1)], ids=lambda value: str(value)
)
def test_a_forced_image_size_changes_the_number_of_patches(size, length, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny_naflex.config()}), encoding="utf-8")
    model, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{tmp_path}", force_image_size=size, aug_cfg={"naflex": True}
    )
    assert model.visual.image_seq_len == length
    assert preprocess.max_seq_len == length


def test_samples_that_cannot_be_joined():
    evaluate = NaFlexEvalTransformFactory(max_seq_len=9, patch_size=4)
    image = Image.new("RGB", (20, 12))
    with pytest.raises(ValueError, match=r"takes the dicts .* got a Tensor.*aug_cfg"):
        collate_patches([torch.zeros(3, 16, 16)])
    with pytest.raises(ValueError, match=r"shapes \[48\] and \[12\].*one patch_size"):
        collate_patches([evaluate(image), evaluate(patch_size=2)(image)])


def test_the_image_processor_has_the_length_of_the_model(tmp_path):
    """Without image_seq_len it is that of image_size."""
    cfg = {**tiny_naflex.config()["vision_cfg"], "image_seq_len": None, "image_size": [28, 20]}
    assert processor_to_transformers(cfg, "The model")["max_num_patches"] == 35
    visual = build_vision_tower(16, cfg)
    assert lengths_of(visual)["max_seq_len"] == 35


class Int8Linear(torch.nn.Module):
    """A quantized layer. Its inputs are floating-point numbers, and its weight has integers."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().max().item() / 127
        self.integers = (linear.weight / self.scale).round().to(torch.int8)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.integers.to(x.dtype) * self.scale, self.bias)


class WithWeight(Int8Linear):
    """As in bitsandbytes."""

    @property
    def weight(self) -> torch.Tensor:
        return self.integers


class WithMethod(Int8Linear):
    """As in torch.ao."""

    def weight(self) -> torch.Tensor:
        return self.integers


@pytest.mark.parametrize("kind", [WithWeight, WithMethod])
def test_a_quantized_patch_embedding_gets_the_values_of_the_patches(kind):
    tower, images = make_tower(), make_images(GRIDS)
    expected = tower(images)
    tower.trunk.embeds.proj = kind(tower.trunk.embeds.proj)
    for form in (images, pack_patches(images)):
        torch.testing.assert_close(tower(form), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("options", [{}, {"rope_type": "mixed"}, {"pos_embed_use_grid_sample": True}])
def test_dtypes_are_converted_in_every_tower(options):
    """Also if timm computes the trunk, because it has parts that are not known here."""
    tower, images = make_tower(**options), make_images(GRIDS)
    expected, plain = tower(images), torch.randn(2, 3, 12, 24)
    numbers = {**images, "patch_valid": images["patch_valid"].int(), "patch_coord": images["patch_coord"].int()}
    torch.testing.assert_close(tower(numbers), expected)
    of_plain = tower(plain)
    tower.bfloat16()
    for given, wanted in ((images, expected), (numbers, expected), (plain, of_plain)):
        torch.testing.assert_close(tower(given).float(), wanted, rtol=0.1, atol=0.1)
        found = tower.forward_intermediates(given, output_fmt="NLC")["image_features"]
        torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([torch.randn(3, 12, 24)], "got a list"),
        (torch.zeros(1, 3, 12, 24, dtype=torch.uint8), "the dtype torch.uint8"),
        (torch.randn(1, 1, 12, 24), "1 channels"),
        (torch.randn(1, 3, 13, 24), "13 x 24 pixels"),
        ({**make_images(GRIDS), "patches": torch.zeros(5, 18, 7)}, "Patches have the shape"),
    ],
)
def test_intermediate_features_are_of_the_inputs_of_forward_only(images, words):
    tower = make_tower()
    for function in (tower, tower.forward_intermediates):
        with pytest.raises(ValueError, match=words):
            function(images)


@pytest.mark.parametrize("variant", ["gap", "siglip", "corners", "keeps_aspect"])
def test_weights_for_another_grid_give_the_features_of_that_grid(variant):
    """The table is resized as it is in a forward pass."""
    tower, larger = make_tower(variant), make_tower(variant, pos_embed_grid_size=[6, 5])
    weights = tower.state_dict()
    larger.resize_pos_embed(weights)
    larger.load_state_dict(weights)
    images = torch.randn(2, 3, 24, 20)
    torch.testing.assert_close(larger(images), tower(images), rtol=1e-5, atol=1e-5)
