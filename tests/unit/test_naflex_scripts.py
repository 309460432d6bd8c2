"""Scripts that call `get_data` with a flat namespace that has `use_naflex`, as with open_clip's main branch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_files import jpeg, tokenize, write_tar
from open_clip.transform import NaFlexEvalTransformFactory, NaFlexTransformFactory
from training.batches import to_pixels
from training.data import get_data
from training.params import parse_args

NAFLEX = ["--use-naflex", "--naflex-seq-lens", "4", "16", "--naflex-max-tokens-per-batch", "64", "--workers", "0"]
NAFLEX += ["--naflex-batch-divisor", "4", "--batch-size", "8"]


def cmyk(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(number, 24))).convert("CMYK").resize((40, 16)).save(buffer, "JPEG")
    return buffer.getvalue()


def source(kind: str, folder: Path) -> list[str]:
    """Write 24 pairs of a CMYK image and a caption. Return the options."""
    if kind == "csv":
        for number in range(24):
            (folder / f"{number}.jpg").write_bytes(cmyk(number))
        rows = "".join(f"{folder}/{number}.jpg\tpicture {number}\n" for number in range(24))
        (folder / "pairs.csv").write_text("filepath\ttitle\n" + rows, encoding="utf-8")
        return ["--train-data", f"{folder}/pairs.csv", "--val-data", f"{folder}/pairs.csv"]
    members = [(f"{number:04d}.{ext}", value) for number in range(24)
               for ext, value in (("jpg", cmyk(number)), ("txt", f"picture {number}".encode()))]  # fmt: skip
    write_tar(folder / "0.tar", members)
    sizes = ["--train-num-samples", "24", "--val-num-samples", "24"]
    return ["--train-data", f"{folder}/0.tar", "--val-data", f"{folder}/0.tar", *sizes]


def tokenize_any(captions: str | list[str]) -> torch.Tensor:
    return tokenize([captions] if isinstance(captions, str) else captions)


def load(words: list[str], **attributes: Any) -> dict[str, Any]:
    args = parse_args([*words, *NAFLEX])
    vars(args).update(rank=0, world_size=1, distributed=False, local_rank=0, **attributes)
    factories = [make(max_seq_len=25, patch_size=8) for make in (NaFlexTransformFactory, NaFlexEvalTransformFactory)]
    return get_data(args, factories, tokenizer=tokenize_any)


@pytest.mark.parametrize("kind", ["csv", "shards"])
def test_each_batch_is_a_step_of_one_length(tmp_path, kind):
    data = load(source(kind, tmp_path), naflex_variable_batch=True)
    batches = list(data["train"].dataloader)
    assert len(batches) == data["train"].dataloader.num_batches
    shapes = {tuple(images["patches"].shape) for images, _ in batches}
    assert {length for _, length, _ in shapes} == {4, 16}
    assert all(size * length <= 64 for size, length, _ in shapes)
    assert all(len(texts) == len(images["patches"]) for images, texts in batches)
    assert sum(len(texts) for _, texts in batches) == data["train"].dataloader.num_samples
    assert {images["patches"].shape[1] for images, _ in data["val"].dataloader} == {16}


def test_a_namespace_of_the_main_branch_needs_no_new_attribute(tmp_path):
    args = parse_args([*source("csv", tmp_path), *NAFLEX])
    del args.naflex_variable_batch
    factories = [to_pixels(NaFlexTransformFactory(patch_size=8)), NaFlexEvalTransformFactory(patch_size=8)]
    lengths = {
        images["patches"].shape[1] for images, _ in get_data(args, factories, tokenizer=tokenize)["train"].dataloader
    }
    assert lengths == {4, 16}


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"naflex_variable_batch": False}, "use_naflex: the batches of get_data cannot tell .* = True"),
        (
            {"naflex_variable_batch": True, "naflex_loss_scale": "sqrt"},
            "naflex_loss_scale='sqrt': the batches .* 'none'",
        ),
    ],
    ids=["constant batch", "scaled loss"],
)
def test_what_batches_of_scripts_cannot_have(tmp_path, attributes, message):
    with pytest.raises(ValueError, match=message):
        load(source("csv", tmp_path), **attributes)


def test_a_script_that_only_evaluates_needs_no_steps(tmp_path):
    data = load(source("csv", tmp_path)[2:], naflex_variable_batch=False, naflex_loss_scale="sqrt")
    assert {images["patches"].shape[1] for images, _ in data["val"].dataloader} == {16}


def test_ordinary_transforms_are_an_error(tmp_path):
    args = parse_args([*source("csv", tmp_path), *NAFLEX])
    args.naflex_variable_batch = True
    with pytest.raises(ValueError, match="--use-naflex needs NaFlex transforms, got function and function"):
        get_data(args, (lambda image: image, lambda image: image), tokenizer=tokenize)
