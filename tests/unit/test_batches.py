"""Tests of training.batches: uint8 images from the workers, normalized on the device."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import Normalize, RandomErasing, ToTensor

from data_files import data_args, plain, tokenize, write_csv, write_shards
from open_clip.constants import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INCEPTION_MEAN,
    INCEPTION_STD,
    OPENAI_DATASET_MEAN,
    OPENAI_DATASET_STD,
)
from open_clip.transform import image_transform
from train_runs import write_classes, write_model
from train_runs import write_csv as write_pairs
from training import batches, epoch, main
from training.batches import Normalization, normalization_of, to_device, to_pixels
from training.data import get_data

CPU = torch.device("cpu")
STATISTICS = [
    (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD), (IMAGENET_MEAN, IMAGENET_STD), (INCEPTION_MEAN, INCEPTION_STD),
    ((0.1, 0.2, 0.3), (0.7, 1.1, 1 / 3)),
]  # fmt: skip
TRANSFORMS: dict[str, Callable[[], Any]] = {
    "shortest": lambda: image_transform(16, False),
    "longest": lambda: image_transform(16, False, resize_mode="longest", fill_color=7),
    "squash": lambda: image_transform((16, 20), False, resize_mode="squash"),
    "train": lambda: image_transform(16, True),
    "jitter": lambda: image_transform(
        16, True, aug_cfg={"color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.8, "gray_scale_prob": 0.2}
    ),
    "timm": lambda: image_transform(16, True, IMAGENET_MEAN, IMAGENET_STD, aug_cfg={"use_timm": True}),
    "timm, jitter": lambda: image_transform(16, True, aug_cfg={"use_timm": True, "color_jitter": 0.4}),
}


class Operators(TorchDispatchMode):
    """Records the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def picture(mode: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.mark.parametrize(("mean", "std"), STATISTICS)
def test_normalization_is_bit_identical_to_torchvision(mean, std):
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    expected = Normalize(mean, std)(ToTensor()(Image.fromarray(pixels)))
    found = Normalization(mean, std)(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert found.dtype == torch.float32
    assert torch.equal(found[0], expected)


def test_normalization_is_three_operators():
    normalize, pixels = Normalization(*STATISTICS[0]), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    normalize(pixels)  # creates the constants
    with Operators() as ran:
        normalize(pixels)
    assert ran.names == ["aten::_to_copy", "aten::addcdiv", "aten::div_"]


def test_constants_that_were_made_in_inference_mode_work_in_training():
    normalize, pixels = Normalization(*STATISTICS[0]), torch.ones(2, 3, 4, 4, dtype=torch.uint8)
    with torch.inference_mode():
        expected = normalize(pixels)
    image = normalize(pixels)
    assert not image.is_inference()
    assert torch.equal(image, expected)


def test_only_uint8_images_are_normalized():
    normalize = Normalization(*STATISTICS[0])
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    batch = {"image": pixels, "text": torch.ones(2, 5, dtype=torch.int64), "key": ["a", "b"], "mask": pixels}
    moved = to_device(batch, CPU, normalization=normalize)
    assert torch.equal(moved["image"], normalize(pixels))
    assert moved["mask"].dtype == torch.uint8
    assert (moved["text"].dtype, moved["key"]) == (torch.int64, ["a", "b"])
    half = to_device(batch, CPU, torch.bfloat16, normalization=normalize)["image"]
    assert torch.equal(half, normalize(pixels).bfloat16())
    image = torch.randn(2, 3, 4, 4)
    assert to_device({"image": image}, CPU, normalization=normalize)["image"] is image
    assert to_device({"image": pixels}, CPU)["image"].dtype == torch.uint8
    patches = {"patches": image, "sizes": [(4, 4)]}
    assert to_device({"image": patches}, CPU, normalization=normalize)["image"] == patches


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_pixels_normalized_on_the_device_equal_the_whole_transform(name, mode):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    whole = TRANSFORMS[name]()
    bare = pickle.loads(pickle.dumps(to_pixels(whole)))
    normalize, image = normalization_of(bare), picture(mode)
    for number in range(4):
        seed(number)
        expected, draw = whole(image), torch.rand(()).item()
        seed(number)
        pixels = bare(image)
        assert torch.rand(()).item() == draw
        assert (pixels.dtype, pixels.is_contiguous()) == (torch.uint8, True)
        assert torch.equal(normalize(pixels[None])[0], expected)


def test_the_tensor_of_an_image_of_one_pixel_is_writable():
    to_pixels(image_transform(1, False))(picture("RGB"))[:] = 1


def edited(change: Callable[[list[Any]], Any]) -> Any:
    transform = image_transform(16, False)
    change(transform.transforms)
    return transform


@pytest.mark.parametrize(
    "transform",
    [
        plain,
        edited(lambda steps: steps.append(RandomErasing())),
        edited(lambda steps: steps.insert(-1, RandomErasing())),
        edited(lambda steps: steps.insert(0, lambda image: image)),
        edited(lambda steps: steps.pop()),
        edited(lambda steps: setattr(steps[-1], "mean", (0.0, 0.0, 0.0))),
        edited(lambda steps: steps.__setitem__(-1, Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))),
        edited(lambda steps: steps.clear()),
    ],
    ids=["own", "after", "between", "before", "fewer", "attribute", "replaced", "none"],
)
def test_other_and_edited_transforms_do_not_change(transform):
    assert to_pixels(transform) is transform
    assert normalization_of(transform) is None


def test_steps_on_normalized_tensors_keep_the_float_path():
    pytest.importorskip("timm")
    transform = image_transform(16, True, aug_cfg={"use_timm": True, "re_prob": 0.5})
    assert "RandomErasing" in repr(transform)
    assert to_pixels(transform) is transform


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["csv", "webdataset", "synthetic", "imagefolder"])
def test_loaders_give_uint8_images(tmp_path, kind, workers):
    data = {
        "csv": lambda: {"train_data": str(write_csv(tmp_path, 8))},
        "webdataset": lambda: {"train_data": write_shards(tmp_path, 2, 4), "train_num_samples": 8},
        "synthetic": lambda: {"dataset_type": "synthetic", "train_num_samples": 8},
        "imagefolder": lambda: {"train_data": str(write_classes(tmp_path / "classes", 2))},
    }[kind]()
    args = data_args(workers=workers, **data)
    transforms = image_transform(16, True), image_transform(16, False)
    whole, bare = (
        get_data(args, fns, tokenizer=None if kind in ("synthetic", "imagefolder") else tokenize)["train"].dataloader
        for fns in (transforms, [to_pixels(transform) for transform in transforms])
    )
    for expected, batch in zip(whole, bare, strict=True):
        image = batch["image"]
        assert image.dtype == torch.uint8
        assert image.is_contiguous()
        assert image.nbytes == len(image) * 3 * 16 * 16
        moved = to_device(batch, CPU, normalization=bare.normalization)["image"]
        assert torch.equal(moved, expected["image"])
        assert moved.is_contiguous()
    assert whole.normalization is None
    whole.close()
    bare.close()


