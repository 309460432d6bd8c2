"""Zero-shot classification and retrieval with a NaFlex image tower, from images of one size and from patches.

Programs such as clip_benchmark give plain tensors. The evaluators also take batches of patches.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import open_clip
import tiny_clip
import tiny_naflex
from training import precision, zero_shot
from training.evaluators.retrieval import RetrievalEvaluator
from training.params import EvalConfig

CLASSES = ["cat", "dog", "bird"]
TEMPLATES = ["a photo of a {}.", "{}"]
CAPTIONS = ["one cat", "two dogs", "a red bird", "nothing", "five of them"]
FP32 = SimpleNamespace(precision="fp32")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(model, transform, tokenizer), as a program loads them from a checkpoint."""
    folder = tmp_path_factory.mktemp("naflex")
    name = tiny_clip.write_folder(folder, tiny_naflex.config(text={"vocab_size": 49408}))
    weights = tiny_naflex.randomise(open_clip.create_model(name)).state_dict()
    torch.save({"epoch": 3, "name": "run", "state_dict": weights}, folder / "epoch_3.pt")
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=str(folder / "epoch_3.pt"))
    return model.eval(), transform, open_clip.get_tokenizer(name)


def pictures() -> list[Image.Image]:
    return [Image.effect_mandelbrot((40, 50), (-2 + k / 3, -1, 1, 1), 20).convert("RGB") for k in range(5)]


def batches(transform):
    """Return the same images as a plain tensor and as patches with 30 places."""
    images = torch.stack([transform(picture) for picture in pictures()])
    return images, tiny_naflex.to_patches(images, places=30)


def test_preprocessing_gives_images_of_the_models_size(loaded):
    images, patches = batches(loaded[1])
    assert images.shape == (5, 3, 20, 20)
    assert patches["patch_valid"].sum(1).tolist() == [25] * 5


@torch.no_grad()
def test_features_are_equal_and_the_classifier_is_that_of_clip_benchmark(loaded):
    model, transform, tokenizer = loaded
    images, patches = batches(transform)
    features = model.encode_image(images, normalize=True)
    torch.testing.assert_close(model.encode_image(patches, normalize=True), features, rtol=0, atol=1e-5)
    columns = []
    for name in CLASSES:
        texts = tokenizer([template.format(name) for template in TEMPLATES])
        columns.append(F.normalize(F.normalize(model.encode_text(texts), dim=-1).mean(0), dim=0))
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, TEMPLATES)
    torch.testing.assert_close(classifier, torch.stack(columns, dim=1), rtol=0, atol=1e-5)
    logits = model.get_logits(patches, tokenizer(CLASSES))[0]
    torch.testing.assert_close(logits, model.get_logits(images, tokenizer(CLASSES))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["images", "patches"])
def test_accuracy(loaded, form):
    model, transform, tokenizer = loaded
    images, patches = batches(transform)
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, TEMPLATES)
    with torch.no_grad():
        best = (model.encode_image(images) @ classifier).argmax(1)
    labels = torch.where(torch.tensor([True, True, False, True, False]), best, (best + 1) % 3)
    image = images if form == "images" else patches
    for batch in ({"image": image, "label": labels}, (image, labels)):
        assert zero_shot.run(model, classifier, [batch], FP32)[0] == pytest.approx(3 / 5)


def test_retrieval(loaded):
    model, transform, tokenizer = loaded
    images, patches = batches(transform)
    text = tokenizer(CAPTIONS)
    found = []
    for image in (images, patches):
        data = {"val": SimpleNamespace(dataloader=[{"image": image, "text": text}])}
        evaluator = RetrievalEvaluator(data, EvalConfig(), precision.Precision("fp32", torch.device("cpu")), tokenizer)
        with torch.no_grad():
            found.append(dict(evaluator.run(model, 1)))
    assert found[0].keys() == found[1].keys()
    assert found[0]["num_samples"] == found[1]["num_samples"] == 5
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, abs=1e-5), key
