"""Image towers for images of any size: dense, padded, packed and single images have the same features."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from naflex_cases import GAP, GRIDS, SIZES, VARIANTS, assert_equal, features_and_gradients, make_images, make_tower
from open_clip.naflex import NaFlexTower, resize
from open_clip.packed_patches import PackedPatches, pack_patches


def alone(images: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    count = int(images["patch_valid"][number].sum())
    return {name: value[number : number + 1, :count] for name, value in images.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_padded_and_alone_and_timm(variant):
    """In features and in gradients. timm computes the padded images of the reference by its own path."""
    tower, images = make_tower(variant), make_images(GRIDS)
    assert tower.takes_packed_patches
    packed = features_and_gradients(tower, pack_patches(images))
    assert_equal(packed, features_and_gradients(tower, images))
    reference = copy.deepcopy(tower)
    reference.forward = lambda x: reference.head(reference.trunk(x))
    assert_equal(packed, features_and_gradients(reference, images))
    with torch.no_grad():
        for number in range(len(GRIDS)):
            torch.testing.assert_close(tower(alone(images, number))[0], packed[0][number], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(16, 16), (12, 24)])
def test_images_equal_their_patches_and_timm(variant, size):
    tower = make_tower(variant)
    image = torch.randn(2, 3, *size)
    grid = (size[0] // 4, size[1] // 4)
    patches = make_images([grid] * 2, extra=0)
    cut = image.view(2, 3, grid[0], 4, grid[1], 4).permute(0, 2, 4, 3, 5, 1)
    patches["patches"] = cut.reshape(2, grid[0] * grid[1], 48)
    with torch.no_grad():
        features = tower(image)
        for other in (tower(patches), tower(pack_patches(patches)), tower.head(tower.trunk(image))):
            torch.testing.assert_close(features, other, rtol=1e-5, atol=1e-5)


def test_the_order_of_patches_does_not_matter():
    """The coordinates say where a patch is, not its number."""
    tower, images = make_tower(), make_images([(2, 3)], extra=0)
    torch.manual_seed(5)
    order = torch.randperm(6)
    shuffled = {name: value[:, order] for name, value in images.items()}
    with torch.no_grad():
        for form in (lambda x: x, pack_patches):
            torch.testing.assert_close(tower(form(shuffled)), tower(form(images)), rtol=1e-5, atol=1e-5)


def test_a_mask_of_numbers_is_that_of_bools():
    tower, images = make_tower("rope_and_learned"), make_images(GRIDS)
    numbers = {**images, "patch_valid": images["patch_valid"] * 2}
    with torch.no_grad():
        for form in (lambda x: x, pack_patches):
            assert torch.equal(tower(form(numbers)), tower(form(images)))


@pytest.mark.parametrize("variant", ["gap", "rope", "map"])
def test_values_of_padding_do_not_matter(variant):
    tower, images = make_tower(variant), make_images(GRIDS)
    other = copy.deepcopy(images)
    other["patches"][~other["patch_valid"]] = 1e3
    other["patch_coord"][~other["patch_valid"]] = 50
    with torch.no_grad():
        torch.testing.assert_close(tower(other), tower(images), rtol=1e-5, atol=1e-5)


def test_unknown_parts_are_computed_by_timm():
    """Packed images are padded for them."""
    for options in (
        {"pos_embed_use_grid_sample": True},
        {"rope_type": "mixed", "pos_embed": "none"},
        {"attn_drop_rate": 0.1},
        {"global_pool": "max"},
    ):
        pool = options.pop("global_pool", "avg")
        tower = NaFlexTower(GAP, 16, 16, pool=pool, model_kwargs={**SIZES, **options}).eval()
        images = make_images(GRIDS)
        assert not tower.takes_packed_patches
        with torch.no_grad():
            expected = tower.head(tower.trunk(images))
            torch.testing.assert_close(tower(images), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(tower(pack_patches(images)), expected, rtol=1e-5, atol=1e-5)


def test_hooks_and_patches_are_respected():
    tower = make_tower()
    seen = []
    handle = tower.trunk.register_forward_hook(lambda *_: seen.append(1))
    assert not tower.takes_packed_patches
    tower(torch.randn(1, 3, 16, 16))
    tower(make_images(GRIDS))
    assert len(seen) == 2
    handle.remove()
    assert tower.takes_packed_patches
    tower.forward = lambda x: x
    assert not tower.takes_packed_patches


@pytest.mark.parametrize("variant", ["gap", "map", "rope", "eva"])
def test_attention_that_a_program_hooks_or_replaces_is_called(variant):
    """Packed images are padded for it: packed attention does not call the modules of timm."""
    tower, images = make_tower(variant), make_images(GRIDS)
    packed = pack_patches(images)
    attentions = [tower.trunk.blocks[1].attn, *([tower.trunk.attn_pool] if tower.trunk.attn_pool is not None else [])]
    with torch.no_grad():
        before = tower(packed)
        for attention in attentions:
            forward = attention.forward
            handle = attention.register_forward_hook(lambda module, args, output: 2 * output + 1)
            torch.testing.assert_close(tower(packed), tower(images), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(tower(packed), before)
            handle.remove()
            attention.forward = lambda *args, forward=forward, **options: 2 * forward(*args, **options) + 1
            torch.testing.assert_close(tower(packed), tower(images), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(tower(packed), before)
            del attention.forward
        assert torch.equal(tower(packed), before)


# Position tables


def test_tables_are_computed_once_per_grid():
    tower, images = make_tower(), make_images(GRIDS)
    for number, form in enumerate((images, pack_patches(images)), start=1):
        tower(form)
        assert tower._tables.num_computed == 4 * number  # distinct grids


def test_tables_follow_the_weights():
    """Also if they change in a way that torch does not record, as averages of weights do it."""
    tower, images = make_tower(), make_images(GRIDS)
    weight = tower.trunk.embeds.pos_embed

    def replace() -> None:
        weight.data = torch.randn_like(weight)

    with torch.no_grad():
        before = tower(images)
        copied = copy.deepcopy(tower)
        changed = {name: value + 0.1 for name, value in tower.state_dict().items()}
        for change in (lambda: tower.load_state_dict(changed), lambda: weight.data.mul_(2), replace):
            change()
            torch.testing.assert_close(tower(images), tower.head(tower.trunk(images)), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(tower(images), before)
        torch.testing.assert_close(copied(images), before)


def test_rotary_tables_are_kept_in_training():
    tower, images = make_tower("rope").train(), make_images(GRIDS)
    tower(images).sum().backward()
    tower(images).sum().backward()
    assert tower._tables.num_computed == 4


@pytest.mark.parametrize("variant", ["gap", "rope"])
def test_fake_tensors_are_not_kept(variant):
    """Programs that estimate memory or FLOPs call a model with them before it is used."""
    tower, images = make_tower(variant), torch.randn(1, 3, 8, 20)
    resize.axis_matrix.cache_clear()
    with torch.no_grad():
        for _ in range(2):
            with FakeTensorMode(allow_non_fake_inputs=True):
                assert tower(torch.empty(1, 3, 8, 20)).shape == (1, 16)
            torch.testing.assert_close(tower(images), tower.head(tower.trunk(images)), rtol=1e-5, atol=1e-5)


def test_compilation_with_dynamic_shapes():
    tower, images = make_tower("rope", depth=1), make_images([(4, 4), (1, 3)])
    compiled = torch.compile(tower, backend="eager", dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), tower(images), rtol=1e-5, atol=1e-5)


def test_rotary_positions_that_are_varied_in_training():
    tower, images = make_tower("dinov3", rope_rescale_coords=2.0).train(), make_images([(4, 4)])
    with torch.no_grad():
        assert not torch.equal(tower(images), tower(images))
        tower.eval()
        assert torch.equal(tower(images), tower(images))


def test_tables_made_in_inference_mode_can_be_used_in_training():
    tower, images = make_tower("rope_and_learned"), make_images(GRIDS)
    tower.trunk.embeds.pos_embed.requires_grad_(False)
    with torch.inference_mode():
        tower(images)
    tower(pack_patches(images)).sum().backward()


def test_packed_images_encoded_in_inference_mode_can_be_used_in_training():
    tower, images = make_tower("token"), pack_patches(make_images(GRIDS))
    with torch.inference_mode():
        tower(images)
    tower(images).sum().backward()


def test_towers_with_tables_are_copied_and_pickled():
    tower = make_tower()
    with torch.no_grad():
        expected = tower(make_images(GRIDS))
        for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
            assert torch.equal(other(make_images(GRIDS)), expected)
            assert other.takes_packed_patches


# Patches of other sizes


@pytest.mark.parametrize(("variant", "mode"), [("gap", "bicubic"), ("siglip", "bilinear")])
@pytest.mark.parametrize("patch_size", [2, 6, 8])
def test_patches_of_another_size(variant, mode, patch_size):
    tower, images = make_tower(variant), make_images(GRIDS, patch_size)
    by_pixel = {**images, "patches": images["patches"].unflatten(2, (patch_size, patch_size, 3))}
    name, pool, more = VARIANTS[variant]
    options = {**SIZES, **more, "enable_patch_interpolator": True}
    reference = timm.create_model(name, num_classes=0, global_pool=pool, **options).eval()
    reference.load_state_dict(tower.trunk.state_dict())
    assert reference.embeds.pos_embed_interp_mode == mode
    expected = features_and_gradients(_Sum(reference, tower.head), by_pixel)
    expected = (expected[0], {name.removeprefix("m."): value for name, value in expected[1].items()})
    for form in (images, by_pixel, pack_patches(images), pack_patches(by_pixel)):
        actual = features_and_gradients(tower, form)
        assert_equal(actual, (expected[0], {k: v for k, v in expected[1].items() if k in actual[1]}))
    assert actual[1]["trunk.embeds.proj.weight"].abs().sum() > 0


def test_a_patch_embedding_that_a_program_hooks_or_replaces_is_called():
    """Its weight alone is not what it computes, for example with an adapter."""
    tower, images = make_tower(), make_images(GRIDS, 8)
    proj = tower.trunk.embeds.proj
    with torch.no_grad():
        for form in (images, pack_patches(images)):
            before = tower(form)
            handle = proj.register_forward_hook(lambda module, args, output: output)
            torch.testing.assert_close(tower(form), before, rtol=1e-5, atol=1e-5)
            handle.remove()
            handle = proj.register_forward_hook(lambda module, args, output: 2 * output)
            assert not torch.allclose(tower(form), before)
            handle.remove()
        tower.trunk.embeds.proj = _Doubled(proj.in_features, proj.out_features)
        tower.trunk.embeds.proj.load_state_dict(proj.state_dict())
        expected = tower(images)
        proj.weight.mul_(2)
        proj.bias.mul_(2)
        tower.trunk.embeds.proj = proj
        torch.testing.assert_close(tower(images), expected, rtol=1e-5, atol=1e-5)


class _Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class _Sum(nn.Module):
    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, x: Any) -> torch.Tensor:
        return self.head(self.trunk(x))


def test_the_matrix_of_a_patch_size_is_computed_once(monkeypatch):
    tower, images = make_tower(), make_images(GRIDS, 6)
    resize.patch_matrix.cache_clear()
    calls = []
    pinv = torch.linalg.pinv
    monkeypatch.setattr(torch.linalg, "pinv", lambda x: calls.append(1) or pinv(x))
    for _ in range(3):
        tower(images).sum().backward()
        tower(pack_patches(images)).sum().backward()
    assert len(calls) == 1


def test_a_resized_weight_equals_timms():
    weight = torch.randn(5, 4 * 4 * 3)
    for mode in ("bicubic", "bilinear"):
        ours = resize.resize_patch_weight(weight, (4, 4), (6, 3), mode)
        by_channel = weight.view(5, 4, 4, 3).permute(0, 3, 1, 2)
        theirs = timm.layers.resample_patch_embed(by_channel, [6, 3], mode)
        torch.testing.assert_close(ours, theirs.permute(0, 2, 3, 1).flatten(1), rtol=1e-5, atol=1e-5)


# Checks


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 6, 47), r"6, 47\]. This model takes 48 values per patch \(4 x 4 x 3"),
        ((1, 6, 4, 4, 1), r"6, 4, 4, 1\].*48 values per patch"),
    ],
)
def test_patches_of_a_wrong_shape(shape, message):
    images = {**make_images([(2, 3)], extra=0), "patches": torch.zeros(shape)}
    for form in (lambda x: x, pack_patches):
        with pytest.raises(ValueError, match=message):
            make_tower()(form(images))


FORMS = {"padded": lambda images: images, "packed": pack_patches}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_entries_that_are_no_padded_images(form):
    tower, images = make_tower(), make_images([(2, 3), (1, 2)], extra=0)
    for name in images:
        with pytest.raises(ValueError, match=f"lack {name}.*collate_patches"):
            tower(form({key: value for key, value in images.items() if key != name}))
    with pytest.raises(ValueError, match=r"\[6\], without the dimension of the batch.*value\[None\]"):
        tower(form({name: value[0] for name, value in images.items()}))
    for name, message in (("patch_coord", r"patch_coord \[2, 5, 2\]"), ("patch_valid", r"patch_valid \[2, 5\]")):
        with pytest.raises(ValueError, match=message):
            tower(form({**images, name: images[name][:, :5]}))
    with pytest.raises(ValueError, match="at least one image"):
        tower(form({name: value[:0] for name, value in images.items()}))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("place", "message"), [((0, -1), "from -1 to row 1"), ((300_000, 200_000), "row 300000 and column 200000")]
)
def test_coordinates_outside_of_an_image(form, place, message):
    """Without the check, a device would fail in a later operation, or the host would run out of memory."""
    images = make_images([(2, 3), (1, 2)], extra=0)
    images["patch_coord"][0, 4] = torch.tensor(place)
    with pytest.raises(ValueError, match=f"{message}.*at least 0"):
        make_tower()(form(images))


def test_patches_that_are_not_normalized():
    images = make_images([(2, 3)], extra=0)
    images["patches"] = images["patches"].to(torch.uint8)
    with pytest.raises(ValueError, match=r"torch.uint8.*patches / 255 - mean"):
        make_tower()(images)


def test_images_that_cannot_be_divided():
    with pytest.raises(ValueError, match=r"16 x 18 pixels.*patches of 4 x 4.*multiples"):
        make_tower()(torch.zeros(1, 3, 16, 18))
    assert make_tower(dynamic_img_pad=True)(torch.zeros(1, 3, 16, 18)).shape == (1, 16)
    with pytest.raises(ValueError, match="unsqueeze"):
        make_tower()(torch.zeros(3, 16, 16))


def test_a_packing_that_does_not_fit():
    packed = pack_patches(make_images(GRIDS))
    with pytest.raises(ValueError, match="do not fit segments of 64 patches"):
        PackedPatches(packed.patches[:-1], packed.coord, packed.segments)


# Packed patches


def test_packing_and_padding_are_inverse():
    images = make_images(GRIDS, extra=0)
    packed = pack_patches(images)
    assert len(packed) == len(GRIDS)
    assert packed.grids == ((4, 4), (2, 7), (1, 3), (5, 3))
    for name, value in packed.padded().items():
        assert torch.equal(value, images[name])
    moved = packed.to("cpu", non_blocking=True)
    assert torch.equal(moved.place, packed.place)
    assert moved.grids == packed.grids


def test_patch_dropout_drops_a_fraction_of_each_image():
    packed = pack_patches(make_images(GRIDS))
    fewer, kept = packed.dropped(0.5)
    assert fewer.segments.lengths == (8, 7, 1, 8, 7)
    assert len(set(kept.tolist())) == len(kept)
    assert torch.equal(packed.segments.sequence[kept], fewer.segments.sequence)
    assert torch.equal(packed.coord[kept], fewer.coord)


@pytest.mark.parametrize("variant", ["gap", "rope", "map"])
def test_patch_dropout_in_every_form(variant):
    tower = make_tower(variant, patch_drop_rate=0.5).train()
    images = make_images(GRIDS)
    outputs = [tower(form) for form in (images, pack_patches(images), torch.randn(2, 3, 16, 16))]
    assert [output.shape for output in outputs] == [(5, 16), (5, 16), (2, 16)]
    assert all(torch.isfinite(output).all() for output in outputs)
    assert not torch.equal(tower(images), tower(images))
    assert torch.equal(tower.eval()(images), tower(images))


def test_drop_path_drops_whole_images():
    tower = NaFlexTower(GAP, 16, 16, drop_path=0.9, model_kwargs=SIZES).train()
    block = tower.trunk.blocks[-1]
    from open_clip.naflex.blocks import PackedTokens

    packed = pack_patches(make_images(GRIDS))
    x = torch.randn(packed.segments.total, 32)
    change = (block(x, attn_mask=PackedTokens(packed.segments)) - x).abs().sum(1)
    for number in range(len(GRIDS)):
        changed = change[packed.segments.sequence == number] > 0
        assert changed.all() or not changed.any()
