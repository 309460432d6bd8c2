"""Parts of a text tower that a program has hooked or replaced get the texts of a batch in one tensor, with padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modern_text_cases as cases
import open_clip
from open_clip.modern_text import ModernTextAttention, ModernTextBlock
from open_clip.text_groups import GroupedText
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


def small(custom: bool) -> Any:
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(8, vision, text)


@pytest.mark.parametrize("custom", [True, False])
@pytest.mark.parametrize("part", ["transformer", "transformer.resblocks.0", "transformer.resblocks.0.mlp.c_fc"])
def test_hooks_on_other_towers_are_called_once_per_batch(part, custom):
    model = small(custom)
    length = torch.tensor([5] * 40 + [60] * 24)
    text = torch.randint(1, 60, (64, 77)).scatter(1, length[:, None], 63)
    unpadding = Unpadding([model], torch.device("cpu"))
    assert isinstance(unpadding({"text": text})["text"], GroupedText)
    name = f"text.{part}" if custom else part
    calls = []
    model.get_submodule(name).register_forward_hook(lambda module, args, output: calls.append(args[0].shape[:2]))
    model(text=Unpadding([model], torch.device("cpu"))({"text": text})["text"])
    assert calls == [(64, 77)]


def test_hooks_on_the_image_tower_do_not_matter():
    for model in (small(True), small(False)):
        model.visual.transformer.register_forward_hook(lambda *_: None)
        assert model.takes_grouped_text
