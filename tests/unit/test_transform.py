"""Image transforms: configurations, unusual images, sizes, augmentations, errors."""

import copy
import io
import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from odd_images import UNIT, odd_image, picture, to_levels
from open_clip.transform import (
    AugmentationCfg,
    CenterCropOrPad,
    MaybeConvertMode,
    MaybeToTensor,
    PreprocessCfg,
    ResizeKeepRatio,
    center_crop_or_pad,
    color_jitter,
    gray_scale,
    image_transform,
    image_transform_v2,
    merge_preprocess_dict,
    merge_preprocess_kwargs,
)
from open_clip.transform import resize as image_resize
from open_clip.transform.pixels import to_pil
from open_clip.transform.resize import random_resized_crop

PHOTO = Image.fromarray(picture(70, 50, 3))


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_preprocess_cfg():
    assert PreprocessCfg().input_size == (3, 224, 224)
    assert PreprocessCfg(size=[200, 300]).input_size == (3, 200, 300)
    assert PreprocessCfg().num_channels == 3
    with pytest.raises(ValueError, match="mode='L'"):
        PreprocessCfg(mode="L")


def test_merging_preprocess_settings():
    base = PreprocessCfg(size=5)
    merged = merge_preprocess_dict({"size": 1, "kept": 2}, {"size": 0, "mean": None, "unknown": 3})
    assert merged == {"size": 0, "kept": 2}
    assert merge_preprocess_dict(base, {"mean": None, "interpolation": "bilinear"})["interpolation"] == "bilinear"
    merged = merge_preprocess_kwargs(base, std=(1, 2, 3), mean=None, unknown=3)
    assert merged == PreprocessCfg(size=5, std=(1, 2, 3))
    assert base == PreprocessCfg(size=5)


@pytest.mark.parametrize("size", [0, -1, (1, 2, 3), (), "224", 224.0, (224, 0), None])
def test_wrong_sizes_raise(size):
    for is_train in (False, True):
        with pytest.raises(ValueError, match="size="):
            image_transform(size, is_train)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"interpolation": "nearest"}, "interpolation is one of 'bicubic', 'bilinear', 'random', got 'nearest'"),
        ({"resize_mode": "stretch"}, "resize_mode is one of 'shortest', 'longest', 'squash', got 'stretch'"),
        ({"aug_cfg": {"scales": (0.1, 1)}}, "no field 'scales'. Did you mean 'scale'"),
        ({"aug_cfg": {"color_jitter": 0.4, "color_jitter_prob": 0.5}}, "color_jitter=0.4.*four strengths"),
        ({"aug_cfg": {"color_jitter_prob": 0.5}}, "color_jitter=None.*four strengths"),
    ],
)
def test_unknown_settings_raise_with_the_known_ones(wrong, message):
    with pytest.raises(ValueError, match=message):
        image_transform(224, True, **wrong)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [16, (12, 20)])
def test_shape_and_statistics(size, resize_mode):
    transform = image_transform(size, False, mean=0.5, std=(0.5, 0.25, 0.125), resize_mode=resize_mode)
    white = transform(Image.new("L", (12, 20), 255))
    assert white.shape == (3, *((16, 16) if size == 16 else size))
    assert white.dtype == torch.float32
    assert white[:, 6, 10].tolist() == pytest.approx([1, 2, 4])


def test_defaults_are_those_of_clip():
    step = image_transform(224, False).transforms[-1]
    assert tuple(step.mean) == (0.48145466, 0.4578275, 0.40821073)
    assert tuple(step.std) == (0.26862954, 0.26130258, 0.27577711)


def test_v2_takes_every_field():
    statistics = {"mean": (0.1,) * 3, "std": (0.2,) * 3}
    cfg = PreprocessCfg((10, 20), interpolation="bilinear", resize_mode="longest", fill_color=9, **statistics)
    assert repr(image_transform_v2(cfg, False)).split("\n")[1:-1] == [
        "    ResizeKeepRatio(size=(10, 20), interpolation=bilinear, longest=1.000)",
        "    CenterCropOrPad(size=(10, 20), fill=9)",
        "    MaybeConvertMode(mode=RGB)",
        "    MaybeToTensor()",
        "    Normalize(mean=(0.1, 0.1, 0.1), std=(0.2, 0.2, 0.2))",
    ]


