"""NaFlex transforms against the answers of open_clip's main branch, and crops against those of timm."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import naflex_transforms as theirs

from fill_rule import uniform
from open_clip.transform import NaFlexEvalTransformFactory, NaFlexTransformFactory, collate_patches
from open_clip.transform.naflex import patch_grid

ORACLE = json.loads((Path(__file__).parent / "fixtures/open_clip_4/oracle_data.json").read_text(encoding="utf-8"))
CASES = ORACLE["naflex_transform"]["cases"]
ONE_LEVEL = 2 / 255  # of an image whose values are normalized with 0.5


def oracle_image(width: int, height: int) -> Image.Image:
    values = (uniform(f"img{width}x{height}", (height // 8 + 1, width // 8 + 1, 3)) + 1) * 127.5
    return Image.fromarray(values.numpy().astype("uint8")).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['width']}x{case['height']} {case['max_seq_len']}")
def test_grids_and_pixels_are_those_of_main(case):
    factory = NaFlexEvalTransformFactory(mean=0.5, std=0.5)
    transform = factory(max_seq_len=case["max_seq_len"], patch_size=case["patch_size"])
    sample = transform(oracle_image(case["width"], case["height"]))
    patches, coord = sample["patches"], sample["patch_coord"]
    assert list(patches.shape) == case["patches"]
    assert (coord.amax(dim=0) + 1).tolist() == case["grid"]
    assert int(sample["patch_valid"].sum()) == case["valid"]
    first, middle = patches[0, :6], patches[len(patches) // 2, :6]
    assert first.tolist() == pytest.approx(case["first"], abs=1.01 * ONE_LEVEL)
    assert middle.tolist() == pytest.approx(case["middle"], abs=1.01 * ONE_LEVEL)
    assert patches.mean().item() == pytest.approx(case["mean"], abs=2e-5)


@pytest.mark.parametrize("patch_size", [(16, 16), (14, 14), (8, 12), (32, 32)])
@pytest.mark.parametrize("max_seq_len", [1, 3, 16, 49, 64, 196, 256, 1024])
def test_grids_are_those_of_timm(patch_size, max_seq_len):
    rng = random.Random(f"{patch_size} {max_seq_len}")
    for _ in range(60):
        height, width = rng.randint(1, 3000), rng.randint(1, 3000)
        _, size = theirs.get_image_size_for_seq((height, width), patch_size, max_seq_len)
        rows, columns = patch_grid(height, width, patch_size, max_seq_len)
        assert (rows * patch_size[0], columns * patch_size[1]) == size
        assert rows * columns <= max_seq_len


@pytest.mark.parametrize(("scale", "ratio"), [((0.9, 1.0), None), ((0.08, 1.0), (0.5, 2.0)), ((1.0, 1.0), (1.2, 1.3))])
def test_crops_are_those_of_timm(scale, ratio):
    factory = NaFlexTransformFactory(scale=scale, ratio=ratio, interpolation="bicubic", mean=0.5, std=0.5)
    their_ratio = ratio or (3 / 4, 4 / 3)
    for seed, (width, height) in enumerate([(64, 48), (300, 201), (17, 400), (1, 30), (90, 90)] * 3):
        image = oracle_image(width, height)
        random.seed(seed)
        found = factory(max_seq_len=36, patch_size=8)(image)
        after = random.random()
        random.seed(seed)
        transform = theirs.RandomResizedCropToSequence(8, 36, scale, their_ratio, interpolation="bicubic")
        expected = theirs.Patchify(8)(transform(image))
        assert random.random() == after
        assert found["patch_coord"].equal(expected["patch_coord"])
        assert (found["patches"] - (expected["patches"] * 2 - 1)).abs().max() <= 1.01 * ONE_LEVEL


@pytest.mark.parametrize("case", [case for case in ORACLE["collate_patches"] if case["freq_tokens"] is None])
def test_collated_shapes_are_those_of_main(case):
    samples = [
        {"patches": torch.ones(size, 3), "patch_coord": torch.ones(size, 2, dtype=torch.int64),
         "patch_valid": torch.ones(size, dtype=torch.bool)} for size in case["sizes"]
    ]  # fmt: skip
    batch = collate_patches(samples, case["max_seq_len"], case["pad_multiple"])
    assert [list(batch["patches"].shape), batch["patch_valid"].sum(dim=1).tolist()] == case["shape_and_valid"]
    assert batch["patches"].sum(dim=(1, 2)).tolist() == [3 * size for size in case["sizes"]]  # padding is zero
    assert batch["patch_coord"].sum(dim=(1, 2)).tolist() == [2 * size for size in case["sizes"]]
