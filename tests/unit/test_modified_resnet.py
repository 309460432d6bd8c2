"""CLIP's ResNet: attention pooling, timm's model as a reference, recomputation and locking."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import open_clip
import tower_cases as cases
from open_clip import pos_embed
from open_clip.checkpoint import fit as checkpoint
from open_clip.modified_resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from training import build


def tower(**changes: object) -> ModifiedResNet:
    resnet = ModifiedResNet(**{**cases.RESNET, **changes})
    resnet.load_state_dict(cases.weights(resnet.state_dict()))
    return resnet


def test_attention_pooling_equals_its_formula() -> None:
    torch.manual_seed(0)
    pool = AttentionPool2d(3, embed_dim=8, num_heads=2, output_dim=5)
    x = torch.randn(2, 8, 3, 3)
    tokens = torch.cat([x.mean(dim=(2, 3))[:, None], x.flatten(2).mT], dim=1) + pool.positional_embedding
    q, k, v = pool.q_proj(tokens[:, :1]), pool.k_proj(tokens), pool.v_proj(tokens)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = (q[..., part] @ k[..., part].mT / 4**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(pool(x), pool.c_proj(torch.cat(heads, dim=-1)[:, 0]))


def test_features_equal_those_of_timms_clip_resnet() -> None:
    """timm's resnet50_clip has the same weights with other names."""
    timm = pytest.importorskip("timm")
    from timm.models.byobnet import checkpoint_filter_fn

    theirs = timm.create_model("resnet50_clip", num_classes=1024).eval()
    ours = ModifiedResNet([3, 4, 6, 3], 1024, 32, image_size=224, width=64)
    state_dict = cases.weights(ours.state_dict())
    ours.load_state_dict(state_dict)
    theirs.load_state_dict(checkpoint_filter_fn({f"visual.{key}": value for key, value in state_dict.items()}, theirs))
    image = cases.images(224)[:1]
    with torch.no_grad():
        expected, found = theirs(image), ours.eval()(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_with_a_stride_uses_average_pooling(stride: int) -> None:
    block = Bottleneck(8, 4, stride)
    assert block(torch.randn(2, 8, 6, 6)).shape == (2, 16, 6 // stride, 6 // stride)
    assert Bottleneck(16, 4).downsample is None


def test_recomputing_gives_the_same_gradients_and_statistics() -> None:
    plain = tower().train()
    recomputing = copy.deepcopy(plain)
    recomputing.set_grad_checkpointing()
    calls = []
    recomputing.layer3.register_forward_pre_hook(lambda *_: calls.append(1))
    for resnet in (plain, recomputing):
        resnet(cases.images(64)).square().mean().backward()
    assert len(calls) == 2, "once forward, once again for the gradients"
    for (name, a), b in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), recomputing.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("unlocked", range(7))
def test_locking_by_groups(unlocked: int) -> None:
    """Groups are unlocked from the last to the first. Frozen batch norms keep their statistics."""
    resnet = tower()
    resnet.lock(unlocked, freeze_bn_stats=True)
    order = ["attnpool", "layer4", "layer3", "layer2", "layer1", "conv1"]
    trainable = {name.split(".")[0] for name, value in resnet.named_parameters() if value.requires_grad}
    assert trainable & set(order) == set(order[:unlocked])
    assert isinstance(resnet.bn1, nn.BatchNorm2d) == (unlocked >= 6)
    assert isinstance(resnet.layer4[0].bn1, nn.BatchNorm2d) == (unlocked >= 2)


def test_positions_are_resized_to_another_image_size() -> None:
    small, large = tower(), ModifiedResNet(**{**cases.RESNET, "image_size": (96, 128)})
    holder = nn.Module()
    holder.visual = large
    state_dict = {f"visual.{key}": value for key, value in small.state_dict().items()}
    table = state_dict["visual.attnpool.positional_embedding"]
    pos_embed.resize_pos_embed(state_dict, holder)
    found = state_dict["visual.attnpool.positional_embedding"]
    assert torch.equal(found[0], table[0]), "the mean's own stays"
    grid = table[1:].T.reshape(1, -1, 2, 2)
    expected = nn.functional.interpolate(grid, (3, 4), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(found[1:], expected[0].flatten(1).T)
    large.load_state_dict({key.removeprefix("visual."): value for key, value in state_dict.items()})
    assert large(cases.images((96, 128))).shape == (2, 24)


def test_invalid_sizes_raise() -> None:
    with pytest.raises(ValueError, match="four stages, got \\[1, 2\\]"):
        tower(layers=[1, 2])
    with pytest.raises(ValueError, match="16 pixels is too small: each side needs 32"):
        tower(image_size=16)
    with pytest.raises(ValueError, match="256 cannot be divided into 3 heads"):
        tower(heads=3)


def test_patch_dropout_has_no_effect_and_warns(caplog) -> None:
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "patch_dropout": 0.5}
    open_clip.CLIP(24, vision, dict(cases.TEXT))
    assert "a ResNet has no patches." in caplog.text


def test_synchronized_batch_norms_are_torchs() -> None:
    model = open_clip.CLIP(24, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}, dict(cases.TEXT))
    assert isinstance(build.synchronize_batch_norms(model).visual.bn1, nn.SyncBatchNorm)


def test_a_seed_gives_initial_weights_of_the_right_size() -> None:
    torch.manual_seed(0)
    resnet = ModifiedResNet(**cases.RESNET)
    assert resnet.attnpool.q_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert resnet.attnpool.positional_embedding.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert not resnet.layer2[1].bn3.weight.any(), "a block starts as its shortcut"


def test_counters_that_a_file_lacks_are_zero() -> None:
    """Such a file was saved with frozen batch norms."""
    cfg = {"embed_dim": 24, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "head_width": 64}}
    model = open_clip.CLIP(**cfg, text_cfg=dict(cases.TEXT))
    whole = cases.weights(model.state_dict())
    kept = {key: value for key, value in whole.items() if not key.endswith("num_batches_tracked")}
    checkpoint.put_weights(model, kept)
    assert torch.equal(model.visual.bn1.running_mean, whole["visual.bn1.running_mean"])
    del kept["visual.bn1.running_mean"]
    with pytest.raises(RuntimeError, match="missing"):
        checkpoint.put_weights(model, kept)
