"""The README's own snippet, and the two towers compared."""

from __future__ import annotations

import torch

import open_clip


def test_encode_and_compare(model, tiny_name, images):
    tokens = open_clip.get_tokenizer(tiny_name)(["a diagram", "a dog", "a cat"])
    with torch.no_grad():
        image_features = model.encode_image(images, normalize=True)
        text_features = model.encode_text(tokens, normalize=True)
    probabilities = (100.0 * image_features @ text_features.T).softmax(dim=-1)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(3))
    torch.testing.assert_close(image_features.norm(dim=-1), torch.ones(3))
