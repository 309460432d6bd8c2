"""The text tower stepped through by programs: prompt learners, and the text encoders of image generators."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import open_clip
import open_clip.transformer

COCA = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 64,
        "head_width": 32,
        "patch_size": 16,
        "output_tokens": True,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "attn_pooler_queries": 4,
    },
    "text_cfg": {
        "context_length": 76,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    "custom_text": True,
}


@pytest.fixture
def coca(tmp_path) -> nn.Module:
    (tmp_path / "coca_compat-tiny.json").write_text(json.dumps(COCA), encoding="utf-8")
    open_clip.add_model_config(tmp_path / "coca_compat-tiny.json")
    torch.manual_seed(0)
    return open_clip.create_model("coca_compat-tiny").eval()


@pytest.fixture
def custom(tiny_name) -> nn.Module:
    torch.manual_seed(0)
    return open_clip.create_model(tiny_name, force_custom_text=True).eval()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_mask(model, custom, coca):
    causal = torch.full((77, 77), float("-inf")).triu(1)
    for mask in (model.attn_mask, custom.text.attn_mask, custom.text.build_causal_mask(), coca.text.attn_mask):
        assert torch.equal(mask, causal)
    assert torch.equal(coca.text_decoder.attn_mask, causal[:76, :76])
    assert torch.equal(coca.text_decoder.build_attention_mask(), causal[:76, :76])
    assert "attn_mask" in dict(model.named_buffers())
    assert not any("attn_mask" in key for each in (model, custom, coca) for key in each.state_dict())
    assert model.half().attn_mask.dtype == torch.float16


def test_no_mask_where_all_tokens_see_each_other():
    sizes = {"context_length": 8, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
    text = open_clip.transformer.TextTransformer(**sizes, no_causal_mask=True)
    assert text.attn_mask is None


def test_after_building_from_a_file(tiny_name, weights):
    loaded = open_clip.create_model(tiny_name, pretrained=str(weights))
    assert torch.equal(loaded.attn_mask, torch.full((77, 77), float("-inf")).triu(1))


def test_text_by_hand(model, texts):
    x = model.token_embedding(texts) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    assert_same(x[torch.arange(3), texts.argmax(dim=-1)] @ model.text_projection, model.encode_text(texts))


def test_text_tower_by_hand(custom, texts):
    text = custom.text
    x, mask = text._embeds(texts)
    x = text.ln_final(text.transformer(x, attn_mask=mask))
    assert_same(x[torch.arange(3), texts.argmax(dim=-1)] @ text.text_projection, custom.encode_text(texts))
    assert torch.equal(mask, text.attn_mask)


def test_text_with_a_class_token_by_hand(coca, texts):
    text, texts = coca.text, texts[:, :76]
    x, mask = text._embeds(texts)
    assert mask.shape == (6, 77, 77)
    assert mask.is_floating_point()
    x = text.transformer(x, attn_mask=mask)
    assert_same(text.ln_final(x[:, -1]) @ text.text_projection, text(texts)[0])


def test_penultimate_layer(model, texts):
    """As the text encoders of Stable Diffusion 2 do it, without the image tower."""
    expected = model.forward_intermediates(text=texts, text_indices=[1], intermediates_only=True)
    del model.visual
    x = model.token_embedding(texts) + model.positional_embedding
    for index, block in enumerate(model.transformer.resblocks):
        if index == len(model.transformer.resblocks) - 1:
            break
        x = block(x, attn_mask=model.attn_mask)
    assert_same(x, expected["text_intermediates"][0])
    assert model.ln_final(x).shape == (3, 77, 128)


def test_learned_prompts(model, texts):
    """As CoOp does it: the first words are learned, and the model is frozen."""
    model.requires_grad_(False)
    words = nn.Parameter(model.token_embedding(texts)[:1, 1:3].clone())
    embedded = model.token_embedding(texts)
    x = torch.cat([embedded[:, :1], words.expand(3, -1, -1), embedded[:, 3:]], dim=1)
    x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
    features = model.ln_final(x)[torch.arange(3), texts.argmax(dim=-1)] @ model.text_projection
    features.sum().backward()
    assert words.grad.abs().sum() > 0
    assert_same(features[0], model.encode_text(texts)[0])


def test_sequence_first(model, images, texts):
    stack, x = model.visual.transformer, model.visual._embeds(images)
    expected, blocks = stack(x), stack.forward_intermediates(x)[1]
    stack.batch_first = False
    assert_same(stack(x.permute(1, 0, 2)).permute(1, 0, 2), expected)
    last, intermediates = stack.forward_intermediates(x.permute(1, 0, 2))
    assert_same(last.permute(1, 0, 2), expected)
    for found, wanted in zip(intermediates, blocks, strict=True):
        assert_same(found.permute(1, 0, 2), wanted)

    x = model.token_embedding(texts) + model.positional_embedding
    expected = model.transformer(x, attn_mask=model.attn_mask)
    model.transformer.batch_first = False
    assert_same(model.transformer(x.permute(1, 0, 2), attn_mask=model.attn_mask).permute(1, 0, 2), expected)


def test_blocks_built_sequence_first():
    from open_clip.transformer import Transformer

    torch.manual_seed(0)
    stack, x = Transformer(32, 2, 4, batch_first=False).eval(), torch.randn(3, 5, 32)
    usual = Transformer(32, 2, 4).eval()
    usual.load_state_dict(stack.state_dict())
    assert not stack.resblocks[0].attn.batch_first
    assert_same(stack(x), usual(x))
    assert_same(stack.resblocks[0](x.transpose(0, 1)).transpose(0, 1), usual.resblocks[0](x))


def test_a_mask_that_a_program_puts_there(model, custom, texts):
    x = model.token_embedding(texts) + model.positional_embedding
    expected = model.ln_final(model.transformer(x))[torch.arange(3), texts.argmax(dim=-1)] @ model.text_projection
    for tower, whole in ((model, model), (custom.text, custom)):
        tower.attn_mask = torch.zeros(77, 77)
        assert_same(whole.encode_text(texts), expected)
        tower.attn_mask = None
        assert_same(whole.encode_text(texts), expected)


def test_options_of_the_text_tower_can_be_set(custom, texts):
    custom.text.output_tokens = True
    features, tokens = custom.text(texts)
    assert features.shape == (3, 128)
    assert tokens.shape == (3, 77, 128)
    assert (custom.text.use_pad_mask, custom.text.correct_cls_mask, custom.text.pool_type) == (False, False, "argmax")
