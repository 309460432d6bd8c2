"""Pixels without Pillow's copies: views of its memory, and torchvision's JPEG decoder."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import open_clip
from open_clip.transform import jpeg
from open_clip.transform.jpeg import decode_jpeg
from open_clip.transform.pillow_memory import view_pixels
from open_clip.transform.resize import _draw_crop


def photo(width: int = 96, height: int = 72) -> Image.Image:
    colors = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_view_has_the_pixels_of_the_image(mode):
    image = photo().convert(mode)
    view = view_pixels(image)
    assert view.shape == (72, 96, 4 if mode == "RGB" else 1)
    assert (view[..., :3].squeeze() == np.asarray(image)).all()


def test_the_view_shares_the_memory_and_outlives_the_image():
    image = photo()
    view, expected = view_pixels(image), np.asarray(image).copy()
    image.putpixel((3, 2), (1, 2, 3))
    assert view[2, 3, :3].tolist() == [1, 2, 3]
    image.putpixel((3, 2), tuple(expected[2, 3].tolist()))
    del image
    photo(960, 720)  # might reuse the memory, if it was freed
    assert (view[..., :3] == expected).all()


def test_images_with_several_blocks_of_memory_are_copied():
    image = Image.new("RGB", (2100, 2100), (7, 8, 9))
    with pytest.raises(ValueError, match=r"not contiguous|block"):
        image.__arrow_c_array__()
    assert (view_pixels(image)[..., :3] == [7, 8, 9]).all()


def test_pillow_without_the_arrow_interface(monkeypatch):
    monkeypatch.delattr(Image.Image, "__arrow_c_array__")
    image = photo()
    assert (view_pixels(image)[..., :3] == np.asarray(image)).all()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30, "restart_marker_blocks": 4}]
)
def test_decoded_pixels_equal_pillows(options):
    data = encoded(photo(97, 71), **options)
    pixels = decode_jpeg(Image.open(io.BytesIO(data)))
    assert pixels is not None
    assert (pixels.numpy() == np.asarray(Image.open(io.BytesIO(data)))).all()


def opened(data: bytes, **draft) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    if draft:
        image.draft(None, draft["size"])
    return image


@pytest.mark.parametrize(
    "image",
    [
        photo(),
        opened(encoded(photo().convert("L"))),
        opened(encoded(photo().convert("CMYK"))),
        opened(encoded(photo(800, 600)), size=(100, 75)),
    ],
    ids=["in memory", "gray", "CMYK", "reduced by draft"],
)
def test_pillow_decodes_everything_else(image):
    assert decode_jpeg(image) is None


def test_a_loaded_image_is_not_decoded_again():
    image = opened(encoded(photo()))
    image.load()
    assert decode_jpeg(image) is None


def outcome(data: bytes, read) -> np.ndarray | None:
    try:
        return np.asarray(read(Image.open(io.BytesIO(data))))
    except Exception:
        return None


def read_with_torchvision(image: Image.Image):
    pixels = decode_jpeg(image)
    return image if pixels is None else pixels.numpy()


def test_damaged_files_are_read_or_refused_as_pillow_does():
    whole = [encoded(photo()), encoded(photo(), progressive=True)]
    draw = random.Random(0)
    refused = accepted = 0
    for _ in range(400):
        data = bytearray(draw.choice(whole))
        if draw.random() < 0.4:
            del data[draw.randrange(len(data)) :]
        for _ in range(draw.randrange(4)):
            data[draw.randrange(len(data))] = draw.randrange(256) if data else 0
        expected, actual = (outcome(bytes(data), read) for read in (Image.Image.copy, read_with_torchvision))
        assert (expected is None) == (actual is None)
        if expected is None:
            refused += 1
        else:
            accepted += 1
            assert np.array_equal(expected, actual)
    assert min(refused, accepted) > 100


def test_pixels_of_temporary_images_equal_those_of_others():
    data = encoded(photo(640, 480))
    for is_train in (False, True):
        transform = open_clip.image_transform(224, is_train=is_train)
        results = []
        for is_temporary in (False, True):
            image = Image.open(io.BytesIO(data))
            torch.manual_seed(0)
            results.append(transform.pixels(image, is_temporary=is_temporary))
            assert bool(image.tile) is is_temporary  # only a temporary image is left without its pixels
        assert (results[0] == results[1]).all()


def test_without_an_equal_decoder_pillow_is_used(monkeypatch):
    jpeg._has_same_decoder.cache_clear()
    monkeypatch.setattr(jpeg, "_decode", lambda data: torch.zeros(20, 28, 3, dtype=torch.uint8))
    assert decode_jpeg(opened(encoded(photo()))) is None
    monkeypatch.undo()
    jpeg._has_same_decoder.cache_clear()


def test_crops_and_draws_equal_torchvisions():
    draw = random.Random(0)
    for seed in range(600):
        width, height = draw.randint(1, 9) if seed % 3 else draw.randint(1, 900), draw.randint(1, 900)
        scale, ratio = draw.choice([(0.9, 1.0), (0.08, 1.0)]), draw.choice([(3 / 4, 4 / 3), (1.0, 1.0)])
        torch.manual_seed(seed)
        crop, after = _draw_crop(width, height, scale, ratio), torch.rand(1)
        torch.manual_seed(seed)
        image = Image.new("L", (width, height))
        top, left, crop_height, crop_width = RandomResizedCrop.get_params(image, list(scale), list(ratio))
        assert crop == (left, top, left + crop_width, top + crop_height)
        assert after == torch.rand(1)
