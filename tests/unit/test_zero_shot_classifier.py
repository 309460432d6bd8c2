"""Classifiers built from class names and templates, and those of ImageNet."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F

from open_clip.zero_shot_classifier import batched, build_zero_shot_classifier, build_zero_shot_classifier_legacy
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

NAMES = ["cat", "dog", "sea {urchin}", "newt", "owl"]
TEMPLATES = ["a photo of a {}.", "{}, drawn"]


def tokenizer(captions: list[str]) -> torch.Tensor:
    """Return a row of letter counts per caption."""
    return torch.tensor([[caption.count(letter) for letter in "abcdefghijklmnopqrstuvw{},"] for caption in captions])


class Model:
    """Embeds counts with a fixed matrix and records the number of captions per call."""

    def __init__(self) -> None:
        self.matrix = torch.randn(26, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        self.calls: list[int] = []

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        assert normalize
        self.calls.append(len(tokens))
        return F.normalize(tokens.float() @ self.matrix, dim=-1)


def expected(captions_of_class: list[list[str]]) -> torch.Tensor:
    columns = []
    for captions in captions_of_class:
        mean = Model().encode_text(tokenizer(captions), normalize=True).mean(0)
        columns.append(mean / mean.norm())
    return torch.stack(columns, dim=1).detach()


@pytest.mark.parametrize(("per_batch", "calls"), [(2, [4, 4, 2]), (10, [10]), (None, [10])])
def test_classes_are_encoded_in_batches_with_the_same_result(per_batch, calls):
    model = Model()
    weights = build_zero_shot_classifier(model, tokenizer, NAMES, TEMPLATES, per_batch)
    assert weights.shape == (8, len(NAMES))
    assert model.calls == calls
    torch.testing.assert_close(weights, build_zero_shot_classifier(Model(), tokenizer, NAMES, TEMPLATES, 1))


def test_functions_and_format_strings_are_templates():
    functions = [lambda name: f"a photo of a {name}.", lambda name: f"{name}, drawn"]
    by_hand = expected([[template(name) for template in functions] for name in NAMES])
    for templates in (TEMPLATES, functions):
        for build in (build_zero_shot_classifier, build_zero_shot_classifier_legacy):
            weights = build(Model(), tokenizer, NAMES, templates)
            torch.testing.assert_close(weights, by_hand)
            assert not weights.requires_grad


def test_the_legacy_function_encodes_one_class_at_a_time():
    model = Model()
    build_zero_shot_classifier_legacy(model, tokenizer, NAMES, TEMPLATES, use_tqdm=True)
    assert model.calls == [2] * len(NAMES)


@pytest.mark.parametrize(("names", "templates"), [([], TEMPLATES), (NAMES, []), (NAMES, "a photo of a {}.")])
def test_no_class_names_or_templates_raise(names, templates):
    with pytest.raises(ValueError, match="list of class names and a list of templates"):
        build_zero_shot_classifier(Model(), tokenizer, names, templates)


def test_batched():
    assert list(batched("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(batched([], 2)) == []
    with pytest.raises(ValueError, match="n=0"):
        list(batched("ab", 0))


def test_imagenet_names_and_templates():
    assert (len(IMAGENET_CLASSNAMES), len(OPENAI_IMAGENET_TEMPLATES), len(SIMPLE_IMAGENET_TEMPLATES)) == (1000, 80, 7)
    assert len(set(IMAGENET_CLASSNAMES)) > 990
    assert (IMAGENET_CLASSNAMES[0], IMAGENET_CLASSNAMES[-1]) == ("tench", "toilet paper")
    assert OPENAI_IMAGENET_TEMPLATES[0]("newt") == "a bad photo of a newt."
    assert SIMPLE_IMAGENET_TEMPLATES[0]("{0}") == "itap of a {0}."
    assert len({template("newt") for template in OPENAI_IMAGENET_TEMPLATES}) == 80
    assert pickle.loads(pickle.dumps(OPENAI_IMAGENET_TEMPLATES))[1]("newt") == "a photo of many newt."


def test_captions_of_a_native_model_are_encoded_without_padding(monkeypatch):
    import open_clip
    from tiny_clip import config

    torch.manual_seed(0)
    model = open_clip.CLIP(**config(text={"context_length": 77})).eval()
    lengths = []

    def short(captions: list[str]) -> torch.Tensor:
        tokens = torch.zeros(len(captions), 77, dtype=torch.long)
        tokens[:, :5] = torch.arange(1, 6) + torch.arange(len(captions))[:, None]
        return tokens

    whole = build_zero_shot_classifier(model, short, NAMES, TEMPLATES)
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda t, normalize: lengths.append(t.shape[1]) or encode(t, normalize))
    build_zero_shot_classifier(model, short, NAMES, TEMPLATES)
    assert lengths == [16]
    monkeypatch.setattr(model, "trim_padding", lambda text: text)
    torch.testing.assert_close(whole, build_zero_shot_classifier(model, short, NAMES, TEMPLATES))
