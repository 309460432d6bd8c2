"""What clip_benchmark 1.6.2 asks of open_clip, call by call; tests/clip_benchmark runs the program itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import open_clip
import tiny_clip
from training import zero_shot

CLASSES = ["cat", "dog", "bird"]
TEMPLATES = ["a photo of a {c}.", "{c}"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """As its models/open_clip.py loads a model."""
    folder = tmp_path_factory.mktemp("tiny")
    name = tiny_clip.folder(folder, text={"vocab_size": 49408})
    torch.manual_seed(1)
    weights = open_clip.create_model(name).state_dict()
    torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": {}}, folder / "epoch_3.pt")
    model, _, transform = open_clip.create_model_and_transforms(
        name, pretrained=str(folder / "epoch_3.pt"), cache_dir=None
    )
    return model.to("cpu").eval(), transform, open_clip.get_tokenizer(name)


def zero_shot_classifier(model, tokenizer, amp: bool) -> torch.Tensor:
    """[embed_dim, classes], the way of its metrics/zeroshot_classification.py."""
    columns = []
    with torch.no_grad(), torch.autocast("cpu", enabled=amp):
        for name in CLASSES:
            texts = tokenizer([template.format(c=name) for template in TEMPLATES]).to("cpu")
            column = F.normalize(model.encode_text(texts), dim=-1).mean(dim=0)
            columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("amp", [False, True])
def test_its_classifier_and_accuracy_are_ours(loaded, amp):
    model, transform, tokenizer = loaded
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (120, 120, 120), (250, 240, 0)]
    images = torch.stack([transform(Image.new("RGB", (40, 50), colour)) for colour in colours])
    labels = torch.tensor([0, 1, 2, 0, 1])
    theirs = zero_shot_classifier(model, tokenizer, amp)
    with torch.no_grad(), torch.autocast("cpu", enabled=amp):
        logits = 100.0 * F.normalize(model.encode_image(images), dim=-1) @ theirs
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()

    own_templates = [lambda c, template=template: template.format(c=c) for template in TEMPLATES]
    with torch.autocast("cpu", enabled=amp):
        ours = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, own_templates)
    torch.testing.assert_close(ours.float(), theirs.float(), atol=2e-2 if amp else 1e-5, rtol=0)
    args = SimpleNamespace(precision="amp_bf16" if amp else "fp32")
    top1, _ = zero_shot.run(model, ours, [{"image": images, "label": labels}], args)
    assert top1 == pytest.approx(accuracy)


def test_retrieval_encodes_a_list_of_captions(loaded):
    """metrics/zeroshot_retrieval.py gives the captions of a batch as one list."""
    model, _, tokenizer = loaded
    tokens = tokenizer([text for texts in (["one", "two"], ["three"]) for text in texts])
    with torch.no_grad(), torch.autocast("cpu", enabled=True):
        features = F.normalize(model.encode_text(tokens), dim=-1)
    assert tokens.shape == (3, 12)
    assert features.shape == (3, 16)


def test_captions_are_decoded_by_the_private_tokenizer():
    """metrics/captioning.py: ids of whole captions, cut at the end of text."""
    from open_clip import tokenize
    from open_clip.tokenizer import _tokenizer

    ids = tokenize("A photo of a cat")[0].numpy()
    text = _tokenizer.decode(ids).split("<end_of_text>")[0].replace("<start_of_text>", "").strip()
    assert text == "a photo of a cat"


def test_its_collections_of_models_are_known():
    """model_collection.py lists pairs when it is imported."""
    pairs = open_clip.list_pretrained()
    for pair in [("ViT-B-32-quickgelu", "laion400m_e32"), ("xlm-roberta-base-ViT-B-32", "laion5b_s13b_b90k")]:
        assert pair in pairs
