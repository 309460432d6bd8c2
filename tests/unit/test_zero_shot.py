"""Tests of zero-shot evaluation: when it is due, class names, templates, and errors in their files."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from training import precision, zero_shot
from training.evaluators.class_names import read_classnames, read_templates
from training.evaluators.zero_shot import ImageNetEvaluator, classify
from training.params import EvalConfig

CLASSES = ["blue", "green_one", "red"]
FP32 = precision.create("fp32", "cpu")


class Model(nn.Module):
    """A model that embeds images and texts as the one-hot vector of their label."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return image.flatten(1) @ self.weight

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.encode_image(image),)

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return nn.functional.one_hot(text[:, 0], len(self.weight)).float() @ self.weight


class Loader(list):
    def __init__(self, labels: list[int], guesses: list[int], width: int, classes: list[str] | None = None) -> None:
        """Batches of 2 whose images are classified as `guesses`."""
        images = nn.functional.one_hot(torch.tensor(guesses), width).float().view(len(guesses), 1, 1, width)
        pairs = zip(images.split(2), torch.tensor(labels).split(2), strict=True)
        super().__init__({"image": image, "label": label} for image, label in pairs)
        self.num_samples = len(labels)
        if classes is not None:
            self.classes = classes


def tokenizer_for(names: list[str], seen: list[str] | None = None):
    def tokenize(captions: list[str]) -> torch.Tensor:
        if seen is not None:
            seen.extend(captions)
        return torch.tensor([[next(i for i, name in enumerate(names) if name in caption)] for caption in captions])

    return tokenize


def args(**changes) -> SimpleNamespace:
    defaults = {"zeroshot_frequency": 1, "epochs": 4, "precision": "fp32"}
    return SimpleNamespace(**(defaults | {"zeroshot_classnames": None, "zeroshot_templates": None} | changes))


def data(loader: Loader, key: str = "zeroshot") -> dict:
    return {key: SimpleNamespace(dataloader=loader)}


def test_any_folder_of_classes():
    captions: list[str] = []
    tokenizer = tokenizer_for(["blue", "green one", "red"], captions)
    found = zero_shot.zero_shot_eval(
        Model(3), data(Loader([0, 1, 2, 2], [0, 1, 2, 1], 3, CLASSES)), 1, args(), tokenizer
    )
    assert found == {"zeroshot-top1": 0.75}  # top 5 of three classes has no meaning
    assert len(captions) == 3 * len(OPENAI_IMAGENET_TEMPLATES)
    assert "a photo of a green one." in captions


def test_top5_with_five_classes_and_the_own_names_and_templates(tmp_path):
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("one\r\ntwo\nthree\nfour\nfive\n\n", encoding="utf-8")
    templates.write_text("{0} {}\n\nthe {} itself: {}\n", encoding="utf-8")
    captions: list[str] = []
    loader = Loader([0, 1, 4], [0, 0, 4], 5, [str(number) for number in range(5)])
    found = zero_shot.zero_shot_eval(
        Model(5),
        data(loader),
        1,
        args(zeroshot_classnames=str(names), zeroshot_templates=str(templates)),
        tokenizer_for(["one", "two", "three", "four", "five"], captions),
    )
    assert found == {"zeroshot-top1": pytest.approx(2 / 3), "zeroshot-top5": 1.0}
    assert captions[:2] == ["{0} one", "the one itself: one"]


