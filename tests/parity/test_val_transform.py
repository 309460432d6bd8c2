"""Evaluation transforms equal those of open_clip_torch 3.3.0 within one level (record/val_transform.py)."""

from pathlib import Path

import numpy as np
import PIL
import pytest

from odd_images import MODES, SETTINGS, SHAPES, UNIT, odd_image, to_levels
from open_clip.transform import image_transform
from open_clip.transform import resize as image_resize
from versions import is_older

FIXTURE = Path(__file__).parent / "fixtures" / "val_transform.npz"
# Pillow 13 resizes columns of tall images first. Older versions differ from the recorded levels by more than one.
COMPARABLE = [shape for shape in SHAPES if shape != "tall" or int(PIL.__version__.split(".")[0]) >= 13]


@pytest.fixture(scope="module")
def recorded():
    with np.load(FIXTURE) as file:
        names = [name.split("/") for name in file["names"].tolist()]
        answers = {}
        for setting in SETTINGS:
            of_setting = [tuple(name) for name in names if name[0] == setting]
            answers.update(zip(of_setting, file[setting], strict=True))
    return answers


@pytest.mark.parametrize("with_torch", [True, False], ids=["torch", "pillow"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_pixels_equal_the_recorded_ones_within_one_level(recorded, monkeypatch, setting, with_torch):
    monkeypatch.setattr(image_resize, "_has_fast_uint8_resize", lambda: with_torch)
    transform = image_transform(is_train=False, **UNIT, **SETTINGS[setting])
    compared = 0
    for mode in MODES:
        for shape in COMPARABLE:
            ours = to_levels(transform(odd_image(mode, shape)))
            if (setting, mode, shape) not in recorded:
                assert (shape, SETTINGS[setting].get("resize_mode")) == ("line", "longest")
                continue
            theirs = recorded[setting, mode, shape]
            assert ours.shape == theirs.shape
            off = np.abs(ours.astype(int) - theirs).max()
            # Recorded with Pillow 13; with 11.1, RGBA, LA and YCbCr images of the target's size differ by up to 5.
            allowed = 5 if shape == "exact" and is_older("pillow", "13") else 1
            assert off <= allowed, f"{mode} {shape}: {off} levels off"
            compared += 1
    assert compared >= len(MODES) * (len(COMPARABLE) - 1)


def test_both_implementations_of_resizing_are_used(monkeypatch):
    """The vectorized resize is used exactly where it is allowed, so the tests above cover it."""
    monkeypatch.setattr(image_resize, "_has_fast_uint8_resize", lambda: True)

    def agrees(mode: str, name: str, size: tuple[int, int]) -> bool:
        image = odd_image(mode, name)
        return image_resize._torch_agrees(image.mode, (image.height, image.width), size)

    assert agrees("RGB", "photo", (16, 24))
    assert not agrees("RGB", "photo", (50, 75))
    assert not agrees("RGBA", "photo", (16, 24))
    assert not agrees("RGB", "tall", (16, 16))
    assert image_resize._should_use_box(odd_image("RGB", "wide"), 16, (16, 377))
    assert not image_resize._should_use_box(odd_image("RGB", "photo"), 16, (16, 24))
    for mode in ("P", "1", "LA", "RGBA"):
        assert not image_resize._should_use_box(odd_image(mode, "wide"), 16, (16, 377))
