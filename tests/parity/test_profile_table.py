"""The profiler against the published table, for all architectures, and against a count by hand."""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import Any

import pytest

from open_clip import config
from training import profiler

FIXTURES = Path(__file__).parent / "fixtures"


def table(name: str) -> dict[str, dict[str, str]]:
    with open(FIXTURES / name, newline="", encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


PUBLISHED = table("profile_examples.csv")
# Counted on 3.3.0's own models: as published, but for CoCa, whose published rows are of an older decoder.
COUNTED = table("profile_3.3.0.csv")
# Parameters of Hugging Face's text towers with their projections, of which the published table tells.
HF_TEXT_MPARAMS = {
    "mt5-base-ViT-B-32": 277.86,
    "mt5-xl-ViT-H-14": 1674.68,
    "nllb-clip-base": 414.04,
    "nllb-clip-large": 767.14,
    "roberta-ViT-B-32": 124.87,
    "xlm-roberta-base-ViT-B-32": 278.27,
    "xlm-roberta-large-ViT-H-14": 560.94,
}


@functools.cache
def profile(name: str) -> dict[str, Any]:
    return profiler.profile_model(name)


def cells(row: dict[str, Any]) -> dict[str, str]:
    return {column: str(value) for column, value in row.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_as_published(name: str) -> None:
    assert cells(profile(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", COUNTED)
def test_rows_as_counted_on_open_clips_models(name: str) -> None:
    assert cells(profile(name)) == COUNTED[name]


@pytest.mark.parametrize("name", HF_TEXT_MPARAMS)
def test_parameters_of_hugging_face_text_towers(name: str) -> None:
    assert profile(name)["text_mparams"] == HF_TEXT_MPARAMS[name]


def test_the_recorded_rows_are_the_published_ones() -> None:
    common = PUBLISHED.keys() & COUNTED.keys()
    assert len(common) == 7
    assert len(COUNTED) == 134
    assert all(COUNTED[name] == PUBLISHED[name] for name in common)


def test_columns_are_the_published_ones() -> None:
    assert list(next(iter(PUBLISHED.values()))) == list(profiler.COLUMNS) == list(profile("ViT-B-32"))


def is_native(cfg: dict[str, Any]) -> bool:
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    foreign = "timm_model_name" in vision or isinstance(vision.get("layers"), list) or "hf_model_name" in text
    foreign = foreign or "text_arch" in text
    return not foreign and "multimodal_cfg" not in cfg


NATIVE = [name for name in config.list_models() if is_native(config.get_model_config(name) or {})]


def block_flops(tokens: int, width: int, hidden: int) -> int:
    """Multiply-adds twice: the four projections, the two products of attention, the two layers of the MLP."""
    return 2 * (4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden)


def flops_by_hand(name: str) -> tuple[int, int]:
    """FLOPs of the image and of the text tower, from the configuration alone."""
    cfg = config.get_model_config(name)
    assert cfg is not None
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
def test_native_architectures_by_hand(name: str) -> None:
    row = profile(name)
    image, text = flops_by_hand(name)
    assert [row["gflops"], row["image_gflops"], row["text_gflops"]] == [
        round(flops / 1e9, 2) for flops in (image + text, image, text)
    ]


def test_the_native_architectures_are_45() -> None:
    assert len(NATIVE) == 45
