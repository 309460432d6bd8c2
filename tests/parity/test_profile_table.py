"""The profiler against the published table, against a count by hand, and against open_clip_torch's parameters."""
from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from open_clip import config
from training import profiler

FIXTURES = Path(__file__).parent / "fixtures"
PARAMETERS = json.loads((FIXTURES / "native_parameters.json").read_text(encoding="utf-8"))
with open(FIXTURES / "profile_examples.csv", newline="", encoding="utf-8") as table:
    PUBLISHED = list(csv.DictReader(table))
NATIVE = sorted(PARAMETERS)


@functools.cache
def profile(name: str) -> dict[str, Any]:
    return profiler.profile_model(name)


def cells(row: dict[str, Any]) -> dict[str, str]:
    return {column: str(value) for column, value in row.items()}


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda row: row["model"])
def test_rows_as_published(published):
    try:
        row = profile(published["model"])
    except NotImplementedError as error:
        assert published["model"] not in NATIVE
        pytest.skip(str(error))
    assert cells(row) == published


# Those of open_clip_torch 3.3.0's own code: the published ones are of an older decoder, which saw one token more.
COCA = {
    "coca_ViT-B-32": (253.56, 33.14, 9.19, 5.96),
    "coca_base": (440.34, 98.67, 46.47, 13.3),
    "coca_ViT-L-14": (638.45, 214.12, 163.64, 13.3),
}


@pytest.mark.parametrize("name", COCA)
def test_captioners_as_open_clip_computes_them(name):
    row = profile(name)
    assert tuple(row[column] for column in ("mparams", "gflops", "image_gflops", "text_gflops")) == COCA[name]


def test_columns_are_the_published_ones():
    assert list(PUBLISHED[0]) == list(profiler.COLUMNS) == list(profile("ViT-B-32"))


def block_flops(tokens: int, width: int, hidden: int) -> int:
    """Multiply-adds twice: the four projections, the two products of attention, the two layers of the MLP."""
    return 2 * (4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden)


def flops_by_hand(name: str) -> tuple[int, int]:
    """FLOPs of the image and of the text tower, from the configuration alone."""
    cfg = config.get_model_config(name)
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    width, patches = vision["width"], (vision["image_size"] // vision["patch_size"]) ** 2
    hidden = int(width * vision.get("mlp_ratio", 4.0))
    image = 2 * patches * 3 * vision["patch_size"] ** 2 * width
    image += vision["layers"] * block_flops(patches + 1, width, hidden)
    image += 2 * width * cfg["embed_dim"]
    width = text["width"]
    words = text["layers"] * block_flops(text["context_length"], width, int(width * text.get("mlp_ratio", 4.0)))
    words += 2 * width * cfg["embed_dim"]
    return image, words


@pytest.mark.parametrize("name", NATIVE)
def test_every_native_architecture(name):
    row, parameters = profile(name), PARAMETERS[name]
    assert [row["mparams"], row["image_mparams"], row["text_mparams"]] == [
        round(parameters[part] / 1e6, 2) for part in ("total", "image", "text")
    ]
    image, text = flops_by_hand(name)
    assert [row["gflops"], row["image_gflops"], row["text_gflops"]] == [
        round(flops / 1e9, 2) for flops in (image + text, image, text)
    ]


def test_all_native_architectures_are_here():
    """Those that need no tower from elsewhere: 45 of the 144."""
    def native(cfg: dict) -> bool:
        vision, text = cfg["vision_cfg"], cfg["text_cfg"]
        foreign = "timm_model_name" in vision or isinstance(vision.get("layers"), list) or "hf_model_name" in text
        return not foreign and "multimodal_cfg" not in cfg

    assert [name for name in sorted(config.list_models()) if native(config.get_model_config(name))] == NATIVE
    assert len(NATIVE) == 45
