"""Programs that take the preprocessing apart: look for steps by class, edit the list, call steps alone."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from torchvision.transforms import InterpolationMode

import open_clip
from open_clip.transform import CenterCropOrPad, MaybeConvertMode, MaybeToTensor, ResizeKeepRatio, image_transform

LEVEL = 1 / 255


def photo(mode: str = "RGB", width: int = 120, height: int = 90) -> Image.Image:
    """Smooth, as photographs are: what rounding differs by is small there."""
    y, x = np.mgrid[0:height, 0:width]
    levels = np.stack([x * 2, y * 2, (x + y)], -1) % 256
    return Image.fromarray(levels.astype(np.uint8)).convert(mode)


def plain(size: int = 64, **options) -> T.Compose:
    """Validation transform whose values are levels / 255."""
    return image_transform(size, False, mean=(0, 0, 0), std=(1, 1, 1), **options)


def names(transform) -> list[str]:
    return [type(step).__name__ for step in transform.transforms]


LAST = ["MaybeConvertMode", "MaybeToTensor", "Normalize"]


@pytest.mark.parametrize("interpolation", [None, "bicubic", "bilinear", "random"])
@pytest.mark.parametrize("size", [64, (64, 64), (64, 80)])
@pytest.mark.parametrize("resize_mode", [None, "shortest", "longest", "squash"])
def test_validation_steps(resize_mode, size, interpolation):
    transform = image_transform(size, False, resize_mode=resize_mode, interpolation=interpolation)
    assert isinstance(transform, T.Compose)
    if resize_mode == "squash":
        first = ["Resize"]
    elif resize_mode == "longest":
        first = ["ResizeKeepRatio", "CenterCropOrPad"]
    else:
        first = ["ResizeKeepRatio" if size == (64, 80) else "Resize", "CenterCrop"]
    assert names(transform) == first + LAST
    mode = InterpolationMode.BILINEAR if interpolation == "bilinear" else InterpolationMode.BICUBIC
    if first != ["ResizeKeepRatio", "CenterCrop"]:  # open_clip 3.3.0 ignores the interpolation there
        assert transform.transforms[0].interpolation == mode
    assert transform(photo()).shape == (3, *((64, 80) if size == (64, 80) else (64, 64)))


def test_steps_are_found_by_class():
    steps = plain().transforms
    classes = (T.Resize, T.CenterCrop, MaybeConvertMode, T.ToTensor, T.Normalize)
    assert [sum(isinstance(step, cls) for step in steps) for cls in classes] == [1, 1, 1, 1, 1]
    assert isinstance(steps[3], MaybeToTensor)
    squash = plain(resize_mode="squash").transforms
    assert isinstance(squash[0], T.Resize)
    longest = plain(resize_mode="longest", fill_color=7).transforms
    assert isinstance(longest[0], ResizeKeepRatio)
    assert isinstance(longest[1], CenterCropOrPad)
    assert (longest[0].longest, longest[1].fill) == (1.0, 7)


def test_settings_of_steps_are_read():
    steps = image_transform(64, False).transforms
    assert steps[0].size == 64
    assert steps[0].max_size is None
    assert steps[0].antialias is True
    assert tuple(steps[1].size) == (64, 64)
    assert tuple(steps[-1].mean) == open_clip.OPENAI_DATASET_MEAN
    assert tuple(steps[-1].std) == open_clip.OPENAI_DATASET_STD
    assert tuple(image_transform(64, False, resize_mode="squash").transforms[0].size) == (64, 64)


def test_repr_is_torchvisions():
    lines = repr(image_transform(64, False)).split("\n")
    assert lines[0] == "Compose("
    assert lines[1] == "    Resize(size=64, interpolation=bicubic, max_size=None, antialias=True)"
    assert lines[2] == "    CenterCrop(size=(64, 64))"
    assert lines[5].startswith("    Normalize(mean=(0.48145466, 0.4578275, 0.40821073), std=(")
    assert lines[6] == ")"


@pytest.mark.parametrize(
    ("aug_cfg", "between"),
    [
        (None, []),
        ({"scale": (0.4, 1.0)}, []),
        (
            {"color_jitter": (0.1, 0.2, 0.3, 0.1), "color_jitter_prob": 0.8, "gray_scale_prob": 0.2},
            ["color_jitter", "gray_scale"],
        ),
    ],
)
@pytest.mark.parametrize("size", [64, (64, 80)])
def test_training_steps(aug_cfg, between, size):
    transform = image_transform(size, True, aug_cfg=aug_cfg)
    assert isinstance(transform, T.Compose)
    assert names(transform) == ["RandomResizedCrop", "MaybeConvertMode", *between, "MaybeToTensor", "Normalize"]
    crop = transform.transforms[0]
    assert isinstance(crop, T.RandomResizedCrop)
    assert crop.interpolation == InterpolationMode.BICUBIC
    assert tuple(crop.size) == ((64, 80) if size == (64, 80) else (64, 64))
    assert tuple(crop.scale) == ((aug_cfg or {}).get("scale") or (0.9, 1.0))


def test_timm_training_steps():
    pytest.importorskip("timm")
    aug = {"use_timm": True, "color_jitter": 0.4, "re_prob": 0.2}
    assert names(image_transform(64, True, aug_cfg=aug)) == [
        "RandomResizedCropAndInterpolation", "ColorJitter", "MaybeToTensor", "Normalize", "RandomErasing"
    ]  # fmt: skip


def test_the_training_crop_draws_what_torchvision_draws():
    transform = image_transform(64, True, mean=(0, 0, 0), std=(1, 1, 1), aug_cfg={"scale": (0.3, 1.0)})
    crop = T.RandomResizedCrop(64, scale=(0.3, 1.0), interpolation=InterpolationMode.BICUBIC)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = T.ToTensor()(crop(photo()))
        torch.manual_seed(seed)
        assert (transform(photo()) - expected).abs().max() <= 1.01 * LEVEL


def test_replacing_the_resize():
    transform = plain()
    transform.transforms[0] = T.Resize(36, InterpolationMode.BICUBIC)
    assert transform(photo()).shape == (3, 64, 64)  # CenterCrop pads with black
    assert transform(photo())[:, 0].abs().max() == 0
    transform.transforms[:2] = [T.Resize((40, 48))]
    assert transform(photo()).shape == (3, 40, 48)


def test_dropping_the_crop():
    transform = plain()
    without = T.Compose([step for step in transform.transforms if not isinstance(step, T.CenterCrop)])
    assert without(photo()).shape == (3, 64, 85)
    del transform.transforms[1]
    assert transform(photo()).shape == (3, 64, 85)


def test_changing_attributes_of_steps():
    transform = plain()
    transform.transforms[1].size = (32, 48)
    assert transform(photo()).shape == (3, 32, 48)
    transform.transforms[0].size = 40
    assert transform(photo())[:, :, 0].sum() > 0
    expected = T.Compose([T.Resize(40, InterpolationMode.BICUBIC), T.CenterCrop((32, 48)), T.ToTensor()])(photo())
    torch.testing.assert_close(transform(photo()), expected)
    train = image_transform(64, True)
    train.transforms[0].size = (20, 24)
    assert train(photo()).shape == (3, 20, 24)


def test_changing_the_normalization():
    transform = plain()
    before = transform(photo())
    transform.transforms[-1].mean = (0.5, 0.5, 0.5)
    torch.testing.assert_close(transform(photo()), before - 0.5)
    transform.transforms.pop()
    torch.testing.assert_close(transform(photo()), before)


def test_inserting_steps():
    transform = plain()
    transform.transforms.insert(0, T.Pad(10, fill=255))
    assert transform(photo())[:, 0, 0].min() > 0.9
    transform = plain()
    transform.transforms.insert(2, T.Grayscale(3))
    shown = transform(photo())
    torch.testing.assert_close(shown[0], shown[2])
    transform = plain()
    transform.transforms.append(lambda tensor: tensor.flip(-1))
    torch.testing.assert_close(transform(photo()).flip(-1), plain()(photo()))


def test_a_first_step_of_the_clients_takes_what_it_wants(tmp_path):
    photo().save(tmp_path / "photo.png")
    transform = plain()
    transform.transforms.insert(0, lambda path: Image.open(path).convert("RGB"))
    torch.testing.assert_close(transform(tmp_path / "photo.png"), plain()(photo()), atol=1.01 * LEVEL, rtol=0)


def test_hooks_of_steps_are_called():
    transform = plain()
    seen = []
    transform.transforms[0].register_forward_hook(lambda module, args, output: seen.append(output.size))
    transform(photo())
    assert seen == [(85, 64)]


def test_parts_of_the_list():
    steps = plain().transforms
    shown = T.Compose(steps[:2])(photo())
    assert isinstance(shown, Image.Image)
    assert shown.size == (64, 64)
    assert T.Compose(steps[:1])(photo()).size == (85, 64)
    torch.testing.assert_close(T.Compose(steps)(photo()), plain()(photo()), atol=1.01 * LEVEL, rtol=0)


@pytest.mark.parametrize("options", [{}, {"resize_mode": "squash"}, {"resize_mode": "longest"}])
def test_each_step_alone(options):
    image = photo()
    for step in plain(**options).transforms:
        image = step(image)
    torch.testing.assert_close(image, plain(**options)(photo()), atol=1.01 * LEVEL, rtol=0)


def test_same_pixels_as_torchvision():
    steps = [T.Resize(64, InterpolationMode.BICUBIC), T.CenterCrop(64), T.ToTensor()]
    for mode in ("RGB", "L", "RGBA", "CMYK", "P"):
        for width, height in ((120, 90), (90, 120), (64, 64), (200, 70)):
            expected = T.Compose([T.Resize(64, InterpolationMode.BICUBIC), T.CenterCrop(64)])(
                photo(mode, width, height)
            )
            expected = steps[-1](expected.convert("RGB"))
            assert (plain()(photo(mode, width, height)) - expected).abs().max() <= 1.01 * LEVEL


@pytest.mark.parametrize("is_train", [False, True])
def test_float_tensors(is_train):
    transform = image_transform(64, is_train)
    assert transform(torch.rand(3, 90, 120)).shape == (3, 64, 64)
    assert transform(torch.rand(2, 3, 90, 120)).shape == (2, 3, 64, 64)
    with pytest.raises(TypeError, match="float tensor"):
        transform(torch.zeros(3, 90, 120, dtype=torch.uint8))


def test_copies():
    transform = plain()
    transform.transforms[1].size = (32, 32)
    for same in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)), copy.copy(transform)):
        assert repr(same) == repr(transform)
        torch.testing.assert_close(same(photo()), transform(photo()))
    other = copy.deepcopy(transform)
    other.transforms[0].size = 80
    assert transform.transforms[0].size == 64


class Photos(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.transform(photo(width=100 + index))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_workers_of_a_data_loader(context):
    transform = plain()
    loader = torch.utils.data.DataLoader(
        Photos(transform), batch_size=4, num_workers=1, multiprocessing_context=context
    )
    (batch,) = list(loader)
    torch.testing.assert_close(batch[3], transform(photo(width=103)))


@pytest.mark.parametrize("what", ["photo.png", None, [1, 2], 3])
def test_anything_else_is_a_type_error(what):
    with pytest.raises(TypeError):
        plain()(what)


@pytest.mark.ours_only("open_clip 3.3.0 takes no arrays")
def test_arrays():
    expected = plain()(photo())
    torch.testing.assert_close(plain()(np.asarray(photo())), expected)
    gray = np.asarray(photo("L"))
    torch.testing.assert_close(plain()(gray), plain()(photo("L")))
    torch.testing.assert_close(plain()(gray[..., None]), plain()(photo("L")))
    torch.testing.assert_close(plain()(np.asarray(photo("RGBA"))), plain()(photo("RGBA")))
    assert image_transform(64, True)(np.asarray(photo())).shape == (3, 64, 64)
    with pytest.raises(TypeError, match=r"got float32 of shape \[90, 120, 3\]"):
        plain()(np.zeros((90, 120, 3), np.float32))
    with pytest.raises(TypeError, match=r"got uint8 of shape \[3, 90, 120\]"):
        plain()(np.zeros((3, 90, 120), np.uint8))


@pytest.mark.ours_only("open_clip 3.3.0 names the type alone")
def test_errors_name_what_was_given():
    for what, message in (
        ("photo.png", "the path 'photo.png': open it with PIL.Image.open"),
        ([photo(), photo()], "a list of 2"),
        (None, "got None"),
        (3.5, "a float"),
    ):
        with pytest.raises(TypeError, match=message):
            plain()(what)
