"""NaFlex towers in training: precisions, checkpointing, compilation, sharding, groups of layers."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_clip
from gloo_ranks import run_ranks
from naflex_cases import GRIDS, SIZES, VARIANTS, assert_equal, features_and_gradients, make_images, make_tower
from open_clip.deferred_init import DeferredInit
from open_clip.model import CLIP
from open_clip.packed_patches import pack_patches
from open_clip.precision import set_precision
from training import build, compilation, ranks
from training.params import DistributedConfig
from training.precision import Precision
from training.sharding.tensors import gather, is_sharded

CPU = torch.device("cpu")
FORMS = [lambda images: images, pack_patches, lambda images: torch.randn(2, 3, 16, 16)]


def make_clip(variant: str = "gap") -> Any:
    name, pool, options = VARIANTS[variant]
    vision = {"timm_model_name": name, "timm_pool": pool, "image_size": 16, "timm_model_kwargs": {**SIZES, **options}}
    config = tiny_clip.config(None, {"layers": 2})
    torch.manual_seed(0)
    return CLIP(**{**config, "vision_cfg": vision}, output_dict=True)


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
@pytest.mark.parametrize("variant", ["gap", "rope", "rope_and_learned", "eva"])
def test_half_precision_keeps_positions_in_float32(precision, variant):
    model, images = make_clip(variant).eval(), make_images([(20, 30), (2, 3)])
    with torch.no_grad():
        expected = model.encode_image(images, normalize=True)
        set_precision(model, precision)
        images["patches"] = images["patches"].bfloat16()
        for form in FORMS[:2]:
            features = model.encode_image(form(images), normalize=True)
            assert features.dtype == torch.bfloat16
            torch.testing.assert_close(features.float(), expected, rtol=0.05, atol=0.05)
        tower = model.visual
        rope = tower.trunk.rope
        table = tower._tables.learned(tower.trunk.embeds, ((20, 30),))
        assert table is None or table.dtype == torch.float32
        if rope is not None:
            assert rope.bands.dtype == torch.float32
            rotary = tower._tables.rotary(rope, ((20, 30),))
            assert torch.equal(rotary, make_clip(variant).visual.trunk.rope.get_embed([20, 30]))


def test_autocast_computes_tables_in_float32():
    tower = make_tower("gap")
    with torch.autocast("cpu", torch.bfloat16):
        table = tower._tables.learned(tower.trunk.embeds, ((5, 3),))
    assert torch.equal(table, tower._tables.learned(tower.trunk.embeds, ((5, 3),)))
    assert tower(make_images(GRIDS)).shape == (5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        padded, packed = (tower(form(make_images(GRIDS, patch_size=6))) for form in FORMS[:2])
    torch.testing.assert_close(padded, packed, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("variant", ["map", "rope"])
def test_checkpointing_changes_no_gradient(variant):
    tower, images = make_tower(variant), make_images(GRIDS)
    for form in FORMS[:2]:
        tower.set_grad_checkpointing(False)
        expected = features_and_gradients(tower, form(images))
        tower.set_grad_checkpointing()
        calls = []
        handle = tower.trunk.blocks[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert_equal(features_and_gradients(tower, form(images)), expected)
        handle.remove()
        assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gap", "rope"])
def test_blocks_compile_once_for_all_lengths(variant):
    tower, reference = make_tower(variant), make_tower(variant)
    blocks = compilation.find_blocks(tower)
    assert blocks == list(tower.trunk.blocks)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in blocks:
        block.compile(backend="aot_eager", dynamic=True)
    for grids in (GRIDS, [(3, 3), (5, 5)], [(8, 8), (2, 5), (2, 2), (3, 9)]):
        images = pack_patches(make_images(grids))
        assert_equal(features_and_gradients(tower, images), features_and_gradients(reference, images))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("pool_variant", ["gap", "token", "map"])
def test_locks_and_layer_groups(pool_variant):
    tower = make_tower(pool_variant)
    groups = tower.layer_groups()
    assert [name for name, _ in groups][:3] == ["embeddings", "layer.0", "layer.1"]
    assert groups[-1][0] == "proj"
    in_groups: list[torch.Tensor] = []
    for member in (member for _, members in groups for member in members):
        in_groups += [member] if isinstance(member, torch.Tensor) else list(member.parameters())
    assert len(in_groups) == len(set(map(id, in_groups))) == len(list(tower.parameters()))
    tower.lock()
    assert all(not p.requires_grad for p in tower.trunk.parameters())
    for form in FORMS:
        tower(form(make_images(GRIDS))).sum().backward()
    tower = make_tower(pool_variant)
    tower.lock(unlocked_groups=len(groups) - 3)  # all but the embeddings, the first block, and the head
    trainable = {name for name, p in tower.named_parameters() if p.requires_grad}
    assert any(name.startswith("trunk.blocks.1.") for name in trainable)
    assert not any(name.startswith(("trunk.embeds.", "trunk.blocks.0.")) for name in trainable)


def test_intermediate_features_of_padded_images():
    tower, images = make_tower("rope"), make_images(GRIDS)
    with torch.no_grad():
        output = tower.forward_intermediates(images, output_fmt="NLC", indices=[0, 1])
        torch.testing.assert_close(output["image_features"], tower(images), rtol=1e-5, atol=1e-5)
        assert [x.shape for x in output["image_intermediates"]] == [(5, 18, 32)] * 2
        packed = tower.forward_intermediates(pack_patches(images), output_fmt="NLC")
        torch.testing.assert_close(packed["image_features"], tower(images), rtol=1e-5, atol=1e-5)
        dense = tower.forward_intermediates(torch.randn(2, 3, 16, 24))
        assert dense["image_intermediates"][0].shape == (2, 32, 4, 6)
    with pytest.raises(ValueError, match="NCHW"):
        tower.forward_intermediates(images)


@pytest.mark.parametrize("variant", ["gap", "map", "rope"])
def test_export_of_one_grid(variant):
    tower, image = make_tower(variant), torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        exported = torch.export.export(tower, (image,))
        torch.testing.assert_close(exported.module()(image), tower(image), rtol=1e-5, atol=1e-5)


def test_the_size_of_images_can_be_changed():
    tower = make_tower()
    tower.set_input_size(32)
    assert tower.image_size == (32, 32)
    assert tower(torch.randn(1, 3, 32, 32)).shape == (1, 16)


# Several ranks


def sharded_features(rank: int, size: int) -> dict[str, Any]:
    """Return features and gradients of one tower, sharded or not, for images in both forms."""
    result: dict[str, Any] = {}
    world = ranks.world()
    for kind in ("ddp", "fsdp"):
        config = DistributedConfig(fsdp=kind == "fsdp")
        deferred = DeferredInit(smallest=1000) if config.fsdp else None
        with contextlib.nullcontext() if deferred is None else deferred.recording():
            model = make_clip("rope_and_learned").train()
        build.shard(model, config, world, Precision("fp32", CPU), deferred)
        if kind == "fsdp":
            result["blocks"] = sum(is_sharded(p) for p in model.visual.trunk.blocks[0].parameters())
            assert type(model.visual.trunk.blocks[0]).__name__.startswith("FSDP")
        wrapped = build.parallelize(model, config, world, 1)
        grids = GRIDS[:2] if rank == 0 else GRIDS[2:4]
        for number, form in enumerate(FORMS[:2]):
            wrapped.zero_grad()
            output = wrapped(form(make_images(grids)), torch.tensor([[1, 2, 29, 0], [3, 29, 0, 0]]))
            logits = output["logit_scale"] * output["image_features"] @ output["text_features"].T
            (logits * torch.tensor([[1.0, 2.0], [-1.0, 3.0]])).sum().backward()
            gradient = model.visual.trunk.blocks[1].mlp.fc1.weight.grad
            position = model.visual.trunk.embeds.pos_embed.grad
            result[f"{kind} {number}"] = output["image_features"].detach()
            result[f"{kind} {number} gradient"] = gather(gradient) if is_sharded(gradient) else gradient.clone()
            result[f"{kind} {number} positions"] = gather(position) if is_sharded(position) else position.clone()
    return result


@pytest.mark.slow
def test_towers_are_sharded_by_blocks(tmp_path: Path):
    for result in run_ranks(__file__, "sharded_features", (2,), tmp_path)[2]:
        assert result["blocks"] > 0
        for number in (0, 1):
            for suffix in ("", " gradient", " positions"):
                expected = result[f"ddp 0{suffix}"]
                for kind in ("ddp", "fsdp"):
                    torch.testing.assert_close(result[f"{kind} {number}{suffix}"], expected, rtol=1e-4, atol=1e-5)
