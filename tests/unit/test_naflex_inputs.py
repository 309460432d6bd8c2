"""What a NaFlex tower is given: images of a wrong kind, images on the meta device, sizes that a caller forces."""

from __future__ import annotations

import json

import pytest
import torch

import open_clip
import tiny_naflex
from naflex_cases import GRIDS, make_images, make_tower


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