def test_imagenet_and_its_second_version_share_one_classifier(caplog):
    thousand = [f"n{number:04}" for number in range(1000)]
    calls = []

    def tokenizer(captions: list[str]) -> torch.Tensor:
        calls.append(len(captions))
        first = (sum(calls) - len(captions)) // 80
        return (first + torch.arange(len(captions)) // 80).unsqueeze(1)

    both = data(Loader([0, 999, 7], [0, 999, 8], 1000, thousand), "imagenet-val")
    both |= data(Loader([3, 4], [3, 4], 1000), "imagenet-v2")
    with caplog.at_level(logging.WARNING):
        found = zero_shot.zero_shot_eval(Model(1000), both, 1, args(), tokenizer)
    assert list(found) == [
        "imagenet-zeroshot-val-top1", "imagenet-zeroshot-val-top5",
        "imagenetv2-zeroshot-val-top1", "imagenetv2-zeroshot-val-top5",
    ]  # fmt: skip
    assert found["imagenet-zeroshot-val-top1"] == pytest.approx(2 / 3)
    assert found["imagenetv2-zeroshot-val-top1"] == 1.0
    assert sum(calls) == 80_000
    assert not caplog.records


@pytest.mark.parametrize(
    ("frequency", "epoch", "due"), [(1, 1, True), (2, 1, False), (2, 2, True), (3, 4, True), (0, 4, False)]
)
def test_frequency_and_the_last_epoch(frequency, epoch, due):
    loader = Loader([0], [0], 3, CLASSES)
    tokenizer = tokenizer_for(["blue", "green", "red"])
    found = zero_shot.zero_shot_eval(Model(3), data(loader), epoch, args(zeroshot_frequency=frequency), tokenizer)
    assert bool(found) is due
    assert zero_shot.zero_shot_eval(Model(3), {}, epoch, args(), tokenizer) == {}


def test_a_part_of_imagenets_folders_is_a_warning_and_more_than_all_an_error(caplog):
    few = data(Loader([0], [0], 3, CLASSES), "imagenet-val")
    with caplog.at_level(logging.WARNING):
        ImageNetEvaluator(few, EvalConfig(), FP32, tokenizer_for(CLASSES))
    assert "3 class folders" in caplog.text
    assert "position" in caplog.text
    many = data(Loader([0], [0], 3, [str(n) for n in range(1001)]), "imagenet-v2")
    with pytest.raises(ValueError, match=r"1001 class folders.*1000"):
        ImageNetEvaluator(many, EvalConfig(), FP32, tokenizer_for(CLASSES))


def test_names_from_json(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps(["azure", "lime", "crimson"]))
    assert read_classnames(str(path), CLASSES) == ["azure", "lime", "crimson"]
    path.write_text(json.dumps({"red": "crimson", "blue": "azure", "green_one": "lime", "grey": "ash"}))
    assert read_classnames(str(path), CLASSES) == ["azure", "lime", "crimson"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one\ntwo\n", "has 2 class names and --zeroshot-data has 3 class folders"),
        ("a.txt", "one\n\nthree\n", "class name 2 of 3 is empty"),
        ("a.json", '["one"]', "has 1 class names"),
        ("a.json", '{"red": "r"}', r"no name for 2 of 3 class folders: \['blue', 'green_one'\]"),
        ("a.json", "[one]", "is not valid JSON"),
        ("a.json", "3", "must be a JSON list"),
        ("a.json", "[1, 2, 3]", "class name 1 of 3"),
    ],
)
def test_wrong_class_names(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_classnames(str(tmp_path / name), CLASSES)


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--zeroshot-classnames .*gone.txt"):
        read_classnames(str(tmp_path / "gone.txt"), CLASSES)
    with pytest.raises(FileNotFoundError, match=r"--zeroshot-templates .*gone.txt"):
        read_templates(str(tmp_path / "gone.txt"))
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9 {}")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_templates(str(tmp_path / "latin"))
    (tmp_path / "templates").write_text("a {}\na photo\n")
    with pytest.raises(ValueError, match=r"line 2.*'a photo'"):
        read_templates(str(tmp_path / "templates"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="no template"):
        read_templates(str(tmp_path / "empty"))


def test_templates_by_name():
    assert read_templates(None) == read_templates("openai") == OPENAI_IMAGENET_TEMPLATES
    assert read_templates("simple") == SIMPLE_IMAGENET_TEMPLATES


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="no image to classify"):
        classify(Model(3), torch.eye(3), [], FP32)