def test_scripts_get_floats(tmp_path):
    args = SimpleNamespace(**vars(data_args(train_data=str(write_csv(tmp_path, 8)))))
    transforms = image_transform(16, True), image_transform(16, False)
    images, _ = next(iter(get_data(args, transforms, tokenizer=lambda text: tokenize(text))["train"].dataloader))
    assert images.dtype == torch.float32


def test_the_command_trains_and_evaluates_on_pixels(tmp_path, monkeypatch):
    seen: dict[str, list[tuple[torch.dtype, torch.dtype]]] = {"train": [], "val": [], "zeroshot": []}

    def watch(module: Any, name: str) -> None:
        def move(batch, device, *args, **kwargs):
            moved = to_device(batch, device, *args, **kwargs)
            seen[name].append((batch["image"].dtype, moved["image"].dtype))
            return moved

        monkeypatch.setattr(module, "to_device", move)

    from training.evaluators import retrieval, zero_shot

    for module, name in ((epoch, "train"), (retrieval, "val"), (zero_shot, "zeroshot")):
        watch(module, name)
    pairs, classes = write_pairs(tmp_path / "csv", 8), write_classes(tmp_path / "classes", 1)
    main.main([
        "--model", write_model(tmp_path / "model"), "--train-data", str(pairs), "--val-data", str(pairs),
        "--zeroshot-data", str(classes), "--batch-size", "4", "--epochs", "1", "--workers", "0", "--device", "cpu",
        "--precision", "pure_bf16", "--output-dir", str(tmp_path / "logs"), "--name", "run",
    ])  # fmt: skip
    assert all(seen.values())
    assert {pair for pairs in seen.values() for pair in pairs} == {(torch.uint8, torch.bfloat16)}


def test_images_are_not_copied_after_to_device(monkeypatch):
    """The normalized images are not copied if their dtype is already correct."""
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    normalize = Normalization(*STATISTICS[0])
    normalize(pixels)
    with Operators() as ran:
        batches.to_device({"image": pixels}, CPU, torch.float32, normalization=normalize)
    assert len(ran.names) == 3


def test_fast_decode_is_passed_to_the_transform():
    transform = image_transform(8, is_train=True)
    assert to_pixels(transform, fast_decode=True).fast_decode
    assert not to_pixels(transform).fast_decode
