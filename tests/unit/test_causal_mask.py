"""`attn_mask` and its form for the kernel: they agree, and add no operators to a training step."""

from __future__ import annotations

import collections
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from open_clip import coca_model, device
from open_clip import model as models
from open_clip.transformer import masks
from open_clip.transformer.stack import Transformer
from versions import require

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 3}
TEXT = {"context_length": 77, "vocab_size": 100, "width": 64, "heads": 2, "layers": 3}
DECODER = {"context_length": 76, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2}
POOLER = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True}

# Operators of a step, forward and backward, before the modules had masks and torch's interface (torch 2.14).
OPERATORS_BEFORE = {"CLIP": 737, "CustomTextCLIP": 737, "CoCa": 1368}


def build(name: str) -> Any:
    torch.manual_seed(0)
    if name == "CoCa":
        text = TEXT | {"context_length": 76, "embed_cls": True, "output_tokens": True}
        return coca_model.CoCa(64, DECODER, text, VISION | POOLER)
    return getattr(models, name)(32, VISION, TEXT)


def texts(name: str) -> torch.Tensor:
    ids = torch.randint(1, 98, (4, 76 if name == "CoCa" else 77), generator=torch.Generator().manual_seed(1))
    ids[:, 20], ids[:, 21:] = 99, 0
    return ids


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPERATORS_BEFORE)
def test_a_training_step_has_no_more_operators(name: str) -> None:
    require("torch", "2.14", "older ones call other operators, so the counts do not hold")
    model = build(name).train()
    with Counter() as counter:
        output = model(torch.randn(4, 3, 32, 32), texts(name))
        values = output.values() if isinstance(output, dict) else output
        sum(x.square().mean() for x in values if x.is_floating_point()).backward()
    assert counter.calls.total() <= OPERATORS_BEFORE[name]


@pytest.mark.parametrize("name", OPERATORS_BEFORE)
@pytest.mark.parametrize("columns", [77, 40])
def test_the_kernel_mask_is_used_unless_a_module_is_replaced(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build(name).eval(), texts(name)[:, :columns]
    seen: list[Any] = []
    attention = device.attention

    def watch(*args: Any, **kwargs: Any) -> torch.Tensor:
        mask = kwargs["attn_mask"]
        seen.append("causal" if kwargs["is_causal"] else mask if mask is None else mask.dtype)
        return attention(*args, **kwargs)

    monkeypatch.setattr(device, "attention", watch)
    tower = model if name == "CLIP" else model.text
    expected, kinds = model.encode_text(ids), set(seen)
    assert kinds == {torch.bool if name == "CoCa" else "causal"}
    for block in tower.transformer.resblocks:  # a hook can see the mask, but changes nothing else
        block.attn.register_forward_hook(lambda module, args, output: None)
    seen.clear()
    torch.testing.assert_close(model.encode_text(ids), expected)
    assert set(seen) == kinds
    for block in tower.transformer.resblocks:
        torchs = nn.MultiheadAttention(64, 2, batch_first=True).eval()
        torchs.load_state_dict(block.attn.state_dict())
        block.attn = torchs
    seen.clear()
    torch.testing.assert_close(model.encode_text(ids), expected, atol=1e-5, rtol=1e-4)
    assert not seen


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_casts_keep_the_kernel_mask(copied: Any) -> None:
    for model in (copied(build("CLIP")), build("CLIP").to(torch.bfloat16), build("CLIP").to("cpu")):
        assert model._is_mask_causal
        assert model.attn_mask.dtype == model.ln_final.weight.dtype


def test_data_parallel_training_does_not_broadcast_masks() -> None:
    for name in OPERATORS_BEFORE:
        model = build(name)
        assert {key for key, _ in model.named_buffers()} <= set(model._ddp_params_and_buffers_to_ignore)


def test_added_positions_get_a_mask() -> None:
    model = build("CLIP").eval()
    model.positional_embedding = nn.Parameter(torch.randn(100, 64))
    ids = torch.randint(1, 99, (2, 100))
    expected = model.encode_text(ids)
    for block in model.transformer.resblocks:
        block.attn.register_forward_hook(lambda module, args, output: None)
        block.register_forward_pre_hook(lambda module, args, kwargs: (args, dict(kwargs)), with_kwargs=True)
    torch.testing.assert_close(model.encode_text(ids), expected)
    model.transformer.resblocks[0].attn = nn.MultiheadAttention(64, 2, batch_first=True).eval()
    assert model.encode_text(ids).shape == expected.shape


def test_a_replaced_stack_is_called_as_in_open_clip() -> None:
    model, ids = build("CustomTextCLIP").eval(), texts("CustomTextCLIP")
    expected = model.encode_text(ids)

    class Stack(nn.Module):
        def __init__(self, stack: Transformer) -> None:
            super().__init__()
            self.stack = stack

        def get_cast_dtype(self) -> torch.dtype:
            return self.stack.get_cast_dtype()

        def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
            assert torch.equal(attn_mask, masks.causal_mask(77))
            return self.stack(x, attn_mask=attn_mask)

    model.text.transformer = Stack(model.text.transformer)
    torch.testing.assert_close(model.encode_text(ids), expected, atol=1e-5, rtol=1e-4)


def test_captions_do_not_change_with_replaced_attention() -> None:
    """Replaced attention does not support caches. Captions are the same without them."""
    model, images = build("CoCa").eval(), torch.randn(2, 3, 32, 32)
    options = {"seq_len": 8, "generation_type": "greedy", "sot_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    expected = model.generate(images, **options)
    for stack in (model.text.transformer, model.text_decoder):
        for block in stack.resblocks:
            torchs = nn.MultiheadAttention(block.attn.embed_dim, block.attn.num_heads, batch_first=True)
            torchs.load_state_dict(block.attn.state_dict())
            block.attn = torchs
    assert torch.equal(model.generate(images, **options), expected)
