"""Parts of a modern text tower that a program has hooked or replaced get texts [batch, tokens, ...], never packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modern_text_cases as cases
from open_clip.modern_text import ModernTextAttention, ModernTextBlock
from training.unpadding import PaddingOptions, Unpadding

PARTS = ("text", "text.token_embedding", "text.blocks.1", "text.blocks.0.attn", "text.blocks.1.mlp", "text.ln_final")


def unpadded(model: Any) -> Any:
    unpadding = Unpadding([model], torch.device("cpu"), PaddingOptions(packing="on"))
    return unpadding({"text": cases.texts(3, 9, 5)})["text"]


@pytest.mark.parametrize("part", PARTS)
def test_hooks_see_batches(part):
    model = cases.build(output_tokens=False)
    assert not isinstance(unpadded(model), torch.Tensor)  # packed
    seen = []

    def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
        seen.append(args[0].dim())

    removable = model.get_submodule(part).register_forward_hook(hook)
    text = unpadded(model)
    model.encode_text(text)
    assert seen == [2 if part in ("text", "text.token_embedding") else 3]
    removable.remove()
    assert model.takes_packed_text


class Block(ModernTextBlock):
    def forward(self, x: torch.Tensor, *args: Any) -> Any:
        assert x.dim() == 3
        return super().forward(x, *args)


class Attention(ModernTextAttention):
    def forward(self, x: torch.Tensor, *args: Any) -> Any:
        assert x.dim() == 3
        return super().forward(x, *args)


def test_subclasses_see_batches():
    for name, cls in (("blocks.1", Block), ("blocks.1.attn", Attention)):
        model = cases.build()
        model.text.get_submodule(name).__class__ = cls
        assert not model.takes_packed_text
        model.encode_text(unpadded(model))
