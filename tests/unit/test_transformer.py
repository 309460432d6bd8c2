"""The native towers: masks, pooling, locking, memory and errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from open_clip import transformer
from open_clip.transformer import CustomTransformer, TextTransformer, Transformer, VisionTransformer, masks
from open_clip.transformer.text_encoder import text_global_pool
from open_clip.utils import feature_take_indices


def vision(**kwargs: object) -> VisionTransformer:
    torch.manual_seed(0)
    size = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 3, "heads": 2, "mlp_ratio": 2.0, "output_dim": 12}
    return VisionTransformer(**(size | kwargs)).eval()


def text(**kwargs: object) -> TextTransformer:
    torch.manual_seed(0)
    size = {"context_length": 6, "vocab_size": 30, "width": 16, "heads": 2, "layers": 3, "output_dim": 12}
    return TextTransformer(**(size | kwargs)).eval()


IDS = torch.tensor([[20, 4, 9, 11, 13, 29], [20, 8, 14, 29, 0, 0]])


# Stacks


def test_open_clips_names_can_be_imported_from_transformer() -> None:
    for name in transformer.__all__:
        assert hasattr(transformer, name), name
    assert {"ResidualAttentionBlock", "LayerNormFp32", "text_global_pool", "lock_text_tower"} <= set(
        transformer.__all__
    )


def test_custom_blocks_are_chosen_by_their_options_or_by_name() -> None:
    blocks = {
        type(Transformer(16, 1, 2, **kwargs).resblocks[0]).__name__
        for kwargs in ({"qk_norm": True}, {"scale_fc": True}, {"block_type": "custom"})
    }
    assert blocks == {"CustomResidualAttentionBlock"}
    assert type(Transformer(16, 1, 2).resblocks[0]).__name__ == "ResidualAttentionBlock"
    with pytest.raises(ValueError, match="block_type is one of 'default', 'custom', got 'odd'"):
        Transformer(16, 1, 2, block_type="odd")


def test_custom_transformer_names_its_blocks() -> None:
    names = ["ResidualAttentionBlock", "CustomResidualAttentionBlock"]
    stack = CustomTransformer(16, 2, 2, block_types=names)
    assert [type(block).__name__ for block in stack.resblocks] == names
    assert stack(torch.randn(2, 3, 16)).shape == (2, 3, 16)
    with pytest.raises(ValueError, match="names 2 blocks, and there are 3 layers"):
        CustomTransformer(16, 3, 2, block_types=names)
    with pytest.raises(ValueError, match="got 'Linear'"):
        CustomTransformer(16, 1, 2, block_types="Linear")


@pytest.mark.parametrize("is_causal", [False, True])
def test_checkpointing_changes_neither_output_nor_gradient(is_causal: bool) -> None:
    torch.manual_seed(0)
    stack = Transformer(16, 2, 2)
    x = torch.randn(2, 5, 16)
    found = []
    for enable in (False, True):
        stack.grad_checkpointing = enable
        stack.zero_grad()
        out = stack(x, attn_mask=masks.causal_mask(5) if is_causal else None)
        out.square().sum().backward()
        found.append([out.detach(), *(parameter.grad.clone() for parameter in stack.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointing_stores_fewer_activations() -> None:
    stack, x = Transformer(16, 4, 2), torch.randn(2, 5, 16, requires_grad=True)

    def saved() -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stack(x)
        return sum(sizes)

    before = saved()
    stack.grad_checkpointing = True
    assert saved() < before / 4


@pytest.mark.parametrize(
    ("indices", "expected"),
    [(None, [0, 1, 2, 3]), (1, [3]), (2, [2, 3]), ([0, -1], [0, 3]), ((2,), [2])],
)
def test_feature_take_indices(indices: int | list[int] | None, expected: list[int]) -> None:
    assert feature_take_indices(4, indices) == (expected, max(expected))
    assert feature_take_indices(4, indices, as_set=True) == (set(expected), max(expected))


@pytest.mark.parametrize("indices", [0, 5, -1, [4], [-5], []])
def test_feature_take_indices_out_of_range_raise(indices: int | list[int]) -> None:
    with pytest.raises(ValueError, match=r"blocks|block index"):
        feature_take_indices(4, indices)


def test_stop_early_skips_the_other_blocks() -> None:
    stack = Transformer(16, 4, 2)
    x = torch.randn(2, 5, 16)
    stack.resblocks[2].forward = None  # type: ignore[assignment]  # would fail if it ran
    last, intermediates = stack.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert len(intermediates) == 2
    assert torch.equal(last, intermediates[-1])
    assert torch.equal(last, stack.resblocks[1](stack.resblocks[0](x)))


# Images


def test_image_tower_shapes() -> None:
    images = torch.randn(2, 3, 16, 16)
    assert vision()(images).shape == (2, 12)
    assert vision(pool_type="none")(images).shape == (2, 5, 12)
    features, tokens = vision(output_tokens=True)(images)
    assert features.shape == (2, 12)
    assert tokens.shape == (2, 4, 24)
    oblong = vision(image_size=(16, 32))
    assert oblong.grid_size == (2, 4)
    intermediates = oblong.forward_intermediates(torch.randn(2, 3, 16, 32))["image_intermediates"]
    assert [x.shape for x in intermediates] == [(2, 24, 2, 4)] * 3


@pytest.mark.parametrize("pool_type", ["tok", "avg"])
@pytest.mark.parametrize("after", [False, True])
def test_final_norm_before_or_after_pooling(pool_type: str, after: bool) -> None:
    tower = vision(pool_type=pool_type, final_ln_after_pool=after)
    nn.init.normal_(tower.ln_post.weight)
    images = torch.randn(2, 3, 16, 16)
    tokens = tower.transformer(tower._embeds(images))
    if pool_type == "tok":
        expected = tower.ln_post(tokens[:, 0])
    else:
        expected = tower.ln_post(tokens[:, 1:].mean(1)) if after else tower.ln_post(tokens)[:, 1:].mean(1)
    torch.testing.assert_close(tower(images), expected @ tower.proj)


@pytest.mark.parametrize("kind", ["parallel", "cascade"])
def test_two_poolers_return_one_feature_and_tokens(kind: str) -> None:
    tower = vision(attentional_pool=kind, attn_pooler_queries=3, attn_pooler_heads=2, output_tokens=True)
    images = torch.randn(2, 3, 16, 16)
    features, tokens = tower(images)
    normed = tower.ln_post(tower.transformer(tower._embeds(images)))
    torch.testing.assert_close(tokens, tower.attn_pool(normed))
    expected = tower.attn_pool_contrastive(tokens if kind == "cascade" else normed)[:, 0] @ tower.proj
    torch.testing.assert_close(features, expected)
    assert tokens.shape == (2, 3, 12)


def test_the_sine_cosine_embedding_is_not_trained_and_is_in_the_state_dict() -> None:
    tower = vision(pos_embed_type="sin_cos_2d")
    assert not tower.positional_embedding.requires_grad
    assert tower.state_dict()["positional_embedding"][0].eq(0).all()
    assert tower.positional_embedding[1:].square().sum(-1).allclose(torch.tensor(12.0))


def test_patch_dropout_is_for_training_only() -> None:
    tower = vision(patch_dropout=0.5)
    seen: list[torch.Size] = []
    tower.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    images = torch.randn(2, 3, 16, 16)
    tower(images)
    tower.train()(images)
    assert seen == [(2, 5, 24), (2, 3, 24)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pool_type": "mean"}, "pool_type is one of 'tok', 'avg', 'none', got 'mean'"),
        ({"pos_embed_type": "rope"}, "pos_embed_type is one of"),
        ({"attentional_pool": "serial"}, "attentional_pool is one of"),
        ({"image_size": 4}, "is smaller than a patch"),
    ],
)
def test_invalid_options_of_the_image_tower_raise(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vision(**kwargs)


def test_invalid_options_of_image_intermediates_raise() -> None:
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match="output_fmt is one of 'NCHW', 'NLC', got 'NHWC'"):
        vision().forward_intermediates(images, output_fmt="NHWC")
    pooled = vision(attentional_pool=True, attn_pooler_heads=2)
    with pytest.raises(ValueError, match="fits no block's output"):
        pooled.forward_intermediates(images, normalize_intermediates=True)


def test_pruned_image_tower_gives_the_same_intermediates() -> None:
    tower, images = vision(), torch.randn(2, 3, 16, 16)
    expected = tower.forward_intermediates(images, indices=[0, 1], intermediates_only=True)["image_intermediates"]
    assert tower.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert len(tower.transformer.resblocks) == 2
    assert tower(images).shape == (2, 24)
    got = tower.forward_intermediates(images, indices=[0, 1])["image_intermediates"]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# Texts


def test_causal_text_does_not_attend_to_later_tokens() -> None:
    tower = text(pool_type="none", proj_type="none")
    other = IDS.clone()
    other[:, 3:] = 7
    a, b = tower(IDS), tower(other)
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3:], b[:, 3:])


def test_text_without_causal_mask_attends_to_later_tokens() -> None:
    tower = text(pool_type="first", no_causal_mask=True)
    other = IDS.clone()
    other[:, 5] = 7
    assert not torch.allclose(tower(IDS), tower(other))


def test_pad_mask_hides_padding() -> None:
    padded = IDS[1:]
    masked = text(pool_type="first", no_causal_mask=True, use_pad_mask=True)
    torch.testing.assert_close(masked(padded), masked(padded[:, :4]))
    unmasked = text(pool_type="first", no_causal_mask=True)
    assert not torch.allclose(unmasked(padded), unmasked(padded[:, :4]))


@pytest.mark.parametrize("correct", [False, True])
def test_the_class_token_attends_to_itself_with_the_correct_mask_only(correct: bool) -> None:
    tower = text(embed_cls=True, correct_cls_mask=correct)
    mask = tower._text_masks(IDS, 7)[1].allowed
    assert mask.shape == (2, 1, 7, 7)
    row = mask[1, 0, -1].tolist()
    assert row == ([True] * 4 + [False] * 2 + [True] if correct else [True] * 5 + [False] * 2)
    assert not mask[:, :, :-1, -1].any(), "no word sees the class token after it"


def test_text_without_padding_mask_uses_is_causal() -> None:
    tower = text()
    assert tower._text_masks(IDS, 6)[1].allowed is None
    assert text(no_causal_mask=True)._text_masks(IDS, 6) == (None, None)
    assert list(tower.state_dict()) == [name for name, _ in tower.named_parameters()]
    assert not list(vision().buffers())


def test_shorter_texts_work_and_longer_ones_raise() -> None:
    tower = text()
    torch.testing.assert_close(tower(IDS[1:, :4]), tower(IDS[1:]))
    with pytest.raises(ValueError, match="The text has 7 tokens, and this model has 6 positions"):
        tower(torch.ones(1, 7, dtype=torch.long))


def test_text_global_pool() -> None:
    x = torch.arange(12.0).reshape(2, 6)[..., None]

    def pool(kind: str, eos: int | None = None) -> list[float]:
        return text_global_pool(x, IDS, kind, eos).flatten().tolist()

    assert pool("first") == [0, 6]
    assert pool("last") == [5, 11]
    assert pool("argmax") == [5, 9]
    assert pool("eos", eos=29) == [5, 9]
    assert pool("eos", eos=20) == [0, 6]
    assert text_global_pool(x, IDS, "none") is x
    with pytest.raises(ValueError, match="give text"):
        text_global_pool(x, None, "argmax")
    with pytest.raises(ValueError, match="give eos_token_id"):
        text_global_pool(x, IDS, "eos")


def test_text_tower_outputs() -> None:
    features, tokens = text(output_tokens=True)(IDS)
    assert features.shape == (2, 12)
    assert tokens.shape == (2, 6, 16)
    torch.testing.assert_close(features, text()(IDS))
    tower = text(embed_cls=True)
    found = tower.forward_intermediates(IDS, indices=1, output_extra_tokens=True)
    assert found["text_intermediates"][0].shape == (2, 6, 16)
    assert found["text_intermediates_suffix"][0].shape == (2, 1, 16)
    assert text(output_dim=None)(IDS).shape == (2, 16)
    assert text(proj_bias=True).text_projection.bias.shape == (12,)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"pool_type": "mean"}, "pool_type is one of"), ({"proj_type": "mlp"}, "proj_type is one of 'linear', 'none'")],
)
def test_invalid_options_of_the_text_tower_raise(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text(**kwargs)


def test_text_intermediates_have_one_format() -> None:
    with pytest.raises(ValueError, match="output_fmt of texts is one of 'NLC'"):
        text().forward_intermediates(IDS, output_fmt="NCHW")


def test_pruned_text_tower_gives_the_same_intermediates() -> None:
    tower = text()
    expected = tower.forward_intermediates(IDS, indices=[1], intermediates_only=True)["text_intermediates"]
    assert tower.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(tower.transformer.resblocks) == 2
    got = tower.forward_intermediates(IDS, indices=[1])["text_intermediates"]
    assert torch.equal(got[0], expected[0])
    assert tower(IDS).shape == (2, 16)


def test_a_locked_text_tower_can_train_its_norms() -> None:
    tower = text()
    tower.lock(unlocked_layers=1, freeze_layer_norm=False)
    trainable = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    norms = {
        f"transformer.resblocks.{i}.ln_{j}.{kind}" for i in range(3) for j in (1, 2) for kind in ("weight", "bias")
    }
    assert trainable == norms | {"ln_final.weight", "ln_final.bias", "text_projection"}


def test_initial_deviations_of_the_text_tower() -> None:
    torch.manual_seed(0)
    tower = TextTransformer(
        context_length=64, vocab_size=512, width=128, heads=2, layers=4, output_dim=128, embed_cls=True
    )
    block = tower.transformer.resblocks[1]
    expected = {
        tower.token_embedding.weight: 0.02,
        tower.positional_embedding: 0.01,
        tower.cls_emb: 0.01,
        block.attn.in_proj_weight: 128**-0.5,
        block.attn.out_proj.weight: 128**-0.5 * 8**-0.5,
        block.mlp.c_fc.weight: 256**-0.5,
        block.mlp.c_proj.weight: 128**-0.5 * 8**-0.5,
        tower.text_projection: 128**-0.5,
    }
    for parameter, std in expected.items():
        tolerance = 0.03 if parameter.numel() > 1000 else 0.3
        assert float(parameter.detach().std()) == pytest.approx(std, rel=tolerance)


@pytest.mark.parametrize("length", [3, 16, 17, 40])
def test_trimming_padding_changes_no_embedding(length):
    torch.manual_seed(0)
    tower = TextTransformer(context_length=40, vocab_size=50, width=16, heads=2, layers=2, output_dim=8).eval()
    text = torch.zeros(4, 40, dtype=torch.long)
    for row, end in zip(text, (length, 2, 1, length), strict=True):
        row[: end - 1] = torch.randint(1, 49, (end - 1,))
        row[end - 1] = 49  # the end of text has the highest id
    trimmed = tower.trim_padding(text)
    assert trimmed.shape == (4, min(40, -(-length // 16) * 16))
    with torch.no_grad():
        torch.testing.assert_close(tower(trimmed), tower(text))


@pytest.mark.parametrize("options", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}])
def test_padding_is_not_trimmed_if_it_has_an_effect(options):
    tower = TextTransformer(context_length=40, vocab_size=50, width=16, heads=2, layers=1, output_dim=8, **options)
    text = torch.zeros(2, 40, dtype=torch.long)
    text[:, 0] = 49
    assert tower.trim_padding(text).shape == (2, 40)
