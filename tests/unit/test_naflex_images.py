"""NaFlex transforms: odd images, uint8 patches for loaders, factories and collation."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

import open_clip
from open_clip.transform import (
    AugmentationCfg,
    NaFlexEvalTransformFactory,
    NaFlexTransformFactory,
    PreprocessCfg,
    collate_patches,
    image_transform,
    is_naflex_aug_cfg,
    naflex_eval_transform_v2,
)
from open_clip.transform.naflex import lengths_of, patch_grid
from training.batches import normalization_of, to_pixels


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=-1)
    return Image.fromarray(pixels.astype("uint8")).convert(mode)


ODD_SIZES = [(1, 900), (900, 1), (17, 900), (1, 1), (3, 2), (4000, 3), (5000, 4000)]


@pytest.mark.parametrize("is_train", [False, True])
@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
def test_any_size_gives_between_one_patch_and_the_limit(size, is_train):
    factory = (NaFlexTransformFactory if is_train else NaFlexEvalTransformFactory)()
    for length in (1, 7, 64):
        sample = factory(max_seq_len=length, patch_size=16)(gradient(*size))
        count = len(sample["patches"])
        assert 1 <= count <= length
        assert sample["patches"].shape == (count, 768)
        assert sample["patch_coord"].shape == (count, 2)
        assert sample["patch_valid"].all()
        assert sample["patches"].isfinite().all()


def test_a_side_beyond_the_search_gives_one_patch():
    assert patch_grid(10**9, 1, (16, 16), 8) == (1, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA", "1", "I;16", "YCbCr", "PA"])
def test_every_mode(mode):
    image = Image.new("I;16", (40, 30), 9000) if mode == "I;16" else Image.new("L", (40, 30), 35)
    image = image if mode == "I;16" else image.convert("P" if mode == "PA" else mode)
    image = image.convert("PA") if mode == "PA" else image
    for factory in (NaFlexTransformFactory(mean=0.5, std=0.5), NaFlexEvalTransformFactory(mean=0.5, std=0.5)):
        assert factory(max_seq_len=12, patch_size=8)(image)["patches"].shape == (12, 192)


def test_patches_are_in_reading_order_and_their_values_in_the_order_row_column_channel():
    image = gradient(24, 16)
    sample = NaFlexEvalTransformFactory()(max_seq_len=6, patch_size=8).without_normalization()(image)
    expected = np.asarray(image)
    assert sample["patches"].dtype == torch.uint8
    for patch, (row, column) in zip(sample["patches"], sample["patch_coord"].tolist(), strict=True):
        part = expected[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        assert patch.tolist() == part.reshape(-1).tolist()
    assert sample["patch_coord"].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize("image", [np.asarray(gradient(24, 16)), torch.rand(3, 16, 24)], ids=["array", "tensor"])
def test_arrays_and_tensors(image):
    sample = NaFlexEvalTransformFactory(mean=0.5, std=0.5)(max_seq_len=6, patch_size=8)(image)
    pixels = torch.tensor(image).permute(2, 0, 1) / 255 if isinstance(image, np.ndarray) else image
    assert sample["patches"][0].view(8, 8, 3).allclose((pixels[:, :8, :8].permute(1, 2, 0) - 0.5) / 0.5)


@pytest.mark.parametrize(
    "image",
    [torch.rand(1, 8, 8), torch.rand(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)],
    ids=["gray", "batch", "uint8"],
)
def test_other_tensors_are_refused(image):
    with pytest.raises(ValueError, match=r"is a tensor \[.*one image at a time.*float tensor \[3, H, W\]"):
        NaFlexEvalTransformFactory()(image)


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="open it with PIL"):
        NaFlexEvalTransformFactory()("image.png")


@pytest.mark.parametrize("size", [(40, 30), (300, 170), (9, 31)], ids=str)
def test_pixels_for_the_loader_give_the_normalized_patches(size):
    factory = NaFlexTransformFactory(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), scale=(0.5, 1.0))
    pixels = to_pixels(factory)
    assert factory.normalization is None
    assert pixels.normalization == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    assert normalization_of(pixels).mean == (0.4, 0.5, 0.6)
    random.seed(3)
    expected = factory(max_seq_len=20, patch_size=8)(gradient(*size))
    random.seed(3)
    found = pixels(max_seq_len=20, patch_size=8)(gradient(*size))
    assert found["patches"].dtype == torch.uint8
    values = (found["patches"].view(-1, 64, 3) / 255 - torch.tensor((0.4, 0.5, 0.6))) / torch.tensor((0.2, 0.3, 0.4))
    assert values.view(len(values), -1).allclose(expected["patches"], atol=1e-5)


def test_random_erasing_follows_the_normalization_so_patches_stay_floats():
    factory = NaFlexTransformFactory(re_prob=1.0, re_count=1)
    assert factory.without_normalization() is None
    assert to_pixels(factory) is factory
    random.seed(0)
    patches = factory(max_seq_len=16, patch_size=8)(Image.new("RGB", (32, 32)))["patches"].view(16, 64, 3)
    black = NaFlexEvalTransformFactory()(max_seq_len=1, patch_size=8)(Image.new("RGB", (8, 8)))["patches"][0, :3]
    erased = (patches != black).any(dim=-1)
    assert 0 < erased.sum() < erased.numel()


def test_colors_change_with_jitter_and_grayscale():
    image = gradient(32, 32)
    grey = NaFlexTransformFactory(gray_scale_prob=1.0, mean=0.0, std=1.0)(max_seq_len=4, patch_size=16)(image)
    channels = grey["patches"].view(-1, 3)
    assert channels[:, 0].equal(channels[:, 1])
    jittered = NaFlexTransformFactory(scale=(1.0, 1.0), ratio=(1.0, 1.0), color_jitter=(0.5, 0.5, 0.5, 0.1))
    assert not jittered(4, 16)(image)["patches"].equal(jittered(4, 16)(image)["patches"])


def test_training_keeps_the_aspect_ratio_and_evaluation_is_deterministic():
    image = gradient(400, 100)
    train = NaFlexTransformFactory(ratio=(1.0, 1.0))(max_seq_len=64, patch_size=8)
    assert (train(image)["patch_coord"].amax(dim=0) + 1).tolist() == [4, 16]
    evaluation = NaFlexEvalTransformFactory()(max_seq_len=64, patch_size=8)
    assert evaluation(image)["patches"].equal(evaluation(image)["patches"])


def test_large_jpeg_files_are_decoded_at_a_reduced_size():
    file = io.BytesIO()
    gradient(1600, 1200).save(file, "JPEG", quality=95)
    exact, fast = (NaFlexEvalTransformFactory(mean=0.0, std=1.0).without_normalization() for _ in range(2))
    fast.fast_decode = True
    found = []
    for factory in (exact, fast):
        opened = Image.open(io.BytesIO(file.getvalue()))
        found.append(factory(max_seq_len=48, patch_size=16)(opened)["patches"].float())
        assert opened.size == ((200, 150) if factory is fast else (1600, 1200))
    assert found[0].shape == found[1].shape
    assert 0 < (found[0] - found[1]).abs().mean() < 4


def test_a_factory_applied_to_an_image_uses_its_own_length_and_patch_size():
    factory = NaFlexEvalTransformFactory(max_seq_len=9, patch_size=4)
    assert factory(gradient(30, 30))["patches"].shape == (9, 48)
    assert factory()(gradient(30, 30))["patches"].shape == (9, 48)
    for length in (4, np.int64(4)):
        assert factory(length)(gradient(30, 30))["patches"].shape == (4, 48)
    assert factory.with_settings(flatten=False)(gradient(30, 30))["patches"].shape == (9, 4, 4, 3)
    with pytest.raises(ValueError, match="max_seq_len=0 leaves no patch"):
        factory(0)
    with pytest.raises(ValueError, match="no field 'scales'"):
        NaFlexTransformFactory(scales=(0.1, 1))


def test_factories_of_a_model():
    model, train, evaluation = open_clip.create_model_and_transforms(
        "ViT-B-32", device="meta", aug_cfg={"naflex": True, "scale": (0.5, 1.0)}
    )
    assert isinstance(train, NaFlexTransformFactory)
    assert isinstance(evaluation, NaFlexEvalTransformFactory)
    assert (train.max_seq_len, train.patch_size) == (evaluation.max_seq_len, evaluation.patch_size) == (49, (32, 32))
    assert train.augmentation.scale == (0.5, 1.0)
    assert train.mean == tuple(model.visual.image_mean)
    _, train, _ = open_clip.create_model_and_transforms("ViT-B-32", device="meta", aug_cfg={"naflex": False})
    assert train(gradient(20, 20)).shape == (3, 224, 224)


def test_length_of_a_tower_with_its_own():
    class Tower:
        image_seq_len = 256
        image_size = 224
        patch_size = (16, 16)

    assert lengths_of(Tower()) == {"max_seq_len": 256, "patch_size": (16, 16)}


def test_augmentations_that_ask_for_naflex():
    assert is_naflex_aug_cfg({"naflex": True})
    assert is_naflex_aug_cfg(AugmentationCfg(naflex=True))
    assert not any(map(is_naflex_aug_cfg, ({}, None, {"naflex": False}, AugmentationCfg())))
    with pytest.raises(ValueError, match="Use NaFlexTransformFactory"):
        image_transform(224, is_train=True, aug_cfg={"naflex": True})
    factory = naflex_eval_transform_v2(PreprocessCfg(mean=(0.1, 0.2, 0.3), interpolation="bilinear"))
    assert (factory.mean, factory.interpolation, factory.is_train) == ((0.1, 0.2, 0.3), "bilinear", False)


def test_collation():
    samples = [NaFlexEvalTransformFactory()(8, 4)(gradient(*size)) for size in ((16, 16), (40, 4))]
    lengths = [len(sample["patches"]) for sample in samples]
    assert collate_patches(samples)["patch_valid"].sum(dim=1).tolist() == lengths
    assert collate_patches(samples)["patches"].shape == (2, max(lengths), 48)
    assert collate_patches(samples, 20)["patch_coord"].shape == (2, 20, 2)
    assert collate_patches(samples, 20, pad_multiple=6)["patches"].shape[1] == 12
    with pytest.raises(ValueError, match="more than max_seq_len=5"):
        collate_patches(samples, 5)
    with pytest.raises(ValueError, match="no samples"):
        collate_patches([])