def png(array_or_image, **options):
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("is_train", [False, True])
def test_sixteen_bits_per_pixel_are_scaled(is_train):
    levels = np.repeat(np.arange(0, 65536, 257 * 5, dtype=np.uint16)[None], 40, 0)
    image = png(levels)
    assert image.mode.startswith("I")
    shown = image_transform(32, is_train, **UNIT, aug_cfg={"scale": (1.0, 1.0)})(image)
    assert shown.min() < 0.3
    assert 0.5 < shown.max() <= 1
    assert 0.4 < shown.mean() < 0.6  # it would be white if clipped to 255
    assert to_levels(MaybeToTensor()(MaybeConvertMode()(image)))[0, 0].tolist() == list(range(0, 256, 5))


def test_first_frame_of_an_animation():
    file = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(
        file, "GIF", save_all=True, append_images=[Image.new("RGB", (20, 20), "blue")], loop=0
    )
    shown = image_transform(16, False, **UNIT)(Image.open(io.BytesIO(file.getvalue())))
    assert shown[:, 8, 8].tolist() == pytest.approx([1, 0, 0], abs=0.01)


@pytest.mark.parametrize("is_train", [False, True])
def test_palette_with_transparency_is_read_without_a_warning(is_train):
    image = png(odd_image("P alpha", "photo"))
    assert isinstance(image.info["transparency"], bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_transform(16, is_train)(image).shape == (3, 16, 16)


MODES = ["RGB", "L", "RGBA", "LA", "P", "P alpha", "CMYK", "1", "YCbCr", "F", "I", "HSV", "LAB", "PA"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("aug_cfg", [None, {"use_timm": True}])
def test_training_accepts_every_mode(mode, aug_cfg):
    image = odd_image(mode, "photo") if mode not in ("F", "I", "HSV", "LAB", "PA") else PHOTO
    if mode == "LAB":
        image = Image.merge("LAB", PHOTO.split())
    elif mode == "PA":
        image = PHOTO.convert("P").convert("PA")
    elif image.mode != mode and not mode.startswith("P"):
        image = image.convert("L" if mode in "FI" else mode).convert(mode)
    assert image_transform(16, True, aug_cfg=aug_cfg)(image).shape == (3, 16, 16)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [16, (12, 20)])
def test_tensors_are_accepted(size, resize_mode):
    transform = image_transform(size, False, **UNIT, resize_mode=resize_mode, interpolation="bilinear")
    from_tensor = transform(MaybeToTensor()(PHOTO))
    assert (from_tensor - transform(PHOTO)).abs().max() < 3 / 255


def test_fit_in_a_square_keeps_a_pixel_of_a_line():
    shown = image_transform(16, False, **UNIT, resize_mode="longest")(Image.new("RGB", (600, 1), "white"))
    assert shown.sum() == pytest.approx(3 * 16)


# Outputs of open_clip_torch 3.3.0.
@pytest.mark.parametrize(
    ("longest", "size", "expected"),
    [
        (0.0, 20, (28, 20)), (0.0, (20, 30), (30, 21)), (0.0, (100, 40), (140, 100)),
        (0.3, 20, (25, 18)), (0.3, (20, 30), (29, 21)), (0.3, (100, 40), (80, 57)),
        (1.0, 20, (20, 14)), (1.0, (20, 30), (28, 20)), (1.0, (100, 40), (40, 29)),
    ],
)  # fmt: skip
def test_keep_ratio_sizes(longest, size, expected):
    assert ResizeKeepRatio(size, longest)(PHOTO).size == expected


def test_keep_ratio_factors():
    params = ResizeKeepRatio.get_params
    assert params(PHOTO, (20, 30), 1.0, 1.0, (1.2, 1.2)) == [24, 34]
    assert params(PHOTO, (20, 30), 0.0, 0, (1.2, 1.2), 1.0, (2.0, 2.0)) == [11, 60]
    assert params(PHOTO, (20, 30), 1.0, 1.0, (1.5, 1.5), 1.0, (2.0, 2.0)) == [15, 84]
    random.seed(3)
    drawn = [params(PHOTO, (200, 300), 1.0, 0.7, (0.5, 1.5), 0.7, (0.5, 2)) for _ in range(4)]
    assert drawn == [[149, 411], [64, 278], [147, 206], [183, 546]]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((2, 2), [[1, 2], [5, 6]]),
        ((1, 1), [[6]]),
        ((5, 2), [[9, 9], [1, 2], [5, 6], [9, 10], [9, 9]]),
        ((2, 7), [[9, 0, 1, 2, 3, 9, 9], [9, 4, 5, 6, 7, 9, 9]]),
        ((4, 4), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [9, 9, 9, 9]]),
        ((3, 4), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    ],
)
def test_center_crop_or_pad(size, expected):
    tensor = torch.arange(12.0).reshape(1, 3, 4)
    assert center_crop_or_pad(tensor, size, fill=9)[0].tolist() == expected
    image = Image.fromarray(tensor[0].to(torch.uint8).numpy())
    assert np.asarray(CenterCropOrPad(size, fill=9)(image)).tolist() == expected
    indexed = image.copy()
    indexed.putpalette([0, 0, 0] * 256)
    assert np.asarray(center_crop_or_pad(indexed, size, 9)).tolist() == expected
    assert np.asarray(center_crop_or_pad(image.convert("RGB"), size, 9))[..., 2].tolist() == expected


