"""Attention layers as programs for attention maps, LoRA and pruning use them."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import open_clip


def attentions(module: nn.Module) -> list[nn.MultiheadAttention]:
    return [child for child in module.modules() if isinstance(child, nn.MultiheadAttention)]


@pytest.fixture
def tokens() -> torch.Tensor:
    """float32 [3, 65, 192], what a block of the image tower takes"""
    return torch.randn(3, 65, 192, generator=torch.Generator().manual_seed(2))


def hidden(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def test_every_block_has_a_multihead_attention(model):
    assert len(attentions(model.visual)) == 4
    assert len(attentions(model.transformer)) == 3
    for block in model.visual.transformer.resblocks:
        assert sum(isinstance(child, nn.MultiheadAttention) for child in block.children()) == 1


def test_attributes(model):
    attn = model.visual.transformer.resblocks[0].attn
    assert (attn.embed_dim, attn.num_heads, attn.head_dim, attn.kdim, attn.vdim) == (192, 3, 64, 192, 192)
    assert (attn.bias_k, attn.bias_v, attn.add_zero_attn, attn.dropout) == (None, None, False, 0.0)
    assert attn._qkv_same_embed_dim
    assert attn.batch_first
    assert attn.in_proj_weight.shape == (576, 192)
    assert attn.in_proj_bias.shape == (576,)
    assert isinstance(attn.out_proj, nn.Linear)
    assert attn.q_proj_weight is attn.k_proj_weight is attn.v_proj_weight is None


@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"attn_mask": hidden(65)},
        {"attn_mask": torch.zeros(65, 65).masked_fill(hidden(65), float("-inf"))},
        {"attn_mask": hidden(65).expand(9, -1, -1)},
        {"key_padding_mask": torch.arange(65).expand(3, -1) > 40},
        {"attn_mask": torch.zeros(65, 65).masked_fill(hidden(65), float("-inf")), "is_causal": True},
    ],
    ids=["none", "bool", "added", "bool per head", "padding", "causal"],
)
def test_calls_are_torchs(model, tokens, masks):
    attn = model.visual.transformer.resblocks[0].attn
    torchs = nn.MultiheadAttention(192, 3, batch_first=True).eval()
    torchs.load_state_dict(attn.state_dict())
    with torch.no_grad():
        for options in ({}, {"need_weights": False}, {"average_attn_weights": False}, {"need_weights": True}):
            output, weights = attn(tokens, tokens, tokens, **options, **masks)
            expected, expected_weights = torchs(tokens, tokens, tokens, **options, **masks)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-4)


def test_the_function_of_torch_takes_its_attributes(model, tokens):
    attn = model.visual.transformer.resblocks[0].attn
    x = tokens.transpose(0, 1)
    output, weights = F.multi_head_attention_forward(
        *(x, x, x, attn.embed_dim, attn.num_heads, attn.in_proj_weight, attn.in_proj_bias, attn.bias_k, attn.bias_v),
        *(attn.add_zero_attn, attn.dropout, attn.out_proj.weight, attn.out_proj.bias),
        training=attn.training,
    )
    torch.testing.assert_close(output.transpose(0, 1), attn(tokens, tokens, tokens)[0], atol=1e-5, rtol=1e-4)
    assert weights.shape == (3, 65, 65)


def test_attention_maps_by_a_hook_that_asks_for_weights(model, images, texts):
    """Sources: open_clip's issues 732 and 795, openai/CLIP's 18."""
    expected = model.encode_image(images), model.encode_text(texts)
    maps = []

    def ask(module, args, kwargs):
        kwargs["need_weights"] = True
        kwargs["average_attn_weights"] = False
        return args, kwargs

    def keep(module, args, output):
        maps.append(output[1])

    for attn in attentions(model):
        attn.register_forward_pre_hook(ask, with_kwargs=True)
        attn.register_forward_hook(keep)
    found = model.encode_image(images), model.encode_text(texts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert [tuple(weights.shape) for weights in maps] == [(3, 3, 65, 65)] * 4 + [(3, 4, 77, 77)] * 3
    assert (maps[-1].triu(1) == 0).all()
    torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(3, 3, 65))


def test_what_hooks_see(model, images, texts):
    seen = []

    def before(module, args, kwargs):
        mask = kwargs["attn_mask"]
        seen.append((len(args), kwargs["need_weights"], None if mask is None else tuple(mask.shape)))

    def after(module, args, output):
        seen.append((tuple(output[0].shape), output[1]))

    for attn in (model.visual.transformer.resblocks[-1].attn, model.transformer.resblocks[0].attn):
        attn.register_forward_pre_hook(before, with_kwargs=True)
        attn.register_forward_hook(after)
    model.encode_image(images)
    model.encode_text(texts)
    assert seen == [
        (3, False, None),
        ((3, 65, 192), None),
        (3, False, (77, 77)),
        ((3, 77, 128), None),
    ]


def test_a_hook_may_put_another_mask_there(model, texts):
    expected = model.transformer(model.token_embedding(texts) + model.positional_embedding)

    def unmask(module, args, kwargs):
        return args, kwargs | {"attn_mask": torch.zeros(77, 77)}

    for block in model.transformer.resblocks:
        block.attn.register_forward_pre_hook(unmask, with_kwargs=True)
    x = model.token_embedding(texts) + model.positional_embedding
    torch.testing.assert_close(model.transformer(x, attn_mask=model.attn_mask), expected, atol=1e-5, rtol=1e-4)
    pooled = model.ln_final(expected)[torch.arange(3), texts.argmax(dim=-1)] @ model.text_projection
    torch.testing.assert_close(model.encode_text(texts), pooled, atol=1e-5, rtol=1e-4)


class Plain(nn.Module):
    """A replacement such as programs write, with the arguments that open_clip's blocks give."""

    def __init__(self, attn: nn.MultiheadAttention) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(attn.embed_dim, attn.num_heads, batch_first=True)
        self.inner.load_state_dict(attn.state_dict())

    def forward(self, query, key, value, need_weights=False, attn_mask=None):
        return self.inner(query, key, value, need_weights=need_weights, attn_mask=attn_mask)


