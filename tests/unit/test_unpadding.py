"""Tests of training.unpadding: which form each input of a batch gets, for which models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import open_clip
from open_clip import device as devices
from open_clip.packed_patches import PackedPatches
from open_clip.text_groups import GroupedText, PackedText
from towers import CPU, FP32
from training import components
from training.batches import num_samples, num_tokens, to_device
from training.evaluate import create_evaluators
from training.evaluators.retrieval import RetrievalEvaluator
from training.evaluators.zero_shot import classify
from training.params import EvalConfig, parse_args
from training.unpadding import KEEP_TEXTS, PaddingOptions, PaddingReader, Unpadding

VALID = torch.tensor([[True, True, False], [True, True, True]])


class Reader(nn.Module):
    """A model that takes any form of texts and images, and returns features of the number of tokens."""

    def __init__(self, packs_text: bool = True, packs_patches: bool = True, longest: int = 0) -> None:
        super().__init__()
        self.takes_grouped_text, self.takes_packed_text = True, packs_text
        self.visual = nn.Identity()
        self.visual.takes_packed_patches = packs_patches
        self.longest = longest
        self.seen: list[tuple[type, type]] = []

    def text_lengths(self, text: Tensor) -> Tensor:
        return (text != 0).sum(dim=1).clamp(min=self.longest)

    def forward(self, image: Any = None, text: Any = None) -> dict[str, Tensor]:
        self.seen.append((type(image), type(text)))
        names = [name for name, value in (("image", image), ("text", text)) if value is not None]
        return {f"{name}_features": torch.eye(4) for name in names} | {"logit_scale": torch.tensor(1.0)}


def texts(*lengths: int, width: int = 40) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def images() -> dict[str, Tensor]:
    return {
        "patches": torch.zeros(2, 3, 12),
        "patch_coord": torch.zeros(2, 3, 2, dtype=torch.int64),
        "patch_valid": VALID,
    }


def unpad(batch: dict[str, Any], *models: Any, **options: Any) -> dict[str, Any]:
    return Unpadding(models, CPU, PaddingOptions(**options))(batch)


def test_texts_are_packed_to_what_any_model_needs():
    batch = {"image": torch.zeros(3, 3, 4, 4), "text": texts(5, 2, 30), "key": list("abc")}
    packed = unpad(batch, Reader(), None)
    assert packed["text"].segments.lengths == (5, 2, 30)
    assert packed["image"] is batch["image"]
    assert packed["key"] is batch["key"]
    assert unpad(batch, Reader(), Reader(longest=7))["text"].segments.lengths == (7, 7, 30)
    assert (num_samples(packed, "text"), num_tokens(packed)) == (3, {"text": 37})


def test_texts_that_one_model_cannot_take_packed_are_grouped():
    text = texts(*[5] * 40, *[38] * 8)
    batch = {"text": text}
    assert isinstance(unpad(batch, Reader(), Reader(packs_text=False))["text"], GroupedText)
    assert isinstance(unpad(batch, Reader(), packing="off")["text"], GroupedText)
    assert unpad(batch, Reader(), packing="off", max_groups=0)["text"] is text
    assert unpad(batch, Reader(), nn.Identity())["text"] is text
    assert unpad(batch)["text"] is text


def test_patches_are_packed_unless_a_model_needs_the_padding():
    batch = {"image": images(), "text": texts(3, 2)}
    assert unpad(batch, Reader())["image"].segments.lengths == (2, 3)
    assert unpad(batch, Reader(), Reader(packs_patches=False))["image"] is batch["image"]
    assert unpad(batch, Reader(), packing="off")["image"] is batch["image"]
    other = {"pixels": torch.zeros(2, 3, 4, 4)}
    assert unpad({"image": other}, Reader(packs_patches=False))["image"] is other


def test_the_device_decides_what_auto_means(monkeypatch):
    assert all(devices.get(torch.device(name)).packs_sequences for name in ("cpu", "cuda"))
    monkeypatch.setattr(devices.CpuDevice, "packs_sequences", False)
    batch = {"image": images(), "text": texts(3, 2)}
    assert unpad(batch, Reader())["image"] is batch["image"]
    assert isinstance(unpad(batch, Reader(), packing="on")["image"], PackedPatches)


def test_packed_inputs_are_pinned_where_that_makes_copies_asynchronous(monkeypatch):
    monkeypatch.setattr(devices.CpuDevice, "pin_memory", True)
    for kind in (PackedPatches, PackedText):
        monkeypatch.setattr(kind, "pin_memory", lambda self: f"pinned {type(self).__name__}")
    packed = unpad({"image": images(), "text": texts(3, 2)}, Reader())
    assert packed == {"image": "pinned PackedPatches", "text": "pinned PackedText"}


def test_valid_places_give_the_lengths_that_a_model_does_not_know():
    text = texts(3, 3, width=3)
    unknown = SimpleNamespace(takes_packed_text=True, ignores_padding=True)
    batch = {"text": text, "text_valid": VALID}
    assert unpad(batch, unknown)["text"].segments.lengths == (2, 3)
    assert unpad(batch, Reader())["text"].segments.lengths == (3, 3), "a model knows what it reads"
    unknown.ignores_padding = False
    assert unpad(batch, unknown)["text"] is text


def test_hooks_of_sharding_do_not_change_what_the_model_takes():
    model = open_clip.CLIP(
        8, {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        {"context_length": 77, "width": 16, "heads": 2, "layers": 1},
    )  # fmt: skip
    text = torch.randint(1, 60, (64, 77)).scatter(1, torch.tensor([5] * 40 + [60] * 24)[:, None], 49407)
    reader = PaddingReader(model)
    model.register_forward_pre_hook(lambda module, args: None)
    assert isinstance(unpad({"text": text}, reader)["text"], GroupedText)
    assert unpad({"text": text}, model)["text"] is text
    assert PaddingReader(Reader()).takes_packed_patches


def test_packing_that_no_model_can_do_is_an_error():
    options = PaddingOptions(packing="on")
    with pytest.raises(ValueError, match="--packing on: the model has neither"):
        Unpadding([Reader(packs_text=False, packs_patches=False)], CPU, options).check_packs()
    with pytest.raises(ValueError, match="or --distill-model has not"):
        Unpadding([Reader(), nn.Identity()], CPU, options).check_packs()
    Unpadding([Reader(packs_text=False)], CPU, options).check_packs()


@pytest.mark.parametrize(
    ("packing", "is_compiled", "expected"),
    [("auto", False, True), ("auto", True, False), ("on", True, True), ("off", False, False)],
)
def test_a_run_that_compiles_packs_only_if_asked_to(packing, is_compiled, expected):
    cfg = SimpleNamespace(model=SimpleNamespace(packing=packing, text_groups=4))
    run = SimpleNamespace(cfg=cfg, world=SimpleNamespace(device=CPU))
    compiled = SimpleNamespace(is_enabled=is_compiled, takes_any_length=True)
    made = components._create_unpadding([Reader()], run, compiled, SimpleNamespace(is_enabled=False))
    assert isinstance(made({"image": images()})["image"], PackedPatches) is expected


def test_packing_and_a_graph_of_fixed_shapes_exclude_each_other():
    flags = ["--torchcompile", "--packing", "on", "--dataset-type", "synthetic", "--train-num-samples", "8"]
    parse_args(flags)
    with pytest.raises(SystemExit):
        parse_args([*flags, "--torchcompile-strategy", "model"])


class Loader(list):
    num_samples, classes = 4, None


def test_evaluators_pack_images_and_keep_texts_that_cannot_be_packed():
    """Groups of texts would change the last bits of features with the batch."""
    four = {name: torch.cat([value] * 2) for name, value in images().items()}
    loader = Loader([{"image": four, "text": texts(5, 2, 30, 9)}])
    data = {"val": SimpleNamespace(dataloader=loader)}
    for packs_text, kinds in ((True, (PackedPatches, PackedText)), (False, (PackedPatches, Tensor))):
        model = Reader(packs_text)
        metrics = dict(RetrievalEvaluator(data, EvalConfig(), FP32, list).run(model, 1))
        assert (metrics["image_to_text_R@1"], model.seen) == (1.0, [kinds])
    model = Reader()
    off = PaddingOptions(max_groups=0, packing="off")
    (scheduled,) = create_evaluators(data, EvalConfig(), FP32, list, off)
    dict(scheduled.evaluator.run(model, 1))
    assert model.seen == [(dict, Tensor)]
    labelled = Loader([{"image": four, "label": torch.arange(4)}])
    assert classify(model, torch.eye(4), labelled, FP32) == (1.0, 1.0)
    assert model.seen[-1] == (PackedPatches, type(None))
    assert KEEP_TEXTS.max_groups == 0


def test_a_batch_is_unpadded_before_it_is_moved():
    batch = {"image": images(), "text": texts(3, 2), "text_valid": texts(3, 2).bool()}
    moved = to_device(batch, CPU, unpad=Unpadding([Reader()], CPU))
    assert isinstance(moved["image"], PackedPatches)
    assert num_tokens(moved) == {"image": 5, "text": 5}