@pytest.mark.parametrize("with_torch", [True, False], ids=["torch", "pillow"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
def test_random_crops_equal_those_of_torchvision(monkeypatch, with_torch, mode):
    from torchvision import transforms

    monkeypatch.setattr(image_resize, "_has_fast_uint8_resize", lambda: with_torch)
    theirs = transforms.RandomResizedCrop(16, scale=(0.2, 1), interpolation=transforms.InterpolationMode.BICUBIC)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = np.asarray(theirs(odd_image(mode, "photo"))).astype(int)
        torch.manual_seed(seed)
        ours = random_resized_crop(odd_image(mode, "photo"), (16, 16), theirs.scale, theirs.ratio, "bicubic")
        assert np.abs(np.asarray(to_pil(ours)) - expected).max() <= 1


@pytest.mark.parametrize(
    "aug_cfg",
    [
        {"scale": (0.4, 1.0), "color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.8, "gray_scale_prob": 0.2},
        {"use_timm": True, "color_jitter": 0.4, "re_prob": 0.5, "re_count": 2, "scale": (0.4, 1.0), "ratio": (0.5, 2)},
        AugmentationCfg(use_timm=True, scale=(0.4, 1.0)),
    ],
)
def test_augmentations_follow_the_global_generators(aug_cfg):
    transform = image_transform(16, True, aug_cfg=aug_cfg, interpolation="random")
    images = []
    for seed in (0, 1, 0):
        seed_all(seed)
        images.append(torch.stack([transform(PHOTO) for _ in range(8)]))
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0][0], images[0][1])


def test_training_steps():
    aug = {"scale": (0.4, 1.0), "color_jitter": (0.4, 0.3, 0.2, 0.1), "color_jitter_prob": 0.8, "gray_scale_prob": 0.2}
    steps = image_transform(16, True, aug_cfg=aug).transforms
    assert [type(step).__name__ for step in steps] == [
        "RandomResizedCrop", "MaybeConvertMode", "color_jitter", "gray_scale", "MaybeToTensor", "Normalize"
    ]  # fmt: skip
    assert steps[0].scale == (0.4, 1.0)
    assert steps[0].ratio == (3 / 4, 4 / 3)
    assert steps[2].transf.hue == (-0.1, 0.1)
    assert steps[0].interpolation.value == "bicubic"
    assert "color_jitter(p=0.8" in repr(steps[2])


def test_timm_steps():
    aug = AugmentationCfg(use_timm=True, ratio=(0.8, 1.2), re_prob=0.3, re_count=2, color_jitter=0.4)
    steps = image_transform((16, 20), True, aug_cfg=aug, interpolation="bilinear").transforms
    shown = " ".join(map(repr, steps))
    assert "size=(16, 20), scale=(0.9, 1.0), ratio=(0.8, 1.2), interpolation=bilinear" in shown
    assert "ColorJitter(brightness=(0.6, 1.4)" in shown
    assert "RandomErasing(p=0.3, mode=pixel, count=(1, 2))" in shown
    assert "Flip" not in shown


def test_settings_without_effect_warn(caplog):
    image_transform(16, True, aug_cfg={"re_prob": 0.1, "ratio": (1, 2), "color_jitter": 0.4})
    assert "ratio, re_prob have no effect without use_timm" in caplog.text
    assert "color_jitter has no effect without color_jitter_prob" in caplog.text
    caplog.clear()
    image_transform(16, True, aug_cfg={"use_timm": True, "gray_scale_prob": 0.1})
    assert "gray_scale_prob has no effect with use_timm" in caplog.text
    caplog.clear()
    image_transform(16, True, aug_cfg={"color_jitter_prob": 0.0, "gray_scale_prob": 0.0})
    assert not caplog.text


def test_jitter_and_grayscale_have_the_given_probability():
    random.seed(0)
    grayed = [np.ptp(np.asarray(gray_scale(0.2)(PHOTO)).astype(int), axis=2).max() == 0 for _ in range(1000)]
    assert 150 < sum(grayed) < 250
    jitter = color_jitter(0.5, 0.5, 0.5, 0.1, p=0.8)
    assert 150 < sum(jitter(PHOTO) is PHOTO for _ in range(1000)) < 250


def test_single_steps():
    tensor = torch.zeros(3, 4, 4)
    assert MaybeToTensor()(tensor) is tensor
    assert MaybeConvertMode()(tensor) is tensor
    assert MaybeConvertMode()(PHOTO) is PHOTO
    assert MaybeConvertMode("L")(PHOTO).mode == "L"
    assert MaybeToTensor()(PHOTO).shape == (3, 50, 70)


def test_transforms_can_be_pickled_for_worker_processes():
    aug = {"color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.8, "gray_scale_prob": 0.2}
    for transform in (image_transform(16, False), image_transform(16, True, aug_cfg=aug)):
        copy = pickle.loads(pickle.dumps(transform))
        seed_all(0)
        expected = transform(PHOTO)
        seed_all(0)
        assert torch.equal(copy(PHOTO), expected)


def test_import_does_not_load_torchvision():
    code = "import sys, open_clip.transform; assert not {'torchvision', 'timm', 'PIL'} & set(sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


def counting_fast_path(transform):
    calls = []
    fast = transform._fast
    transform._fast = lambda image, **options: (calls.append(1), fast(image, **options))[1]
    return calls


@pytest.mark.parametrize("is_train", [False, True])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_the_fast_path_is_used_until_its_steps_change(is_train, resize_mode):
    def edited(edit):
        transform = image_transform(16, is_train, resize_mode=resize_mode)
        calls = counting_fast_path(transform)
        edit(transform)
        transform(PHOTO)
        return not calls

    steps_after_it = [
        lambda transform: None,
        lambda transform: setattr(transform.transforms[-1], "mean", (0, 0, 0)),
        lambda transform: transform.transforms.pop(),
        lambda transform: transform.transforms[0].eval(),
    ]
    its_own_steps = [
        lambda transform: setattr(transform.transforms[0], "size", (16, 16) if resize_mode == "shortest" else 16),
        lambda transform: setattr(transform.transforms[0], "size", np.array([16, 16])),
        lambda transform: setattr(transform.transforms[0], "extra", 1),
        lambda transform: setattr(transform.transforms[0], "forward", lambda image: image),
        lambda transform: transform.transforms[0].register_forward_pre_hook(lambda module, args: None),
        lambda transform: transform.transforms.insert(0, lambda image: image),
        lambda transform: transform.transforms.pop(0),
    ]
    if is_train:  # the crop's size is already a pair
        its_own_steps[0] = lambda transform: setattr(transform.transforms[0], "scale", (0.5, 1))
    assert [edited(edit) for edit in steps_after_it] == [False] * len(steps_after_it)
    assert [edited(edit) for edit in its_own_steps] == [True] * len(its_own_steps)


@pytest.mark.parametrize("num_steps", [2, 3])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_list_that_ends_before_the_tensor_returns_an_image(num_steps, mode):
    transform = image_transform(16, False)
    del transform.transforms[num_steps:]
    image = transform(PHOTO.convert(mode))
    assert image.size == (16, 16)
    assert image.mode == (mode if num_steps == 2 else "RGB")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P"])
@pytest.mark.parametrize("is_train", [False, True])
def test_the_fused_end_gives_the_bits_of_the_steps(mode, is_train):
    whole, stepwise = (image_transform(16, is_train) for _ in range(2))
    stepwise.transforms[-1] = copy.deepcopy(stepwise.transforms[-1])  # another object, so each step is called
    image = odd_image(mode, "photo")
    seed_all(0)
    expected = stepwise(image)
    seed_all(0)
    found = whole(image)
    assert torch.equal(found, expected)
    assert found.is_contiguous()


def test_pixels_are_a_plain_contiguous_tensor():
    pixels = image_transform(16, False).without_normalization()(PHOTO)
    assert (pixels.dtype, pixels.shape, pixels.is_contiguous()) == (torch.uint8, (3, 16, 16), True)


def test_copies_use_the_fast_path():
    transform = image_transform(16, False)
    for same in (pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform)):
        calls = counting_fast_path(same)
        same(PHOTO)
        assert calls


def test_an_empty_list_returns_the_image():
    transform = image_transform(16, False)
    transform.transforms.clear()
    assert transform(PHOTO) is PHOTO


@pytest.mark.parametrize(
    ("height", "width", "levels"), [(135, 337, 0), (134, 214, 0), (223, 225, 0), (224, 300, 0), (300, 900, 1)]
)
def test_noise_gives_torchvisions_pixels(height, width, levels):
    """Exactly if the image is enlarged, otherwise within one level."""
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose([transforms.Resize(224, bicubic), transforms.CenterCrop(224)])
    rng = np.random.default_rng(0)
    for _ in range(4):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        ours = np.asarray(to_pil(image_resize.resize_center_crop(image, 224, "bicubic"))).astype(int)
        assert np.abs(ours - np.asarray(theirs(image))).max() <= levels


def jpeg_file(width, height):
    file = io.BytesIO()
    PHOTO.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("is_train", [False, True])
@pytest.mark.parametrize(
    ("size", "decoded"), [((140, 100), (70, 50)), ((70, 50), (70, 50)), ((500, 500), (63, 63)), ((80, 80), (80, 80))]
)
def test_fast_decode_reads_large_jpegs_at_a_reduced_size(is_train, size, decoded):
    transform = image_transform(45, is_train)
    pixels = transform.without_normalization()
    plain = jpeg_file(*size)
    seed_all(0)
    expected = pixels(plain)
    assert plain.size == size
    pixels.fast_decode = True
    assert transform.fast_decode
    reduced = jpeg_file(*size)
    seed_all(0)
    found = pixels(reduced)
    assert reduced.size == decoded
    assert torch.equal(found, expected) == (size == decoded)
    if not is_train:  # the random crop of an image of another size is another one
        assert (found.int() - expected.int()).abs().float().mean() < 8


def test_fast_decode_leaves_other_images_unchanged():
    plain, reduced = image_transform(16, False), image_transform(16, False)
    reduced.fast_decode = True
    for image in (PHOTO, png(PHOTO)):
        assert torch.equal(reduced(image), plain(image))
    loaded = jpeg_file(140, 100)
    loaded.load()
    assert torch.equal(reduced(loaded), plain(loaded))