class Wrapped(nn.Module):
    """A block inside another, with open_clip 3.3.0's signature."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def get_weight_dtype(self) -> torch.dtype:
        return self.block.get_weight_dtype()

    def forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
        return self.block(q_x, k_x, v_x, attn_mask=attn_mask)


def replace_by_torchs(stack: nn.Module) -> None:
    for block in stack.resblocks:
        block.attn = Plain(block.attn).inner


def replace_by_a_module(stack: nn.Module) -> None:
    for block in stack.resblocks:
        block.attn = Plain(block.attn)


def wrap_blocks(stack: nn.Module) -> None:
    for index, block in enumerate(stack.resblocks):
        stack.resblocks[index] = Wrapped(block)


def patch_attention(stack: nn.Module) -> None:
    def attention(self, q_x, k_x=None, v_x=None, attn_mask=None):
        assert k_x is None
        return self.attn(q_x, q_x, q_x, need_weights=True, attn_mask=attn_mask)[0]

    for block in stack.resblocks:
        block.attention = types.MethodType(attention, block)


def patch_forward(stack: nn.Module) -> None:
    def forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
        x = q_x + self.ls_1(self.attention(q_x=self.ln_1(q_x), k_x=k_x, v_x=v_x, attn_mask=attn_mask))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    for block in stack.resblocks:
        block.forward = types.MethodType(forward, block)


@pytest.mark.parametrize(
    "change", [replace_by_torchs, replace_by_a_module, wrap_blocks, patch_attention, patch_forward]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_and_attention_of_a_program(model, images, texts, change, checkpointing):
    expected = model.encode_image(images), model.encode_text(texts)
    change(model.visual.transformer)
    change(model.transformer)
    model.set_grad_checkpointing(checkpointing)
    found = model.encode_image(images), model.encode_text(texts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.ours_only("it adds a bool mask as 0 and 1 in its blocks, without a word")
def test_bool_masks_of_blocks_hide_as_in_torch(model, texts):
    x = model.token_embedding(texts) + model.positional_embedding
    expected = model.transformer(x, attn_mask=model.attn_mask)
    torch.testing.assert_close(model.transformer(x, attn_mask=hidden(77)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16"])
def test_half_precision_with_torchs_attention(tiny_name, texts, precision):
    torch.manual_seed(0)
    model = open_clip.create_model(tiny_name, precision=precision).eval()
    expected = model.encode_text(texts).float()
    for block in model.transformer.resblocks:
        block.attn.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(model.encode_text(texts).float(), expected, atol=0.05, rtol=0.05)


def test_lora_trains_and_merges(model, images, texts):
    """Sources: huggingface/peft's issues 761, 1324 and 2200."""
    import peft  # slow, and for this test alone

    before = model.encode_image(images), model.encode_text(texts)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["attn"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    features = tuned.encode_image(images), tuned.encode_text(texts)
    assert not torch.allclose(features[0], before[0], atol=1e-3)
    sum(x.square().sum() for x in features).backward()
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert len(trained) == 7 * 4
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)
    features = [x.detach() for x in features]
    merged = copy.deepcopy(tuned).merge_and_unload()
    assert len(attentions(merged)) == 7
    torch.testing.assert_close(merged.encode_image(images), features[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(merged.encode_text(texts), features[1], atol=1e-4, rtol=1e-4)
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned.encode_image(images), before[0], atol=1e-5, rtol=1e-4)
